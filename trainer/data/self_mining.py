"""Mining again with the model that is being trained (arXiv 2007.00808): what it takes for an answer now, and is none.

A round changes texts and nothing else: a row keeps its number of negatives, and stays in its batch, so that a run has the
same steps and draws the same rows whatever is found.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from sentence_transformers import SparseEncoder

from trainer.config.schema import MiningConfig
from trainer.data.mining import Search, choose_within, found_in, table_of
from trainer.data.negatives import count_negatives
from trainer.data.roles import negatives_of
from trainer.encoding.encode import encode
from trainer.encoding.inverted_index import InvertedIndex, comparable
from trainer.system.progress_bar import ProgressReport


@dataclass(frozen=True)
class ToMine:
    """A set whose negatives are mined again."""

    settings: MiningConfig
    rows: pa.Table
    """With the negatives of the first mining."""
    is_mined: np.ndarray
    """[rows]: which rows have mined negatives, not given ones."""
    search: Search

    def mine(self, model: SparseEncoder, batch_size: int, progress: ProgressReport) -> pa.Table:
        """MINED rows of the model's, by exact search among the passages of the set."""
        search, settings = self.search, self.settings
        passages = comparable(model, encode(model, search.passages, "document", batch_size, progress))
        queries = comparable(model, encode(model, search.queries, "query", batch_size))
        most = max(map(len, search.positives))
        ranked = InvertedIndex(passages).search(queries, settings.range[1] + most)
        chosen = []
        for query, (best, scores) in enumerate(ranked):
            limit = np.inf
            if settings.margin is not None:
                own = (passages[search.positives[query]] @ queries[query].T).toarray()
                limit = (1 - settings.margin) * float(own.min(initial=np.inf))
            chosen.append((query, *choose_within(best, scores, limit, search, query, settings)))
        return table_of(chosen)

    def with_mined(self, mined: pa.Table) -> tuple[pa.Table, int]:
        """The rows with the negatives of this mining, and how many of them are others than the first mining's.

        A row has as many as it had; where fewer are found, some of the first ones stay.
        """
        found, names = found_in(mined, self.search), negatives_of(self.rows.column_names)
        columns = [self.rows[name].to_pylist() for name in names]
        anchors = self.rows["anchor"].to_pylist()
        changed = 0
        for row, count in enumerate(count_negatives(self.rows).tolist()):
            if not self.is_mined[row]:
                continue
            first = [column[row] for column in columns[:count]]
            new = found.get(anchors[row], [])
            those = [*new, *(text for text in first if text not in new)][:count]
            changed += len(set(those) - set(first))
            for column, text in zip(columns, those, strict=False):
                column[row] = text
        table = self.rows
        for name, column in zip(names, columns, strict=True):
            table = table.set_column(table.column_names.index(name), name, pa.array(column, pa.string()))
        return table, changed
