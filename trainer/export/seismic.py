"""Seismic: documents as its index is built from them, for learned sparse vectors in memory."""

import json

import numpy as np

from trainer.export.lines import SIX_DIGITS, LineFormat
from trainer.export.vectors import Vector, require_distinct

# It compares words as arrays of this many characters (get_seismic_string), and keeps documents' weights in float16:
# 11 significant bits, and steps of 2^-24 among the smallest.
MAX_TERM, HALF, SMALLEST_STEP = 100, 2.0**-11, 2.0**-24


class Seismic(LineFormat):
    """id, content, and weights by term; queries in the same form."""

    quantisation = "the index keeps 11 significant bits of a document's weight, 2^-11 of it at most"

    def terms(self, tokens: list[str]) -> list[str]:
        """The tokens, and a number for what is longer than it compares."""
        return require_distinct([t if len(t) <= MAX_TERM else f"%{number};" for number, t in enumerate(tokens)])

    def document(self, name: str, text: str, vector: Vector) -> str:
        """A line."""
        row = {"id": name, "content": text, "vector": {term: float(f"{w:.6g}") for term, w in vector.items()}}
        return json.dumps(row, ensure_ascii=False) + "\n"

    query = document

    def read_document(self, lines: list[str]) -> tuple[str, Vector]:
        """With the bits that the index keeps."""
        row = json.loads(lines[0])
        return row["id"], {term: float(np.float16(weight)) for term, weight in row["vector"].items()}

    def read_query(self, line: str) -> Vector:
        """As it is."""
        return json.loads(line)["vector"]

    def document_errors(self, weights: np.ndarray) -> np.ndarray:
        """What rounding to float16 may change."""
        return (HALF + SIX_DIGITS) * np.abs(weights) + SMALLEST_STEP
