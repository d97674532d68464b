"""Several values in one text, as a variable of make holds them: SET's pairs, TASKS' and BASELINE's names."""

import re
from collections.abc import Callable
from pathlib import Path

# In a value: something in quotes, or one character. A quote opens where a value of YAML may begin; Ola's does not.
_QUOTED = re.compile(r"""(?<![^\s=:,\[{])(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')""")
_NEXT_PAIR = re.compile(r"\s+(?=[\w-]+(?:\.[\w-]+)*=)")


def split_pairs(text: str) -> list[str]:
    """`a.b=[10, 100] c.d="x y"` as its pairs: one begins at a blank before `key=`, outside of brackets and quotes."""
    pairs, start, place, depth = [], 0, 0, 0
    while place < len(text):
        if quoted := _QUOTED.match(text, place):
            place = quoted.end()
        elif depth == 0 and (blank := _NEXT_PAIR.match(text, place)):
            pairs.append(text[start:place])
            start = place = blank.end()
        else:
            depth = max(0, depth + (text[place] in "[{") - (text[place] in "]}"))
            place += 1
    return [pair for pair in (*pairs, text[start:]) if pair.strip()]


def split_names(text: str, exists: Callable[[str], bool]) -> list[str]:
    """The names between blanks or commas; one with blanks or commas in it stays whole where it exists.

    The longest name that exists is taken, as docker/run does for what it mounts.
    """
    words = list(re.finditer(r"[^,\s]+", text))
    names, first = [], 0
    while first < len(words):
        for last in range(len(words) - 1, first - 1, -1):
            name = text[words[first].start() : words[last].end()]
            if last == first or exists(name):
                break
        names.append(name)
        first = last + 1
    return names


def split_paths(texts: tuple[str, ...]) -> tuple[Path, ...]:
    """The paths in these texts; one that is neither a path nor several stays as it is, to be refused by its whole name."""
    paths: list[str] = []
    for text in texts:
        names = split_names(text, lambda name: Path(name).exists())
        paths += names if all(Path(name).exists() for name in names) else [text]
    return tuple(map(Path, paths))
