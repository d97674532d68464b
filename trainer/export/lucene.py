"""Lucene: impact vectors of whole numbers, whose scale is chosen so that rounding changes no top 10."""

import json

from trainer.export.check import Rounding
from trainer.export.formats import Format, json_line
from trainer.export.vectors import Vector, escaped, is_space_or_control, require_distinct


class Lucene(Format):
    """Impact vectors as Anserini and Pyserini read them (JsonVectorCollection, -impact -pretokenized)."""

    # Half a step of the last is 1e-6, less than what float32 tells apart in a score.
    scales = tuple(step * 10**power for power in (2, 3, 4, 5) for step in (1, 2, 5))

    def __init__(self, scale: int | None = None) -> None:
        self.scale = scale or 1  # one is chosen before anything is written
        self.quantisation = f"weights times {self.scale}, rounded to whole numbers"
        self.document_rounding = self.query_rounding = Rounding(step=0.5 / self.scale)
        self.remedy = f'. Quantise less, ARGS="--scale {10 * self.scale}", or leave out the scale to have it chosen'

    def terms(self, tokens: list[str]) -> list[str]:
        """Without whitespace and control characters: the index is made with a whitespace analyzer."""
        return require_distinct([escaped(token, is_space_or_control) for token in tokens])

    def document(self, name: str, text: str, vector: Vector) -> str:
        """id, contents, and whole numbers by term."""
        whole = {term: round(weight * self.scale) for term, weight in vector.items()}
        return json_line({"id": name, "contents": text, "vector": {term: n for term, n in whole.items() if n > 0}})

    def read_document(self, record: str) -> tuple[str, Vector]:
        """Back to the model's scale, so that scores can be compared."""
        row = json.loads(record)
        return row["id"], {term: weight / self.scale for term, weight in row["vector"].items()}
