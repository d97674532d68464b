"""The vectors of CSR's frozen dense model: each different text goes through it once, and a step reads the vectors.

The vectors do not change while the autoencoder on top of them is trained (arXiv 2503.01776).
"""

import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder, Transformer
from sentence_transformers.util import batch_to_device
from torch import nn

from trainer.config import Config
from trainer.data.forward_passes import ForwardPasses
from trainer.data.token_file import TokenFile
from trainer.data.tokens import VECTOR, Column, Features, Packing, Padding, TokenRows
from trainer.data.training_data import TrainingData
from trainer.hub.cache import cached_vectors, digest, folder_of
from trainer.system.distributed import processes
from trainer.system.progress_bar import ProgressReport, in_columns

# Texts whose vectors are one file. A run that is killed encodes so many again.
TEXTS_PER_FILE = 500
# Positions of one pass through the network, on a CPU and elsewhere: its weights are read once for so many.
POSITIONS = {"cpu": 2_048}
MANY_POSITIONS = 16_384
# Stands between the ids of two texts: no id is -1.
END = np.int32(-1).tobytes()


def texts_to_encode(config: Config, data: TrainingData) -> tuple[int, int]:
    """How many different texts training reads, and how many go through the model in all steps together.

    Both are 0 where the dense model is trained too, and where several processes train: one would encode alone, and the
    others wait longer than they may. data: with the rows that the run will have drawn.
    """
    if not config.model.has_frozen_base or data.unreachable or processes() > 1:
        return 0, 0
    different = sum(len(np.unique(data.text_ids(subset))) for subset in data.train)
    drawn = 0.0
    for name, subsets in data.subsets.items():
        texts = sum(data.text_ids(subset).size for subset in subsets)
        drawn += texts * data.summaries[name].rows_drawn / data.summaries[name].rows
    return different, round(drawn)


def pays(different: int, drawn: int) -> bool:
    """Whether encoding each different text once is less work than encoding those of every step."""
    return different < drawn


@dataclass
class DenseVectors:
    """Encodes texts with the frozen modules of a CSR model. Vectors are kept in the cache, by weights and token ids."""

    model: SparseEncoder
    precision: torch.dtype | None
    """Of autocast, as in training; None without."""
    bytes: int = 0
    """Of all vectors so far."""

    def __post_init__(self) -> None:
        self.modules = [module for module in self.model.children() if not isinstance(module, SparseAutoEncoder)]
        self.identity = _identity(self.modules, self.precision, self.model.device)
        self.made: dict[TokenFile, np.ndarray] = {}  # several columns may share a file

    def add_to(self, name: str, tokens: TokenRows) -> TokenRows:
        """The rows with the vectors of their texts. Raises ConfigError when the cache cannot be written."""
        for column in tokens.columns:
            if column.file not in self.made:
                self.made[column.file] = self._vectors(name, column)
        columns = [replace(column, vectors=self.made[column.file]) for column in tokens.columns]
        return replace(tokens, columns=columns)

    def _vectors(self, name: str, column: Column) -> np.ndarray:
        """Vectors of all texts of the column's file, [texts, width]; texts of about one length go through together."""
        file, layout = column.file, column.layout
        longest_first = np.argsort(-file.lengths(), kind="stable")
        ids = hashlib.blake2b(digest_size=16)
        for number in longest_first.tolist():
            ids.update(file[number].astype(np.int32).tobytes() + END)

        def encode(numbers: list[int]) -> np.ndarray:
            return np.concatenate([*self._encode([file[number] for number in numbers], layout)])

        folder = folder_of(
            "dense", digest(self.identity, f"{type(layout).__name__} {layout.constants}", ids.hexdigest())
        )
        with ProgressReport(desc=in_columns("vectors", name), total=len(file), unit="texts") as progress:
            in_order = cached_vectors(folder, longest_first.tolist(), TEXTS_PER_FILE, encode, progress)
        vectors = np.empty_like(in_order)
        vectors[longest_first] = in_order
        self.bytes += vectors.nbytes
        return vectors

    @torch.inference_mode()
    def _encode(self, texts: list[np.ndarray], layout: Padding | Packing) -> Iterator[np.ndarray]:
        """Vectors of these texts, the longest of which come first, pass by pass."""
        device = self.model.device
        positions = POSITIONS.get(device.type, MANY_POSITIONS)
        autocast = torch.autocast(device.type, self.precision, enabled=self.precision is not None)
        training = self.model.training
        self.model.eval()
        try:
            for places in ForwardPasses(positions=positions).split(np.array([*map(len, texts)])):
                features: Features = batch_to_device(layout.features([texts[place] for place in places]), device)
                with autocast:
                    for module in self.modules:
                        features = module(features)
                yield features[VECTOR].float().cpu().numpy()
        finally:
            self.model.train(training)


def let_vectors_pass(model: SparseEncoder) -> None:
    """Have the frozen modules hand on features that are a vector already. In memory only."""
    for module in model.children():
        if not isinstance(module, SparseAutoEncoder):
            vars(module)["forward"] = _Passing(module)


class _Passing:
    """A module's `forward`, for features without token ids too."""

    def __init__(self, module: nn.Module) -> None:
        self.forward = module.forward

    def __call__(self, features: Features, **options: Any) -> Features:
        return features if "input_ids" not in features else self.forward(features, **options)


def _identity(modules: list[nn.Module], precision: torch.dtype | None, device: torch.device) -> str:
    """What the vectors of token ids depend on: weights, settings, code, libraries, and how numbers are rounded."""
    versions = [version(name) for name in ("sentence-transformers", "transformers", "torch")]
    settings = f"{modules} {precision} {device.type} {versions} {TEXTS_PER_FILE}"
    hasher = hashlib.blake2b(settings.encode(), digest_size=16)
    for module in modules:
        if isinstance(module, Transformer):
            config = module.model.config
            attention = config._attn_implementation
            hasher.update(json.dumps([config.to_dict() | {"_name_or_path": ""}, attention], default=str).encode())
            hasher.update(Path(inspect.getfile(type(module.model))).read_bytes())
        for name, tensor in module.state_dict().items():
            hasher.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
