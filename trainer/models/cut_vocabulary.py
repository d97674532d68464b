"""Cuts a base model's vocabulary to the pieces that texts use: its tokenizer, and the weights that belong to pieces.

Four fifths of multilingual-e5-small's parameters are embeddings of 250,000 pieces. Nordic texts use some ten thousand.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Transformer
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.config import ConfigError
from trainer.config.schema import ModelConfig
from trainer.encoding.fuse import PROBE, SILENT, TOLERANCE, transformers_of
from trainer.models.cut_tokenizer import CannotBeCut, cut_tokenizer, needed_pieces, pieces_of, unknown_piece
from trainer.models.normalizers import read_whole_file
from trainer.models.prompts import in_front
from trainer.models.queries import query_tokenizer

# Texts per call of the tokenizer, which works on them in parallel.
TEXTS_PER_CALL = 1_000
# Training texts that are split with the old and the new tokenizer: a share of 1 % is known to within 0.2 %.
COMPARED_TEXTS = 10_000
# Characters of a text that a message quotes.
QUOTED = 60


@dataclass(frozen=True)
class ReadTexts:
    """The training texts as the model reads them, prompts in front, and what is counted instead of them."""

    queries: list[str]
    documents: list[str]
    prompts: dict[str, str]
    corpus: list[str] | None = None
    """The texts of model.vocabulary_texts, without a prompt; None: the training texts are counted."""

    @property
    def by_side(self) -> dict[str, list[str]]:
        """The training texts."""
        return {"query": self.queries, "document": self.documents}

    @property
    def counted(self) -> dict[str, list[str]]:
        """The texts whose pieces are counted."""
        return self.by_side if self.corpus is None else {"document": in_front(self.prompts["document"], self.corpus)}


@dataclass(frozen=True)
class VocabularyCut:
    """What a cut left of a vocabulary and its model."""

    pieces_before: int
    pieces: int
    pieces_used: int
    """Pieces that the texts use at least vocabulary_min_count times."""
    texts: int
    """Texts that were counted."""
    parameters_before: int
    parameters: int
    bytes_saved: int
    compared: int
    """Training texts that were split with the old and the new tokenizer."""
    changed: int
    """Those among them that the new tokenizer splits differently."""


def cut_to_texts(transformer: Transformer, config: ModelConfig, texts: ReadTexts) -> None:
    """Cut the vocabulary of a model that was just loaded, if model.vocabulary says so. `vocabulary_cut` tells of it.

    Raises ConfigError when it cannot be cut, or when a training text would be left without a token.
    """
    if config.vocabulary == "keep":
        return
    try:
        transformer.vocabulary_cut = _cut(transformer, config, texts)
    except CannotBeCut as reason:
        raise ConfigError(f"model.vocabulary: {config.base_model} cannot be cut: {reason}. Set it to keep") from None


def vocabulary_cut(model: SparseEncoder) -> VocabularyCut | None:
    """What a cut left when the model was built; None where nothing was cut, and for a model that was saved."""
    return next((getattr(network, "vocabulary_cut", None) for network in transformers_of(model)), None)


# ------------------------------------------------------------------------------------------- the cut
def _cut(transformer: Transformer, config: ModelConfig, texts: ReadTexts) -> VocabularyCut:
    tokenizer, model = transformer.tokenizer, transformer.model
    if not tokenizer.is_fast:
        raise CannotBeCut("its tokenizer is Python code, not a fast tokenizer")
    before, size_before = _readers(tokenizer, config), size_of(model)
    pieces = pieces_of(before["document"].content)
    rows, last = min(map(len, weights_by_piece(model))), pieces[-1][1]
    if last >= rows:
        raise CannotBeCut(f"its tokenizer has a token with the id {last:,}, and {type(model).__name__} {rows:,} pieces")
    used = counts(before, texts.counted) >= config.vocabulary_min_count
    always = counts(before, {side: [prompt] for side, prompt in texts.prompts.items()}) > 0
    always[: fixed_ids(transformer)] = True
    always[[number for _, _, number in special_ids(model) if number <= last]] = True
    needed = needed_pieces(before["document"].content, {piece for piece, number in pieces if (used | always)[number]})
    backend, kept = cut_tokenizer(before["document"].content, needed)
    replace_pieces(transformer, backend, kept)
    after, size = _readers(tokenizer, config), size_of(model)
    for side, read in texts.by_side.items():
        require_tokens(read, before[side], after[side])
    compared, changed = compare(texts, before, after, kept)
    return VocabularyCut(
        pieces_before=len(pieces),
        pieces=len(kept),
        pieces_used=int(used.sum()),
        texts=sum(map(len, texts.counted.values())),
        parameters_before=size_before[0],
        parameters=size[0],
        bytes_saved=size_before[1] - size[1],
        compared=compared,
        changed=changed,
    )


def fixed_ids(transformer: Transformer) -> int:
    """How many of the first ids have to stay what they are.

    RoBERTa counts positions from the padding's id on. NorBERT3's code silences the ids up to 106.
    """
    model, logits = transformer.model, outputs(transformer, probe_ids(transformer))
    count = 0
    if model.get_output_embeddings() is not None:
        count = int((logits <= SILENT).all(dim=(0, 1)).cumprod(0).sum())
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and module is not embedding_of(model):
            count = max(count, module.padding_idx + 1)
    return count


def replace_pieces(transformer: Transformer, backend: Tokenizer, kept: list[int]) -> None:
    """Give a model another tokenizer, whose pieces had the ids `kept`. Raises CannotBeCut if it then computes otherwise."""
    new_ids = {old: new for new, old in enumerate(kept)}
    probe = [number for number in probe_ids(transformer) if number in new_ids]
    before = outputs(transformer, probe)
    take_rows(transformer.model, kept)
    transformer.tokenizer._tokenizer = backend
    read_whole_file(transformer.tokenizer)
    after = outputs(transformer, [new_ids[number] for number in probe])
    if before.shape != after.shape:
        before = before[..., kept]
    if not torch.allclose(after, before, rtol=TOLERANCE, atol=TOLERANCE):
        raise CannotBeCut(f"{type(transformer.model).__name__} computes something else with other ids for its tokens")


# ------------------------------------------------------------------------------------------- texts
class Reader:
    """Splits texts as a tokenizer does, whole and with nothing around them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        text = tokenizer.backend_tokenizer.to_str()
        self.content: dict[str, Any] = json.loads(text)
        self.backend = Tokenizer.from_str(text)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.size = pieces_of(self.content)[-1][1] + 1
        unknown = unknown_piece(self.content)
        self.unknown = None if unknown is None else self.backend.token_to_id(unknown)

    def ids(self, texts: list[str]) -> Iterator[list[int]]:
        """The ids of each text."""
        for start in range(0, len(texts), TEXTS_PER_CALL):
            for each in self.backend.encode_batch_fast(texts[start : start + TEXTS_PER_CALL], add_special_tokens=False):
                yield each.ids

    def count(self, texts: list[str]) -> np.ndarray:
        """How often the texts use each id."""
        counts = np.zeros(self.size, dtype=np.int64)
        for ids in self.ids(texts):
            np.add.at(counts, ids, 1)
        return counts

    def knows(self, ids: list[int]) -> bool:
        """Whether a text of these ids has a token that says something."""
        return any(number != self.unknown for number in ids)


def _readers(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> dict[str, Reader]:
    """How each side's texts are split: queries without a network by a tokenizer of their own."""
    document = Reader(tokenizer)
    own = query_tokenizer(tokenizer) if config.has_static_queries else tokenizer
    return {"query": document if own is tokenizer else Reader(own), "document": document}


def counts(readers: dict[str, Reader], texts: dict[str, list[str]]) -> np.ndarray:
    """How often the texts of all sides use each id."""
    return np.sum([readers[side].count(read) for side, read in texts.items()], axis=0)


def require_tokens(texts: list[str], before: Reader, after: Reader) -> None:
    """Raise ConfigError for a text that had tokens, and after the cut has none or only unknown ones."""
    for text, ids in zip(texts, after.ids(texts), strict=True):
        if not after.knows(ids) and before.knows(next(before.ids([text]))):
            raise ConfigError(
                f"model.vocabulary: the cut leaves the training text {shortened(text)} without a token. Lower "
                "model.vocabulary_min_count, add its words to model.vocabulary_texts, or set vocabulary: keep"
            )


def compare(texts: ReadTexts, before: dict[str, Reader], after: dict[str, Reader], kept: list[int]) -> tuple[int, int]:
    """How many training texts were split again, and how many of these are split differently now."""
    every = -(-sum(map(len, texts.by_side.values())) // COMPARED_TEXTS) or 1
    compared = changed = 0
    for side, read in texts.by_side.items():
        sample = read[::every]
        pairs = zip(before[side].ids(sample), after[side].ids(sample), strict=True)
        changed += sum(old != [kept[number] for number in new] for old, new in pairs)
        compared += len(sample)
    return compared, changed


def shortened(text: str) -> str:
    """The beginning of a text, in quotes."""
    line = " ".join(text.split())
    return json.dumps(line if len(line) <= QUOTED else f"{line[:QUOTED]}…", ensure_ascii=False)


# ------------------------------------------------------------------------------------------- weights
def embedding_of(model: PreTrainedModel) -> nn.Embedding:
    """The embeddings of the pieces. Raises CannotBeCut."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        raise CannotBeCut(f"{type(model).__name__} does not say where its embeddings are")
    return embedding


def weights_by_piece(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights with a row for each piece: of the embeddings, and of the head where there is one."""
    decoder = model.get_output_embeddings()
    of_head = [getattr(decoder, name, None) for name in ("weight", "bias")]
    # untied, the heads of BERT and RoBERTa have a second bias, which nothing reads
    above = (module for module in model.modules() if getattr(module, "decoder", None) is decoder is not None)
    of_head += [getattr(module, "bias", None) for module in above]
    return [embedding_of(model).weight, *(each for each in of_head if isinstance(each, nn.Parameter))]


@torch.no_grad()
def take_rows(model: PreTrainedModel, kept: list[int]) -> None:
    """Take these rows of every weight that has one for each piece, and write the new numbers into the config.

    Raises CannotBeCut for a model that has such weights elsewhere too.
    """
    embedding, decoder = embedding_of(model), model.get_output_embeddings()
    rows, new_ids = len(embedding.weight), {old: new for new, old in enumerate(kept)}
    cut = {id(each): nn.Parameter(each[kept], each.requires_grad) for each in weights_by_piece(model)}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in cut:  # a decoder may share its weight with the embeddings, and its bias with a head
                module.register_parameter(name, cut[id(parameter)])
        if getattr(module, "vocab_size", None) == rows:
            module.vocab_size = len(kept)
    for name, tensor in model.state_dict().items():
        if tensor.ndim and len(tensor) == rows != len(kept):
            raise CannotBeCut(f"{type(model).__name__} has numbers for each piece in {name} too")
    embedding.num_embeddings = len(kept)
    embedding.padding_idx = new_ids.get(embedding.padding_idx)
    if decoder is not None:
        decoder.out_features = len(kept)
    model.config.get_text_config().vocab_size = len(kept)
    for settings, name, number in special_ids(model):
        setattr(settings, name, new_ids.get(number, number))


def special_ids(model: PreTrainedModel) -> list[tuple[Any, str, int]]:
    """The ids that a model's settings name, such as pad_token_id: the settings, the name and the id."""
    settings = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    different = {id(each): each for each in settings if each is not None}.values()
    named = ((each, name, number) for each in different for name, number in vars(each).items())
    return [(each, name, number) for each, name, number in named if name.endswith("token_id") and type(number) is int]


def size_of(model: PreTrainedModel) -> tuple[int, int]:
    """A model's parameters, and their bytes."""
    parameters = list(model.parameters())
    return sum(each.numel() for each in parameters), sum(each.nbytes for each in parameters)


# ------------------------------------------------------------------------------------------- what a model computes
def probe_ids(transformer: Transformer) -> list[int]:
    """The ids of a text to try a model with."""
    return transformer.tokenizer(PROBE, truncation=True)["input_ids"]


@torch.no_grad()
def outputs(transformer: Transformer, ids: list[int]) -> Tensor:
    """What a model computes of these ids, [1, tokens, width]: logits if it has a head, otherwise hidden states."""
    training, given = transformer.training, torch.tensor([ids])
    try:
        features = {"input_ids": given, "attention_mask": torch.ones_like(given)}
        return transformer.eval()(features)["token_embeddings"]
    finally:
        transformer.train(training)
