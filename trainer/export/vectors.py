"""Sparse vectors as engines want them: named dimensions with positive weights."""

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from trainer.config import ConfigError
from trainer.encoding.encode import encode
from trainer.encoding.fuse import fuse
from trainer.encoding.inverted_index import comparable
from trainer.encoding.stock import carries_code, open_model
from trainer.encoding.vocabulary import dims_are_words
from trainer.encoding.windows import read_in_windows
from trainer.system.progress_bar import ProgressReport

Vector = dict[str, float]


@dataclass(frozen=True)
class Encoder:
    """A trained model, and what its dimensions are called in an engine."""

    model: Any
    terms: list[str]
    batch_size: int

    @classmethod
    def open(cls, folder: Path, device: str, batch_size: int, *, in_windows: bool = False) -> "Encoder":
        """The model of a run, its dimensions under their tokens. in_windows: long documents are not cut."""
        model = open_model(folder, carries_code(folder), device)
        fuse(model)
        if in_windows:
            read_in_windows(model)
        return cls(model, terms_of(model), batch_size)

    def documents(self, texts: list[str], progress: ProgressReport | None = None) -> sp.csr_matrix:
        """[documents, dimensions]."""
        return self._encode("document", texts, progress)

    def queries(self, texts: list[str]) -> sp.csr_matrix:
        """[queries, dimensions]. A trained query weight may be negative."""
        return self._encode("query", texts)

    def _encode(self, route: str, texts: list[str], progress: ProgressReport | None = None) -> sp.csr_matrix:
        if not texts:
            return sp.csr_matrix((0, len(self.terms)))
        matrix = encode(self.model, texts, route, self.batch_size, progress)
        return comparable(self.model, matrix)  # engines multiply and add: for cosine (CSR), lengths are 1 already


def terms_of(model: Any) -> list[str]:
    """A name for every dimension: its token, or its number where dimensions are not words (CSR)."""
    if dims_are_words(model):
        return model.tokenizer.convert_ids_to_tokens(list(range(len(model.tokenizer))))
    return [str(number) for number in range(model.get_embedding_dimension())]


def escaped(term: str, forbidden: Callable[[str], bool]) -> str:
    """A term whose forbidden characters, and `%`, are each `%`, their number in hexadecimal and `;`: none become one."""
    return "".join(f"%{ord(c):X};" if c == "%" or forbidden(c) else c for c in term) or "%;"


def is_space_or_control(character: str) -> bool:
    """What cuts a text into words, or is not seen."""
    return character.isspace() or unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp")


def require_distinct(terms: list[str]) -> list[str]:
    """Raise ConfigError when two dimensions would share a name, and so be added up."""
    seen: dict[str, int] = {}
    for dimension, term in enumerate(terms):
        if seen.setdefault(term, dimension) != dimension:
            raise ConfigError(f"dimensions {seen[term]} and {dimension} have one name in this engine, '{term}'")
    return terms


def vectors_of(rows: sp.csr_matrix, terms: list[str], signed: bool = False) -> Iterator[Vector]:
    """The weights of each row by term, heaviest first; those below 0 only if `signed`: few engines take them."""
    for start, end in zip(rows.indptr, rows.indptr[1:], strict=False):
        weights, dimensions = rows.data[start:end], rows.indices[start:end]
        order = np.argsort(-weights, kind="stable")
        yield {terms[dimensions[i]]: float(weights[i]) for i in order if signed or weights[i] > 0}


def nine_digits(vector: Vector) -> Vector:
    """Weights as text has them: nine digits name every float32."""
    return {term: float(f"{weight:.9g}") for term, weight in vector.items()}


def matrix_of(vectors: list[Vector], terms: list[str]) -> sp.csr_matrix:
    """The rows that vectors came from."""
    number = {term: dimension for dimension, term in enumerate(terms)}
    rows = [row for row, vector in enumerate(vectors) for _ in vector]
    try:
        columns = [number[term] for vector in vectors for term in vector]
    except KeyError as error:
        raise ConfigError(f"the export holds a term that is no dimension of the model: {error}") from None
    values = [value for vector in vectors for value in vector.values()]
    return sp.csr_matrix((values, (rows, columns)), shape=(len(vectors), len(terms)))
