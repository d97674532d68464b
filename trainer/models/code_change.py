"""A fault in the code that a base model brings along, and what mends it: patterns, of which none is missed in silence."""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One fault of the published code, and what takes its place.

    `edits` are (pattern, replacement) pairs; each must match at least once inside class `within` (anywhere when empty),
    and `gone` must not match there afterwards. A revision has the fault if `only_if` matches, unless `unless` does too.
    An `optional` one is left in where it cannot be mended: the model can be trained as it is.
    """

    name: str
    why: str
    edits: tuple[tuple[str, str | Callable[[re.Match], str]], ...]
    gone: str = r"(?!)"
    within: str = ""
    only_if: str = ""
    unless: str = r"(?!)"
    optional: bool = False

    def apply(self, code: str) -> str | None:
        """The code without the fault, or None when this revision does not have it. Raises NotFound with the pattern."""
        whole_class = rf"^class {self.within}\b.*\n(?:(?!\S).*(?:\n|\Z))*"
        place = re.search(whole_class if self.within else r"(?s:.*)", code, re.MULTILINE)
        if place is None:
            raise NotFound(f"this was looked for and not found: class {self.within}")
        part = place[0]
        if re.search(self.unless, part, re.MULTILINE) or not re.search(self.only_if, part, re.MULTILINE):
            return None
        for pattern, replacement in self.edits:
            part, count = re.subn(pattern, replacement, part, flags=re.MULTILINE)
            if not count:
                raise NotFound(f"this was looked for and not found: {pattern}")
        if left := re.search(self.gone, part, re.MULTILINE):
            raise NotFound(f"this is still there: {' '.join(left[0].split())[:100]}")
        return code[: place.start()] + part + code[place.end() :]


class NotFound(Exception):
    """What keeps a change from being made: a pattern that is not found, or a fault in another place."""
