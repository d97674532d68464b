"""Which window of a long passage a row trains on: the one that shares most with the row's query.

An answer may stand anywhere in a passage. Of NorQuAD's passages, 540 tokens on average, the first 256 hold less than half.
"""

from collections import Counter
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from sentence_transformers import SparseEncoder

from trainer.encoding.windows import Splitter

PASSAGES = ("positive", "negative")


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
        roles = [role for role in PASSAGES if role in table.column_names]
        passages = pc.unique(pa.chunked_array(list(chain.from_iterable(table[role].chunks for role in roles))))
        texts = passages.to_pylist()
        windows = dict(zip(texts, self.splitter.split(texts), strict=True))
        tokens = {window: self._tokens(window) for parts in windows.values() if len(parts) > 1 for window in parts}
        if not tokens:
            return rows
        count = Counter(chain.from_iterable(tokens.values()))
        weights = {token: np.log((len(tokens) + 1) / number) for token, number in count.items()}
        queries = {text: self._tokens(text) for text in pc.unique(table["anchor"]).to_pylist()}

        def best(query: str, passage: str) -> str:
            parts = windows[passage]
            if len(parts) == 1:
                return passage
            return max(parts, key=lambda part: sum(weights[token] for token in queries[query] & tokens[part]))

        anchors = table["anchor"].to_pylist()
        for role in roles:
            chosen = [best(query, text) for query, text in zip(anchors, table[role].to_pylist(), strict=True)]
            table = table.set_column(table.column_names.index(role), role, pa.array(chosen, pa.string()))
        return Dataset(table)

    def _tokens(self, text: str) -> frozenset[int]:
        return frozenset(self.splitter.tokenizer.encode(text, add_special_tokens=False).ids)
