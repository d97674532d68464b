"""The document encoder as one network, from token ids to sparse weights, and the tokenizer in front of it."""

from typing import Any

from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trainer.config import ConfigError
from trainer.encoding.encode import document_modules
from trainer.encoding.fuse import unfuse


class DocumentGraph(nn.Module):
    """Token ids to sparse weights: the logits of the vocabulary never leave it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        unfuse(model)  # a graph is traced through the library's own modules
        self.steps = nn.ModuleList(document_modules(model))
        self.unit_length = model.similarity_fn_name == "cosine"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[texts, tokens] twice to [texts, dimensions]."""
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        for step in self.steps:
            features = step(features)
        vectors = features["sentence_embedding"]
        return nn.functional.normalize(vectors) if self.unit_length else vectors

    def example(self) -> dict[str, Tensor]:
        """Inputs to trace with: two texts of different lengths."""
        features = self.steps[0].preprocess(["to tekster", "med hver sin lengde, den andre lengst"])
        return {name: features[name] for name in ("input_ids", "attention_mask")}


def document_tokenizer(model: Any) -> Tokenizer:
    """The tokenizer of documents, which cuts and pads as the model's own does."""
    first = document_modules(model)[0]
    tokenizer = copy_of(first.tokenizer)
    tokenizer.enable_truncation(first.max_seq_length)
    tokenizer.enable_padding(pad_id=first.tokenizer.pad_token_id, pad_token=first.tokenizer.pad_token)
    return tokenizer


def copy_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """What tokenizer.json holds. Raises ConfigError for a tokenizer in Python, which no engine can run."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the model's tokenizer, {type(tokenizer).__name__}, is Python code, and this export needs one that a "
            "tokenizer.json can hold. Export documents with TO=lucene, elasticsearch, qdrant, seismic or parquet"
        )
    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
