"""Seismic: documents as its index is built from them, for learned sparse vectors in memory."""

import json

import numpy as np

from trainer.export.formats import Format, step_of
from trainer.export.vectors import Vector, nine_digits, require_distinct

# It compares words as arrays of this many characters (get_seismic_string), and keeps documents' weights in float16:
# 11 significant bits, and steps of 2^-24 among the smallest.
MAX_TERM, HALF_BITS, SMALLEST_STEP = 100, 11, 2.0**-24


class Seismic(Format):
    """id, content, and weights by term; queries in the same form."""

    fixed = True
    quantisation = f"the index keeps {HALF_BITS} significant bits of a document's weight, to the nearest (float16)"

    def terms(self, tokens: list[str]) -> list[str]:
        """The tokens, and a number for what is longer than it compares."""
        return require_distinct([t if len(t) <= MAX_TERM else f"%{number};" for number, t in enumerate(tokens)])

    def document(self, name: str, text: str, vector: Vector) -> str:
        """A line."""
        return json.dumps({"id": name, "content": text, "vector": nine_digits(vector)}, ensure_ascii=False) + "\n"

    query = document

    def read_document(self, record: str) -> tuple[str, Vector]:
        """With the bits that the index keeps."""
        row = json.loads(record)
        return row["id"], {term: float(np.float16(weight)) for term, weight in row["vector"].items()}

    def read_query(self, record: str) -> Vector:
        """As it is."""
        return json.loads(record)["vector"]

    def document_rounding(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Half of the last bit either way."""
        half = np.where(weights > 0, np.maximum(step_of(weights, HALF_BITS), SMALLEST_STEP) / 2, 0.0)
        return half, half
