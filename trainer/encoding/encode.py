"""Texts to sparse rows: sorted by length, through the fused head, and never more dense vectors than those of one batch."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import scipy.sparse as sp
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding
from tokenizers import Tokenizer
from torch import nn

from trainer.config import ConfigError
from trainer.system.progress_bar import ProgressReport


def encode(
    model: SparseEncoder, texts: Sequence[str], route: str, batch_size: int, progress: ProgressReport | None = None
) -> sp.csr_matrix:
    """The vectors that `model.encode_query` or `model.encode_document` gives, [texts, dimensions], float32.

    Raises ConfigError for a vector that is not finite.
    """
    if route == "query" and (static := static_queries(model)) is not None:
        return static(texts)
    encode_route = model.encode_query if route == "query" else model.encode_document
    order = np.argsort([-len(text) for text in texts], kind="stable")
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = [texts[number] for number in order[start : start + batch_size]]
        vectors = encode_route(batch, batch_size=batch_size, convert_to_sparse_tensor=False, show_progress_bar=False)
        rows, dimensions = vectors.nonzero(as_tuple=True)
        values = vectors[rows, dimensions].float().cpu().numpy()
        if not np.isfinite(values).all():
            bad = batch[int(rows[int(np.flatnonzero(~np.isfinite(values))[0])])]
            raise ConfigError(f"the model's vector of this {route} is not finite: '{' '.join(bad.split())[:60]}'")
        place = rows.cpu().numpy(), dimensions.cpu().numpy()
        parts.append(sp.csr_matrix((values, place), shape=tuple(vectors.shape)))
        if progress is not None:
            progress.update(len(batch))
    return sp.vstack(parts, format="csr")[np.argsort(order)]


def document_modules(model: Any) -> list[nn.Module]:
    """The modules that documents go through."""
    return list(model[0].sub_modules["document"] if hasattr(model[0], "sub_modules") else model)


class StaticQueries:
    """The query side of an inference-free model without torch: a tokenizer call, and a look-up of the weights."""

    def __init__(self, embedding: SparseStaticEmbedding) -> None:
        tokenizer = embedding.tokenizer
        # a copy: the library's own sets padding and truncation at every call
        self.tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.longest = tokenizer.model_max_length
        self.weights = embedding.weight.detach().float().cpu().numpy()

    def __call__(self, texts: Sequence[str]) -> sp.csr_matrix:
        """[texts, dimensions]: each token's weight, once."""
        if len(texts) == 1:  # a search: the overhead of threads would be most of the time
            encodings = [self.tokenizer.encode(texts[0], add_special_tokens=False)]
        else:
            encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [sorted(set(encoding.ids[: self.longest])) for encoding in encodings]
        bounds = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum([len(row) for row in rows], out=bounds[1:])
        dimensions = np.array([token for row in rows for token in row], dtype=np.int32)
        matrix = sp.csr_matrix((self.weights[dimensions], dimensions, bounds), shape=(len(rows), len(self.weights)))
        matrix.has_sorted_indices = matrix.has_canonical_format = True
        matrix.eliminate_zeros()
        return matrix


_STATIC: WeakKeyDictionary[SparseStaticEmbedding, tuple[int, StaticQueries]] = WeakKeyDictionary()


def static_queries(model: SparseEncoder) -> StaticQueries | None:
    """The query side that needs no network; None where the model has none, or where queries are more than their tokens."""
    match list(model):
        case [Router(sub_modules=routes)] if "query" in routes and len(routes["query"]) == 1:
            embedding = routes["query"][0]
        case _:
            return None
    if not isinstance(embedding, SparseStaticEmbedding) or model.prompts.get("query") or model.max_active_dims:
        return None
    if not embedding.tokenizer.is_fast or embedding.tokenizer.truncation_side != "right":
        return None
    version, queries = _STATIC.get(embedding, (None, None))
    if version != embedding.weight._version:  # trained or loaded since
        version, queries = embedding.weight._version, StaticQueries(embedding)
        _STATIC[embedding] = version, queries
    return queries
