"""The columns of a set of rows: a query, a passage that answers it, and any number of passages that do not."""

import re
from collections.abc import Iterable

ANCHOR, POSITIVE, NEGATIVE = "anchor", "positive", "negative"
LABEL = "label"  # a teacher's scores of a row's passages; what the library takes for labels, and hands to the loss


def negative_roles(count: int) -> list[str]:
    """negative, negative2, negative3, …: no name is the beginning of another and an underscore.

    The library tells the features of a batch apart by the name and the underscore that they begin with.
    """
    return [NEGATIVE if number == 1 else f"{NEGATIVE}{number}" for number in range(1, count + 1)]


def negatives_of(columns: Iterable[str]) -> list[str]:
    """Those of these columns that hold negatives, in order."""
    found = [name for name in columns if re.fullmatch(rf"{NEGATIVE}\d*", name)]
    return sorted(found, key=lambda name: int(name.removeprefix(NEGATIVE) or 1))


def passages_of(columns: Iterable[str]) -> list[str]:
    """Those that hold passages, the positive first."""
    columns = list(columns)
    return [POSITIVE] * (POSITIVE in columns) + negatives_of(columns)


def roles_of(columns: Iterable[str]) -> list[str]:
    """Those that hold texts, the query first."""
    columns = list(columns)
    return [ANCHOR] * (ANCHOR in columns) + passages_of(columns)


def side_of(role: str) -> str:
    """What a column's texts are to a search, and so which prompt stands in front of them."""
    return "query" if role == ANCHOR else "document"
