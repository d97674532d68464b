"""The vectors of passages, encoded once for all parts of an evaluation: scores, sparsity and latency need the same."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse as sp
from sentence_transformers import SparseEncoder

from trainer.encoding.encode import encode
from trainer.system.progress_bar import ProgressReport, in_columns

# Passages whose vectors are remembered: at 400 active dims they take 100 MB. Later ones are encoded again.
MOST = 20_000

Row = tuple[np.ndarray, np.ndarray]


class PassageVectors:
    """Encodes passages, remembers their vectors, and measures how fast that is."""

    def __init__(self, model: SparseEncoder, batch_size: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """clock: gives seconds."""
        self.model, self.batch_size, self.clock = model, batch_size, clock
        self.seconds, self.encoded = 0.0, 0
        self._rows: dict[str, Row] = {}
        self._dimensions = 0

    @property
    def per_second(self) -> float:
        """Passages encoded per second; the first batch is encoded twice, and timed the second time."""
        return self.encoded / self.seconds

    def encode(self, texts: Sequence[str], label: str, unit: str = "passages") -> sp.csr_matrix:
        """[texts, dimensions]. Only texts without a remembered vector go through the network.

        label: stands before the progress. Raises ConfigError for a vector that is not finite.
        """
        missing = [text for text in dict.fromkeys(texts) if text not in self._rows]
        rows = (
            self._rows | dict(zip(missing, self._encode(missing, label, unit), strict=True)) if missing else self._rows
        )
        for text in missing[: max(MOST - len(self._rows), 0)]:
            self._rows[text] = rows[text]
        found = [rows[text] for text in texts]
        bounds = np.cumsum([0, *(len(values) for _, values in found)])
        dimensions, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return sp.csr_matrix((values, dimensions, bounds), shape=(len(found), self._dimensions))

    def _encode(self, texts: list[str], label: str, unit: str) -> list[Row]:
        if not self.encoded:  # the first call loads code and caches
            encode(self.model, texts[: self.batch_size], "document", self.batch_size)
        with ProgressReport(desc=in_columns(label, "encoding", 12), total=len(texts), unit=unit) as progress:
            start = self.clock()
            vectors = encode(self.model, texts, "document", self.batch_size, progress)
            self.seconds += self.clock() - start
        self.encoded += len(texts)
        self._dimensions = vectors.shape[1]
        bounds = zip(vectors.indptr[:-1], vectors.indptr[1:], strict=True)
        return [(vectors.indices[start:end], vectors.data[start:end]) for start, end in bounds]
