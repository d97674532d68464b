"""The kinds of models that teach: how each scores pairs of a query and a passage, and which give each text a vector."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp

from trainer.config import ConfigError
from trainer.config.schema import ModelConfig, TeacherModel
from trainer.data import mining
from trainer.encoding.encode import encode
from trainer.encoding.fuse import fuse
from trainer.encoding.inverted_index import comparable
from trainer.hub.cache import digest, identity
from trainer.hub.download import Snapshot, fetch
from trainer.models.prompts import prompts_of, quoted
from trainer.models.weights import loading

Pair = tuple[str, str]
Score = Callable[[list[Pair]], np.ndarray]
Encode = Callable[[list[str], str], Any]  # texts of a side, "query" or "document": [texts, width], dense or sparse


class TeacherFiles:
    """A teacher that is a model, and its files."""

    def __init__(self, key: str, teacher: TeacherModel, base: ModelConfig | None) -> None:
        """key: of the config, that names the teacher. base: the config's model, whose prompts a teacher has that is the
        base model. Raises ConfigError when the files cannot be had."""
        assert teacher.model is not None  # the config's checks
        self.key, self.teacher = f"{key}.model", teacher
        self.snapshot: Snapshot = fetch(teacher.model, teacher.revision, kind="model", why="the teacher", key=self.key)
        # a cross-encoder reads nothing in front of its texts, and a sparse model has what it was saved with
        is_dense = teacher.kind == "dense"
        self.prompts = prompts_of(teacher.model, self.snapshot.folder, base) if is_dense else {}
        if teacher.prompts:
            self.prompts |= teacher.prompts.model_dump(exclude_none=True)

    @property
    def digest(self) -> str:
        """What its scores and vectors are kept under."""
        prompts = quoted(self.prompts)
        return digest(identity(self.snapshot), self.teacher.kind, *([prompts] if prompts else []))

    def load_encoder(self, device: str) -> tuple[Encode, Any]:
        """How it encodes texts, so that dot products are its scores, and the module that all of them go through."""
        return self._dense(device) if self.teacher.kind == "dense" else self._sparse(device)

    def load_cross_encoder(self, device: str) -> tuple[Score, Any]:
        """How it scores pairs, by logits (arXiv 1901.04085), and the module that all of its texts go through."""
        from sentence_transformers import CrossEncoder
        from torch import nn

        with loading(self.key, self.snapshot.source, " as a cross-encoder"):
            model = CrossEncoder(str(self.snapshot.folder), device=device)
        if model.num_labels != 1:
            raise ConfigError(
                f"{self.key}: {self.teacher.model} gives {model.num_labels} numbers per pair; a teacher gives one score"
            )
        logits = nn.Identity()  # the library's default squeezes them into 0..1, where all margins are alike
        options = {"batch_size": self.teacher.batch_size, "activation_fn": logits, "show_progress_bar": False}
        return partial(model.predict, **options), model[0]

    def _dense(self, device: str) -> tuple[Encode, Any]:
        """A sentence encoder; each text behind its prompt."""
        model = mining.load_dense(self.snapshot, self.key, self.prompts, device)
        self._require_dot_products(model)
        unit = model.similarity_fn_name == "cosine"

        def encode_side(texts: list[str], side: str) -> np.ndarray:
            encode_texts = model.encode_query if side == "query" else model.encode_document
            options = {"batch_size": self.teacher.batch_size, "show_progress_bar": False}
            return encode_texts(texts, normalize_embeddings=unit, **options).astype(np.float32)

        return encode_side, model[0]

    def _sparse(self, device: str) -> tuple[Encode, Any]:
        """A sparse encoder, with the prompts that it was saved with."""
        from sentence_transformers import SparseEncoder

        with loading(self.key, self.snapshot.source, " as a sparse model"):
            model = SparseEncoder(str(self.snapshot.folder), device=device)
        self._require_dot_products(model)
        fuse(model, device)

        def encode_side(texts: list[str], side: str) -> sp.csr_matrix:
            return comparable(model, encode(model, texts, side, self.teacher.batch_size))

        return encode_side, model[0]

    def _require_dot_products(self, model: Any) -> None:
        if (name := model.similarity_fn_name) not in ("cosine", "dot"):
            raise ConfigError(
                f"{self.key}: {self.teacher.model} compares by {name}; a teacher by cosine or dot product"
            )


def record_of(teacher: TeacherModel, files: TeacherFiles | None) -> dict[str, Any]:
    """What run.json holds of a teacher. files: None for one that is no model."""
    model = {"model": teacher.model, "identity": identity(files.snapshot)} if files else {}
    return {**model, "kind": teacher.kind}


def row_products(queries: Any, passages: Any) -> np.ndarray:
    """[rows]: the dot product of each row with the other's, dense or sparse."""
    if sp.issparse(queries):
        return np.asarray(queries.multiply(passages).sum(axis=1)).ravel()
    return (queries * passages).sum(axis=1)
