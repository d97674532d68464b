"""Documents longer than a model reads: in overlapping windows, of whose vectors each dimension's maximum is kept.

SPLADE's pooling is the maximum over the tokens of a text, so this is the same once more.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling
from sentence_transformers.util import select_max_active_dims
from tokenizers import Tokenizer
from torch import Tensor

from trainer.config import ConfigError
from trainer.encoding.encode import document_modules

# A window starts so many tokens after the one before it, as a share of its length: 240 of 320 tokens were measured.
STRIDE = 0.75
# Texts per call of the tokenizer: what it makes of a text is a hundred times as large as its ids.
TEXTS_PER_CALL = 100
# Documents whose lengths are counted, drawn at random where there are more.
COUNTED = 1_000
# The names that encode_document looks for a prompt under, in its order.
PROMPT_NAMES = ("document", "passage", "corpus")


def read_in_windows(model: SparseEncoder) -> None:
    """Have `model.encode_document` read long documents in windows. In memory only: what is saved cuts them.

    A document that fits is encoded by the library's own call. Raises ConfigError for a model that cannot do it.
    """
    if not reads_in_windows(model):
        vars(model)["encode_document"] = WindowedDocuments(model)


def reads_in_windows(model: SparseEncoder) -> bool:
    """Whether the model reads long documents in windows now."""
    return "encode_document" in vars(model)


@contextmanager
def with_cut_documents(model: SparseEncoder) -> Iterator[None]:
    """The model as the library has it, which cuts long documents."""
    windowed = vars(model).pop("encode_document", None)
    try:
        yield
    finally:
        if windowed is not None:
            vars(model)["encode_document"] = windowed


class WindowedDocuments:
    """A model's `encode_document`, with the library's options but for `prompt` and `prompt_name`."""

    def __init__(self, model: SparseEncoder) -> None:
        """Raises ConfigError for a model whose vectors have no maximum, or whose tokenizer is Python code."""
        if reason := why_no_maximum(model):
            raise ConfigError(f"documents cannot be read in windows: {reason}. Set long_documents to cut")
        self.model, self.cut, self.splitter = model, model.encode_document, Splitter(model)

    def __call__(self, inputs: str | Sequence[str], **options: Any) -> Tensor | list[Tensor]:
        """The vectors, as the library gives them."""
        if options.get("prompt") is not None or options.get("prompt_name") is not None:
            raise ValueError("windows are made for the model's own prompt")
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        windows = self.splitter.split(texts)
        if all(len(each) == 1 for each in windows):
            return self.cut(inputs, **options)
        vectors = self._maxima(windows, options | {"convert_to_tensor": True, "max_active_dims": None})
        if most := options.get("max_active_dims"):  # of the document, not of each window
            vectors = heaviest(vectors, most) if vectors.is_sparse else select_max_active_dims(vectors, most)
        if isinstance(inputs, str):
            return vectors[0]
        return vectors if options.get("convert_to_tensor", True) else list(vectors)

    def _maxima(self, windows: list[list[str]], options: dict[str, Any]) -> Tensor:
        """[texts, dimensions]. The windows' own vectors are sparse and in main memory, however many there are."""
        fitting = [number for number, parts in enumerate(windows) if len(parts) == 1]
        numbers = [number for number, parts in enumerate(windows) if len(parts) > 1 for _ in parts]
        parts = [part for parts in windows if len(parts) > 1 for part in parts]
        of_parts = self.cut(parts, **options | {"convert_to_sparse_tensor": True, "save_to_cpu": True})
        rows, dims, weights = entries(of_parts, numbers)
        shape = len(windows), of_parts.shape[1]
        cells, place = torch.unique(rows * shape[1] + dims, return_inverse=True)
        values = weights.new_zeros(len(cells)).scatter_reduce(0, place, weights, "amax")
        device = "cpu" if options.get("save_to_cpu") else self.model.device
        found = [tuple(each.to(device) for each in (cells // shape[1], cells % shape[1], values))]
        vectors = self.cut([windows[number][0] for number in fitting], **options) if fitting else None
        if options.get("convert_to_sparse_tensor", True):
            if vectors is not None:
                found.append(entries(vectors, fitting))
            rows, dims, values = (torch.cat(each) for each in zip(*found, strict=True))
            places = torch.stack([rows, dims])
            return torch.sparse_coo_tensor(places, values, shape, check_invariants=False).coalesce()
        rows, dims, values = found[0]
        dense = values.new_zeros(shape)
        dense[rows, dims] = values
        if vectors is not None:
            dense[fitting] = vectors
        return dense


def entries(vectors: Tensor, numbers: list[int]) -> tuple[Tensor, ...]:
    """Rows, dimensions and values of a sparse tensor whose rows are to have these numbers."""
    vectors = vectors.coalesce()
    rows, dims = vectors.indices()
    return torch.tensor(numbers, device=rows.device)[rows], dims, vectors.values()


def heaviest(vectors: Tensor, most: int) -> Tensor:
    """The largest values of each row of a sparse tensor; of equal ones the lower dimensions."""
    vectors = vectors.coalesce()
    (rows, dims), values = vectors.indices(), vectors.values()
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    starts = torch.searchsorted(rows, rows)  # rows ascend in a coalesced tensor
    kept = order[torch.arange(len(order), device=rows.device) - starts < most]
    places = torch.stack([rows[kept], dims[kept]])
    return torch.sparse_coo_tensor(places, values[kept], vectors.shape, check_invariants=False).coalesce()


def why_no_maximum(model: SparseEncoder) -> str:
    """Why the maximum over windows is not this model's vector of a text; empty where it is."""
    pooling = document_modules(model)[-1]
    if not isinstance(pooling, SpladePooling):
        return "only SPLADE takes the maximum over the tokens of a text"
    if pooling.pooling_strategy != "max":
        return f"the model takes the {pooling.pooling_strategy} over the tokens of a text, not the maximum"
    return "the model keeps a fixed number of active dims" if model.max_active_dims else ""


# ------------------------------------------------------------------------------------------- splitting
class Splitter:
    """Splits documents into texts that fit into a model with its prompt and its special tokens."""

    def __init__(self, model: SparseEncoder) -> None:
        """Raises ConfigError for a tokenizer in Python, and for a prompt that leaves no room."""
        module = document_modules(model)[0]
        if not module.tokenizer.is_fast:
            raise ConfigError(
                "documents cannot be read in windows: the tokenizer is Python code, which does not say where in a text "
                "its tokens are. Set long_documents to cut"
            )
        self.prompt = next((model.prompts[name] for name in PROMPT_NAMES if name in model.prompts), None) or ""
        self.limit = getattr(module, "document_length", None) or module.max_seq_length
        self.special = module.tokenizer.num_special_tokens_to_add()
        # a copy: the library's own sets padding and truncation at every call
        self.tokenizer = Tokenizer.from_str(module.tokenizer.backend_tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        used = self.special + len(self.tokenizer.encode(self.prompt, add_special_tokens=False))
        if self.limit and used >= self.limit:
            raise ConfigError(f"documents cannot be read: their prompt fills the {self.limit} tokens of a text")

    def split(self, texts: Sequence[str]) -> list[list[str]]:
        """The windows of each text; one that fits is its own only window."""
        return [self._windows(text, encoding) for text, encoding in self._encodings(texts)]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, with the prompt and special tokens."""
        return [len(encoding) + self.special for _, encoding in self._encodings(texts)]

    def _encodings(self, texts: Sequence[str]) -> Iterator[tuple[str, Any]]:
        for first in range(0, len(texts), TEXTS_PER_CALL):
            part = texts[first : first + TEXTS_PER_CALL]
            prompted = [self.prompt + text for text in part]
            yield from zip(part, self.tokenizer.encode_batch(prompted, add_special_tokens=False), strict=True)

    def _windows(self, text: str, encoding: Any) -> list[str]:
        if not self.limit or len(encoding) + self.special <= self.limit:
            return [text]
        before = len(self.prompt)
        places = [(max(start, before) - before, end - before) for start, end in encoding.offsets if end > before]
        size = self.limit - self.special - (len(encoding) - len(places))
        found = []
        for window, is_torn in windows_of(text, places, size):
            # the prompt's blank is the one before the first word
            window = window.lstrip() if self.prompt[-1:].isspace() else window
            # half a word may have other tokens, and more of them
            found += self.split([window])[0] if is_torn and len(window) < len(text) else [window]
        return found


def windows_of(text: str, places: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[str, bool]]:
    """Parts of at most `size` tokens that overlap, and whether one begins or ends within a word.

    The last one ends with the text. Only a word that alone is longer than a window is torn. Byte-level tokenizers take the
    blank before a word for a part of it, so each part but the first begins with that.

    places: where each token of the text begins and ends, in characters.
    """
    count, start = len(places), 0

    def begins_word(token: int) -> bool:
        return any(map(str.isspace, text[places[token - 1][1] : places[token][0] + 1]))

    def begins_character(token: int) -> bool:
        return places[token][0] >= places[token - 1][1]

    def last(first: int, to: int, begins: Any) -> int | None:
        return next((token for token in range(to, first - 1, -1) if begins(token)), None)

    def part(start: int, end: int) -> tuple[str, bool]:
        is_torn = (start > 0 and not begins_word(start)) or (end < count and not begins_word(end))
        return text[places[start - 1][1] if start else 0 : places[end - 1][1] if end < count else None], is_torn

    while start + size < count:
        full = start + size
        end = last(start + 1, full, begins_word) or last(start + 1, full, begins_character) or full
        yield part(start, end)
        stride = min(start + max(1, int(STRIDE * size)), end)
        after = (token for token in range(stride, end) if begins_word(token))
        start = last(start + 1, stride, begins_word) or next(after, end)
    # of the places from which the rest of the text fits, the first
    yield part(next((token for token in range(max(count - size, 1), start) if begins_word(token)), start), count)


# ------------------------------------------------------------------------------------------- how long they are
@dataclass(frozen=True)
class Lengths:
    """How many documents are longer than a model reads, and how much of the text it would cut."""

    limit: int
    documents: int
    longer: int
    share_cut: float
    """Share of the tokens that lie beyond the limit."""
    windows: float
    """Windows of a longer document, on average."""
    all_counted: bool

    def words(self, in_windows: bool) -> str:
        """In a line of the plan or a note of the report."""
        about = "" if self.all_counted else "about "
        cut = f"{self.share_cut:.1%} of the text is cut off"
        how = f"read in {self.windows:.1f} windows each" if in_windows else cut
        return f"{about}{self.longer / self.documents:.1%} of the documents have more than {self.limit} tokens; {how}"


def texts_read(model: SparseEncoder, documents: Sequence[str]) -> int:
    """How many texts go through the network for these documents, about: each window is one."""
    lengths = measure_lengths(model, documents) if reads_in_windows(model) else None
    more = lengths.longer / lengths.documents * (lengths.windows - 1) if lengths else 0
    return round(len(documents) * (1 + more))


def measure_lengths(model: SparseEncoder, texts: Sequence[Any]) -> Lengths | None:
    """Lengths of these documents, or of COUNTED of them; None where the tokenizer is Python code, or no text is longer.

    texts: strings, or what pyarrow has for them.
    """
    if not len(texts) or not document_modules(model)[0].tokenizer.is_fast:
        return None
    splitter, numbers = Splitter(model), range(len(texts))
    chosen = numbers if len(texts) <= COUNTED else random.Random(0).sample(numbers, COUNTED)
    counted = [str(texts[number]) for number in chosen]
    lengths = splitter.lengths(counted)
    longer = [number for number, length in enumerate(lengths) if splitter.limit and length > splitter.limit]
    if not longer:
        return None
    windows = splitter.split([counted[number] for number in longer])
    return Lengths(
        limit=splitter.limit,
        documents=len(counted),
        longer=len(longer),
        share_cut=sum(lengths[number] - splitter.limit for number in longer) / sum(lengths),
        windows=len(list(chain.from_iterable(windows))) / len(longer),
        all_counted=len(counted) == len(texts),
    )
