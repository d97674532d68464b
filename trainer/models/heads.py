"""What a masked-language-model head needs before it can make sparse vectors: silent special tokens, and a cut-off."""

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Transformer
from torch import nn

from trainer.config import ConfigError
from trainer.encoding.fuse import SILENT, fuse, unfuse


def decoder_of(transformer: Transformer, name: str) -> nn.Linear:
    """The projection onto the vocabulary; its bias decides which words can be active at all."""
    decoder = transformer.model.get_output_embeddings()
    if not isinstance(decoder, nn.Linear):
        raise ConfigError(
            f"model.base_model: the masked-language-model head of {name} ends in {type(decoder).__name__}, not in a linear "
            "layer onto the vocabulary"
        )
    return decoder


@torch.no_grad()
def silence_special_tokens(transformer: Transformer, name: str) -> None:
    """Make sure that [CLS], [SEP], <pad> and their like are never active: they say nothing about a text.

    Their bias is lowered in the saved weights, so it holds in every library the model is loaded with.
    """
    decoder = decoder_of(transformer, name)
    if decoder.bias is None:
        raise ConfigError(
            f"model.base_model: the vocabulary layer of {name} has no bias to silence special tokens with"
        )
    special = sorted(token for token in transformer.tokenizer.all_special_ids if token < decoder.out_features)
    decoder.bias[special] = SILENT


@torch.no_grad()
def check_not_dense(model: SparseEncoder, texts: list[str], name: str) -> None:
    """Stop before training when every logit is positive: nothing can ever be cut.

    relu makes a vector sparse by cutting negative logits. A head without any (one that ends in a sigmoid, as NorBERT4's
    `30 * sigmoid(x / 7.5)` does) stays dense whatever the regulariser weight.
    """
    if not texts:  # a plan without the data
        return
    fuse(model)  # the library's head needs more memory for four texts than a training step for sixteen does
    vectors = model.encode_document(texts, convert_to_sparse_tensor=False, show_progress_bar=False, batch_size=4)
    unfuse(model)
    if int((vectors > 0).sum(1).min()) >= vectors.shape[1] - len(_special_ids(model)):
        lowest = _lowest_logit(model, texts)
        if lowest > 0:
            raise ConfigError(
                f"model.base_model: {name} is dense at start: every logit of every token is positive on {len(texts)} "
                f"training texts (the lowest is {lowest:.3g}), so relu cuts nothing and training cannot make it sparse. "
                "Its head ends in a bounded function such as a sigmoid soft cap; use a model whose logits can be negative"
            )


def _special_ids(model: SparseEncoder) -> list[int]:
    return list(model.tokenizer.all_special_ids)


def _lowest_logit(model: SparseEncoder, texts: list[str]) -> float:
    transformer = next(module for module in model.modules() if isinstance(module, Transformer))
    features = transformer.preprocess(texts, prompt=model.prompts.get("document"))
    features = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in features.items()}
    logits = transformer(features)["token_embeddings"]
    keep = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    keep[_special_ids(model)] = False
    return logits[features["attention_mask"].bool()][:, keep].min().item()
