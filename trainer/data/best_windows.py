"""Which window of a long passage a row trains on: the one that shares most with the row's query.

An answer may stand anywhere in a passage. Of NorQuAD's passages, 540 tokens on average, the first 256 hold less than half.
"""

from collections.abc import Iterable
from itertools import chain
from math import fsum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from sentence_transformers import SparseEncoder

from trainer.data.roles import passages_of
from trainer.encoding.windows import TEXTS_PER_CALL, Splitter


class BestWindows:
    """Puts the best window of each long passage in the place of the passage."""

    def __init__(self, model: SparseEncoder) -> None:
        self.splitter = Splitter(model)

    def rows(self, rows: Dataset) -> Dataset:
        """The same rows, with a window for every passage that is longer than the model reads.

        A window scores the sum of ln((windows + 1) / n) over the tokens that it shares with the query; n of all windows of
        these rows have the token. The first of the best ones is taken.
        """
        table = rows.with_format("arrow")[:]
        roles = passages_of(table.column_names)
        passages = pc.unique(pa.chunked_array(list(chain.from_iterable(table[role].chunks for role in roles))))
        texts = passages.to_pylist()
        split = zip(texts, self.splitter.split(texts), strict=True)
        windows = {text: parts for text, parts in split if len(parts) > 1}
        if not windows:
            return rows
        tokens = self._tokens(dict.fromkeys(chain.from_iterable(windows.values())))
        count = np.bincount(np.concatenate(list(tokens.values())))
        weights = np.log((len(tokens) + 1) / np.maximum(count, 1))
        queries = self._tokens(pc.unique(table["anchor"]).to_pylist())

        def best(query: str, passage: str) -> str:
            parts = windows.get(passage)
            if parts is None:
                return passage
            asked = queries[query]
            return max(parts, key=lambda part: fsum(weights[np.intersect1d(asked, tokens[part], assume_unique=True)]))

        anchors = table["anchor"].to_pylist()
        for role in roles:
            chosen = [best(query, text) for query, text in zip(anchors, table[role].to_pylist(), strict=True)]
            table = table.set_column(table.column_names.index(role), role, pa.array(chosen, pa.string()))
        return Dataset(table)

    def _tokens(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """The different tokens of each text. 150 take 0.7 kB; in a set they took 12, and each process holds all windows."""
        found: dict[str, np.ndarray] = {}
        texts = list(texts)
        for start in range(0, len(texts), TEXTS_PER_CALL):
            part = texts[start : start + TEXTS_PER_CALL]
            encodings = self.splitter.tokenizer.encode_batch_fast(part, add_special_tokens=False)
            found |= {text: np.unique(np.array(each.ids, np.int32)) for text, each in zip(part, encodings, strict=True)}
        return found
