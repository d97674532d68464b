"""In what pieces the texts of a batch go through the network: passages of about one length, of whichever column."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.config import Config
from trainer.data.buckets import bucket_lengths, next_length

# Texts on a GPU are padded to a multiple of so many tokens: at most 32 lengths up to 512, and 2 % more padding at 300.
GPU_LENGTHS = 16
# Positions from which on a pass is long enough on a CPU. A step of 16 triplets, 12 layers, width 192, takes 8 % less time
# than with all passages in one pass where texts are cut at 256 tokens, and 17 % less at 512 tokens; with half or twice as
# many positions, 5 and 6 % less. On a GPU each pass costs the CPU time, which it may not have.
CPU_POSITIONS = 1024


@dataclass(frozen=True)
class ForwardPasses:
    """How a batch is cut into passes through the network."""

    lengths: Sequence[int] | None = None  # ascending; texts are padded to the next of them. None: to the longest text
    shared: bool = False  # positives and negatives share passes, sorted by length; otherwise each column is a pass
    positions: int | None = None  # a shared pass that fills so many is full. None: all passages are one pass

    def split(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Numbers of the texts of each shared pass, the longest texts first. lengths: [texts], in tokens."""
        if self.positions is None:
            return [np.arange(len(lengths))]
        longest_first = np.argsort(-lengths, kind="stable")
        passes, start = [], 0
        while start < len(lengths):
            end = start - int(-self.positions // max(1, lengths[longest_first[start]]))
            passes.append(longest_first[start:end])
            start = end
        return passes


def forward_passes_of(config: Config, device: str) -> ForwardPasses:
    """How training with this config cuts batches into passes on this kind of device.

    CSR's loss looks at positives and negatives apart, and GradCache makes passes of its own (loss.mini_batch_size).
    """
    by_length = device == "cpu" and not config.training.torch_compile
    return ForwardPasses(
        lengths=_lengths(config, device),
        shared=config.loss.has_regularizers and not config.loss.cached,
        positions=CPU_POSITIONS if by_length else None,
    )


def _lengths(config: Config, device: str) -> list[int] | None:
    longest = config.training.max_seq_length
    if config.model.packs_texts:  # and not padded
        return None
    if config.training.torch_compile:
        return bucket_lengths(longest)
    if device == "cuda":
        # attention builds a plan for every new shape, which takes 0.1 s of CPU time (28 layers share it, H100)
        return [*range(GPU_LENGTHS, longest, GPU_LENGTHS), longest]
    return None


def padding(
    batches: Sequence[np.ndarray], lengths: np.ndarray, passages: int, passes: ForwardPasses, processes: int = 1
) -> tuple[int, int]:
    """Tokens, and positions computed for them, when each process pads the passes of its part of a batch.

    lengths: [rows, columns] tokens of each text that goes through the network. passages: how many of the columns, the last
    ones, hold passages.
    """
    tokens = positions = 0
    for part in (part for batch in batches for part in np.split(batch, processes)):
        columns = list(lengths[part].T)
        if passes.shared:
            pool = np.concatenate(columns[-passages:])
            columns[-passages:] = [pool[texts] for texts in passes.split(pool)]
        tokens += int(sum(column.sum() for column in columns))
        positions += int(sum(len(column) * next_length(column.max(), passes.lengths) for column in columns))
    return tokens, positions
