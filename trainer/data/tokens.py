"""Texts as token ids: every different text is tokenised once, by the model itself, and padded when its batch is drawn.

The features of a batch equal those of the library's own data collator, which tokenises at every step.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding
from torch import nn

from trainer.config import ConfigError, one_line
from trainer.data.buckets import next_length
from trainer.data.forward_passes import ForwardPasses
from trainer.data.further_queries import FurtherQueries
from trainer.data.roles import LABEL, roles_of, side_of
from trainer.data.rows import fingerprint
from trainer.data.teacher_scores import BatchScores
from trainer.data.token_file import TEXTS_PER_PART, TokenFile
from trainer.hub.cache import folder_of
from trainer.system.progress_bar import ProgressReport, in_columns

Features = dict[str, Any]
Preprocess = Callable[[list[str]], Features]

# Texts per call of the tokenizer, which works on them in parallel.
TEXTS_PER_CALL = 1_000
# Ids of so many different texts are stored on disk; fewer are tokenised in a second or two.
MIN_TEXTS_ON_DISK = 10_000
# The feature of a shared pass that says which of the batch's passages, counted column by column, its texts are.
PLACE = "place"
# The feature that is a text's vector, as the library's modules call it.
VECTOR = "sentence_embedding"
BY_COLUMN = ForwardPasses()
# Rows of each set whose features are compared with the library's.
CHECKED_ROWS = 8


def input_module(model: SparseEncoder, task: str | None) -> nn.Module:
    """The module that tokenises the texts of a task, "query" or "document"; None where one route serves both."""
    first = model[0]
    return first.sub_modules[task][0] if isinstance(first, Router) else first


def static_routes(model: SparseEncoder) -> set[str]:
    """The tasks whose texts are looked up in a table: each position of other texts costs time, padding too."""
    routes = model[0].sub_modules if isinstance(model[0], Router) else {}
    return {task for task, modules in routes.items() if isinstance(modules[0], SparseStaticEmbedding)}


# ------------------------------------------------------------------------------------------- tokenising
def unpadded(features: Features) -> Iterator[np.ndarray]:
    """The token ids of each text of a padded or packed batch."""
    if "cu_seq_lens_q" in features:
        yield from np.split(features["input_ids"][0].numpy(), features["cu_seq_lens_q"][1:-1].numpy())
        return
    masks = features["attention_mask"].numpy().astype(bool)
    for ids, mask in zip(features["input_ids"].numpy(), masks, strict=True):
        yield ids[mask]


def tokenised(
    texts: pa.ChunkedArray, preprocess: Preprocess, ids_type: pa.DataType, progress: ProgressReport
) -> Iterator[pa.Array]:
    """Token ids of the texts, in parts as TokenFile holds them. Texts of one call are of about the same length."""
    for first in range(0, len(texts), TEXTS_PER_PART):
        part = texts[first : first + TEXTS_PER_PART].to_pylist()
        ids = [np.zeros(0, dtype=int)] * len(part)
        by_size = sorted(range(len(part)), key=lambda number: len(part[number]))
        for call in range(0, len(part), TEXTS_PER_CALL):
            numbers = by_size[call : call + TEXTS_PER_CALL]
            features = preprocess([part[number] for number in numbers])
            for number, text_ids in zip(numbers, unpadded(features), strict=True):
                ids[number] = text_ids
            progress.update(len(numbers))
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
        yield pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(ids), ids_type))


def key_of(module: nn.Module, task: str | None, content: str, prompt: str | None = None) -> str:
    """A hash of what token ids depend on: texts, prompt, tokenizer with its settings, versions of the libraries."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        module.tokenizer.save_pretrained(folder)
        files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    if "tokenizer.json" in files:
        # tokenizer_config.json repeats it, with details that differ between a base model and its checkpoint;
        # padding and truncation are those of the last call
        del files["tokenizer_config.json"]
        backend = json.loads(files["tokenizer.json"]) | {"padding": None, "truncation": None}
        files["tokenizer.json"] = json.dumps(backend, sort_keys=True).encode()
    for name, content_of in files.items():
        digest.update(f"\x1d{name}\x1e".encode() + content_of)
    settings = {
        "content": content,
        "task": task,
        "prompt": prompt,
        "module": [type(module).__name__, module.get_config_dict(), module.max_seq_length],
        "cut": module.tokenizer.truncation_side,
        "versions": [version(name) for name in ("sentence-transformers", "transformers", "tokenizers")],
        "texts in a part": TEXTS_PER_PART,
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------- features
@dataclass(frozen=True)
class Padding:
    """How token ids become the features that the model's own `preprocess` gives."""

    names: tuple[str, ...]  # of the tensors
    constants: Features  # what does not depend on the text: task, modality
    token: int
    token_type: int
    left: bool

    def features(self, texts: Sequence[np.ndarray], shapes: Sequence[int] | None = None) -> Features:
        """Tensors [texts, length] of the ids of several texts, shorter ones padded.

        shapes: ascending lengths; the texts are padded to the next of them, not to the longest text.
        """
        longest = next_length(max(map(len, texts)), shapes)
        ids = np.full((len(texts), longest), self.token, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            place = slice(longest - len(text), longest) if self.left else slice(0, len(text))
            ids[row, place], mask[row, place] = text, 1
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.where(mask, 0, self.token_type)}
        return {name: torch.from_numpy(arrays[name]) for name in self.names if name in arrays} | self.constants


@dataclass(frozen=True)
class Packing:
    """How token ids become packed features: all texts one after the other, for attention that is told where each begins."""

    collate: Callable[[list[Features]], Features]  # transformers' DataCollatorWithFlattening
    first_position: int
    constants: Features

    def features(self, texts: Sequence[np.ndarray], shapes: Sequence[int] | None = None) -> Features:
        """Tensors [1, tokens of all texts]; `shapes` mean nothing where nothing is padded."""
        packed = dict(self.collate([{"input_ids": text.tolist()} for text in texts]))
        del packed["labels"]
        packed["position_ids"] = packed["position_ids"] + self.first_position
        return self.constants | packed


def layout_of(module: nn.Module, features: Features) -> Padding | Packing:
    """How this module reads texts. features: what its `preprocess` gave for one text."""
    if "cu_seq_lens_q" in features:
        return Packing(module.data_collator, module._flatten_position_offset, features)
    names = tuple(name for name, value in features.items() if torch.is_tensor(value))
    constants = {name: value for name, value in features.items() if name not in names}
    tokenizer = module.tokenizer
    left = tokenizer.padding_side == "left"
    return Padding(names, constants, tokenizer.pad_token_id, tokenizer.pad_token_type_id, left)


@dataclass(frozen=True)
class Column:
    """One column of a set of rows."""

    name: str
    file: TokenFile
    numbers: np.ndarray  # [rows]: which of the file's texts a row has
    layout: Padding | Packing
    is_network: bool  # not looked up in a table of static weights
    vectors: np.ndarray | None = None  # [texts of the file, width]: a frozen dense model's, where it has encoded them

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The token ids of these rows."""
        return [self.file[number] for number in self.numbers[rows].tolist()]

    def features(self, rows: Sequence[int] | np.ndarray, shapes: Sequence[int] | None = None) -> Features:
        """The features of these rows, or their vectors, [rows, width]."""
        if self.vectors is not None:
            return {VECTOR: torch.from_numpy(self.vectors[self.numbers[rows]])}
        return self.layout.features(self.texts(rows), shapes)


@dataclass(frozen=True)
class TokenRows:
    """A set of rows as token ids."""

    columns: list[Column]
    labels: np.ndarray | None = None  # [rows, passages]: teachers' scores, NaN in a row that has none
    batch_scores: BatchScores | None = None  # instead of labels: of all queries and passages of a batch
    further: FurtherQueries | None = None  # None: every passage has its row's query alone

    def __len__(self) -> int:
        return len(self.columns[0].numbers)

    @property
    def passages(self) -> int:
        """How many columns hold passages: the positive, and the negatives if there are any."""
        return len(self.columns) - 1

    def passage_numbers(self) -> np.ndarray:
        """[rows, passages]: numbers of the passages as they are read, the same for equal texts."""
        return np.stack([column.numbers for column in self.columns[1:]], axis=1)

    def lengths(self) -> np.ndarray:
        """Tokens of each text that goes through the network, [rows, columns]."""
        return np.stack([column.file.lengths()[column.numbers] for column in self.columns if column.is_network], axis=1)

    def longest_passages(self) -> np.ndarray:
        """Tokens of each row's longest passage, [rows]."""
        return self.lengths()[:, -self.passages :].max(1)

    def features(self, rows: Sequence[int], passes: ForwardPasses = BY_COLUMN) -> Features:
        """The features of these rows, named as the library's data collator names them; a shared pass by its number."""
        queries, *passages = self.columns
        asking, shared = self.further.features(np.asarray(rows)) if self.further else (rows, {})
        batch = _named(queries.name, queries.features(asking, passes.lengths) | shared)
        for column in [] if passes.shared else passages:
            batch |= _named(column.name, column.features(rows, passes.lengths))
        if passes.shared:
            texts = [text for column in passages for text in column.texts(rows)]
            for number, places in enumerate(passes.split(np.array([*map(len, texts)]))):
                features = passages[0].layout.features([texts[place] for place in places], passes.lengths)
                batch |= _named(f"pass-{number}", features | {PLACE: torch.from_numpy(places)})
        if self.batch_scores is not None:
            batch[LABEL] = torch.from_numpy(self.batch_scores.of(np.asarray(asking), np.asarray(rows)))
        elif self.labels is not None:
            batch[LABEL] = torch.from_numpy(self.labels[rows])
        return batch


def _named(prefix: str, features: Features) -> Features:
    return {f"{prefix}_{name}": value for name, value in features.items()}


class TokenCollator:
    """Makes the features of a batch from its row numbers, counted through several sets. A batch is of one set."""

    def __init__(self, sets: Sequence[TokenRows], passes: ForwardPasses = BY_COLUMN) -> None:
        self.sets, self.passes = sets, passes
        self.ends = np.cumsum([len(rows) for rows in sets])

    def __call__(self, rows: list[int]) -> Features:
        """The features of these rows."""
        number = int(np.searchsorted(self.ends, rows[0], side="right"))
        token_rows = self.sets[number]
        return token_rows.features(np.asarray(rows) - (self.ends[number] - len(token_rows)), self.passes)


# ------------------------------------------------------------------------------------------- of a set of rows
class Tokeniser:
    """Makes TokenRows for one model, and counts texts, tokens, bytes and seconds."""

    def __init__(
        self, model: SparseEncoder, routes: dict[str, str], echo: Callable[[str], None], *, keep: bool = True
    ) -> None:
        """routes: the task of queries and of documents; none where one route serves both. keep: store the ids of large
        sets on disk."""
        self.model, self.routes, self.echo, self.keep = model, routes, echo, keep
        self.texts = self.tokens = self.texts_found = self.bytes = 0
        self.seconds = 0.0

    def rows(self, name: str, dataset: Dataset, ids: np.ndarray, content: str | None = None) -> TokenRows:
        """The token ids of a set of rows. ids: what text_ids gives for it. content: a hash of its texts;
        None: it is computed where ids are stored.

        Raises ConfigError when the model reads something else than token ids, or the ids cannot be written to disk.
        """
        start = time.perf_counter()
        columns: dict[str, Column] = {}
        roles = roles_of(dataset.column_names)
        for task, prompt in dict.fromkeys(map(self._read_as, roles)):
            places = [place for place, role in enumerate(roles) if self._read_as(role) == (task, prompt)]
            used, first, numbers = np.unique(ids[:, places], return_index=True, return_inverse=True)
            numbers = numbers.reshape(len(ids), len(places)).astype(np.int32)
            module, preprocess = input_module(self.model, task), self._preprocess(task, prompt)
            texts = partial(_take, dataset, [roles[place] for place in places], first)
            path = None
            if self.keep and len(used) >= MIN_TEXTS_ON_DISK:
                content = content or fingerprint(dataset.select_columns(roles).with_format("arrow")[:])
                key = key_of(module, task, f"{content}/{name}/{places}", prompt)
                path = folder_of("tokens") / f"{name}_{key[:16]}.arrow"
            file = self._stored(path) or self._tokenised(name, texts(), module, preprocess, path)
            self.texts += len(used)
            self.tokens += int(file.lengths().sum())
            self.bytes += path.stat().st_size if path else 0
            layout = layout_of(module, preprocess([dataset[0][roles[places[0]]]]))
            is_network = task not in static_routes(self.model)
            for place, column in zip(places, numbers.T, strict=True):
                columns[roles[place]] = Column(roles[place], file, np.ascontiguousarray(column), layout, is_network)
        token_rows = TokenRows([columns[role] for role in roles], _labels(dataset, len(roles) - 1))
        self._check(name, dataset, token_rows)
        self.seconds += time.perf_counter() - start
        return token_rows

    def _read_as(self, role: str) -> tuple[str | None, str | None]:
        """The task of a column, and the prompt in front of its texts."""
        return self.routes.get(side_of(role)), self.model.prompts.get(side_of(role)) or None

    def _preprocess(self, task: str | None, prompt: str | None) -> Preprocess:
        return partial(self.model.preprocess, prompt=prompt, task=task)

    def _stored(self, path: Path | None) -> TokenFile | None:
        """The file that an earlier run wrote, if it is there and as it was written."""
        if path is None or not path.exists():
            return None
        try:
            file = TokenFile.open(path)
        except (OSError, pa.ArrowException) as error:
            self.echo(f"tokens    {path} is damaged, and is made anew: {one_line(error)}")
            return None
        self.texts_found += len(file)
        return file

    def _tokenised(
        self, name: str, texts: pa.ChunkedArray, module: nn.Module, preprocess: Preprocess, path: Path | None
    ) -> TokenFile:
        ids_type = pa.uint16() if len(module.tokenizer) <= 2**16 else pa.int32()
        with ProgressReport(desc=in_columns("tokens", name), total=len(texts), unit="texts") as progress:
            parts = tokenised(texts, preprocess, ids_type, progress)
            if path is None:
                return TokenFile(pa.table({"ids": pa.chunked_array(list(parts), pa.list_(ids_type))}))
            try:
                return TokenFile.write(path, ids_type, parts)
            except OSError as error:
                raise ConfigError(f"token ids cannot be written to {path.parent}: {error}. Set HF_HOME") from None

    def _check(self, name: str, dataset: Dataset, token_rows: TokenRows) -> None:
        """Compare the features of a few rows with those that the library makes of their texts. Raises ConfigError."""
        rows = list(range(min(len(dataset), CHECKED_ROWS)))
        ours, texts = token_rows.features(rows), dataset[rows]
        for column in token_rows.columns:
            for key, theirs in self._preprocess(*self._read_as(column.name))(texts[column.name]).items():
                if not np.array_equal(ours.get(f"{column.name}_{key}", ()), theirs):
                    raise ConfigError(
                        f"model.base_model: its '{key}' of the {column.name} in {name} is not token ids padded at one end, "
                        "which is all that is read here"
                    )


def _labels(dataset: Dataset, passages: int) -> np.ndarray | None:
    """[rows, passages] teachers' scores; NaN where a row has none."""
    if LABEL not in dataset.column_names:
        return None
    missing = [np.nan] * passages
    return np.array([missing if scores is None else scores for scores in dataset[LABEL]], dtype=np.float32)


def _take(dataset: Dataset, columns: list[str], cells: np.ndarray) -> pa.ChunkedArray:
    """The texts in these cells, which are counted row by row."""
    table = dataset.with_format("arrow")[:]
    rows, places = np.divmod(cells, len(columns))
    chunks = pa.chunked_array([chunk for column in columns for chunk in table[column].chunks], pa.string())
    return chunks.take(pa.array(rows + places * table.num_rows))
