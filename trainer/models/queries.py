"""The query side of inference-free SPLADE: a tokenizer, and a start weight for every word."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from tokenizers.normalizers import Prepend, Strip
from transformers import PreTrainedTokenizerBase

from trainer.config import ConfigError
from trainer.models.normalizers import set_normalizer, steps_of

# Documents the IDF is counted on. At 100,000 the relative error of a word in 1 % of the documents is 3 %; tokenising a
# million takes minutes.
MAX_IDF_DOCUMENTS = 100_000


def query_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that gives the first word of a query the same dimension as the same word within a document.

    Byte-level tokenizers (RoBERTa, ModernBERT, NorBERT4) keep the space before a word in its token, so the first word of
    every query would find next to nothing. Of these a copy is returned that puts a space in front.
    """
    if tokenizer.is_fast and not _first_word_like_others(tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        set_normalizer(tokenizer, [*steps_of(tokenizer), Strip(), Prepend(" ")])
    if not _first_word_like_others(tokenizer):
        raise ConfigError(
            "model.base_model: its tokenizer gives the first word of a text another token than the same word later, "
            "so queries cannot be matched without a neural network. Use architecture: splade"
        )
    return tokenizer


def _first_word_like_others(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("og og", add_special_tokens=False)["input_ids"]
    return ids[: len(ids) // 2] == ids[len(ids) // 2 :]


def weights_of_ones(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> torch.Tensor:
    """Every word of a query counts the same."""
    return torch.ones(len(tokenizer))


def weights_of_idf(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> torch.Tensor:
    """ln(1 + (N - n + 0.5) / (n + 0.5)) of the training documents, as in BM25; shape [vocabulary]."""
    documents = documents[:: max(1, -(-len(documents) // MAX_IDF_DOCUMENTS))]
    counts = np.zeros(len(tokenizer))
    for start in range(0, len(documents), 1000):
        batch = tokenizer(documents[start : start + 1000], add_special_tokens=False, verbose=False)["input_ids"]
        for ids in batch:
            counts[np.unique(np.asarray(ids, dtype=int))] += 1
    idf = np.log1p((len(documents) - counts + 0.5) / (counts + 0.5))
    return torch.tensor(idf, dtype=torch.float32)


START_WEIGHTS: dict[str, Callable[[PreTrainedTokenizerBase, list[str]], torch.Tensor]] = {
    "ones": weights_of_ones,
    "idf": weights_of_idf,
}
