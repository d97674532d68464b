"""The vectors of passages, encoded once for all parts of an evaluation: scores, sparsity and latency need the same."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import scipy.sparse as sp
from sentence_transformers import SparseEncoder

from trainer.encoding.encode import encode
from trainer.system.progress_bar import ProgressReport, in_columns

# Passages whose vectors are remembered: at 400 active dims they take 100 MB. Later ones are encoded again.
MOST = 20_000


class PassageVectors:
    """Encodes passages, remembers their vectors, and measures how fast that is."""

    def __init__(self, model: SparseEncoder, batch_size: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """clock: gives seconds."""
        self.model, self.batch_size, self.clock = model, batch_size, clock
        self.seconds, self.encoded = 0.0, 0
        self._vectors: Any = None  # [remembered texts, dimensions], once there are some
        self._numbers: dict[str, int] = {}  # the row of each text in it

    @property
    def per_second(self) -> float:
        """Passages encoded per second; the first batch is encoded twice, and timed the second time."""
        return self.encoded / self.seconds

    def encode(self, texts: Sequence[str], label: str) -> sp.csr_matrix:
        """[texts, dimensions]. Only texts without a remembered vector go through the network.

        label: stands before the progress. Raises ConfigError for a vector that is not finite.
        """
        vectors, numbers = self._vectors, dict(self._numbers)
        missing = [text for text in dict.fromkeys(texts) if text not in numbers]
        if missing:
            new = self._encode(missing, label)
            vectors = new if vectors is None else sp.vstack([vectors, new], format="csr")
            numbers |= {text: number for number, text in enumerate(missing, len(numbers))}
            self._vectors = vectors[:MOST]
            self._numbers = {text: number for text, number in numbers.items() if number < MOST}
        return vectors[[numbers[text] for text in texts]]

    def _encode(self, texts: list[str], label: str) -> sp.csr_matrix:
        if not self.encoded:  # the first call loads code and caches
            encode(self.model, texts[: self.batch_size], "document", self.batch_size)
        with ProgressReport(desc=in_columns(label, "encoding", 12), total=len(texts), unit="passages") as progress:
            start = self.clock()
            vectors = encode(self.model, texts, "document", self.batch_size, progress)
            self.seconds += self.clock() - start
        self.encoded += len(texts)
        return vectors
