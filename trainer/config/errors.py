"""The one exception for mistakes a user can fix: one line, no traceback, exit code 2."""

import difflib
from collections.abc import Iterable

import click

# Longest error line: about ten lines of a terminal. The longest of ours has 600 characters; more comes from a value.
LONGEST = 1000


class ConfigError(click.ClickException):
    """A mistake the user can fix. The message says where, what, and what to do.

    It is one line whatever it quotes: a key or a file name may hold line breaks, terminal codes, or a page of text.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        line = printable(message)
        if len(line) > LONGEST:  # the place is at the start, and what to do is at the end
            line = f"{line[: LONGEST // 2]} […] {line[-LONGEST // 2 :]}"
        super().__init__(line)


def printable(text: str) -> str:
    """A text without what a terminal would obey or hide: line breaks, control codes, a change of direction."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def one_line(error: BaseException, limit: int = 200) -> str:
    """What a library's error says, on one line of at most `limit` characters; may be empty."""
    return " ".join(str(error).split())[:limit]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean …?' for the nearest of the known words, or the list of them where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""
