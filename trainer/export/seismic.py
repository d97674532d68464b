"""Seismic: documents as its index is built from them, for learned sparse vectors in memory."""

import json

import numpy as np

from trainer.export.check import Rounding
from trainer.export.formats import Format, json_line
from trainer.export.vectors import Vector, nine_digits, require_distinct

# It compares words as arrays of this many characters (get_seismic_string).
MAX_TERM = 100


class Seismic(Format):
    """id, content, and weights by term; queries in the same form."""

    engine_rounds = True
    # to the nearest: half of the last bit, which is worth 2^-24 among the smallest weights
    document_rounding = Rounding(share=2.0**-11, step=2.0**-25)
    quantisation = "the index keeps 11 significant bits of a document's weight, to the nearest (float16)"

    def terms(self, tokens: list[str]) -> list[str]:
        """The tokens, and a number for what is longer than it compares."""
        return require_distinct([t if len(t) <= MAX_TERM else f"%{number};" for number, t in enumerate(tokens)])

    def document(self, name: str, text: str, vector: Vector) -> str:
        """A line."""
        return json_line({"id": name, "content": text, "vector": nine_digits(vector)})

    def read_document(self, record: str) -> tuple[str, Vector]:
        """With the bits that the index keeps."""
        row = json.loads(record)
        return row["id"], {term: float(np.float16(weight)) for term, weight in row["vector"].items()}

    def read_query(self, record: str) -> Vector:
        """As it is."""
        return json.loads(record)["vector"]
