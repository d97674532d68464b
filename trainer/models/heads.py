"""What a masked-language-model head needs before it can make sparse vectors: silent special tokens, and a cut-off."""

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Transformer
from sentence_transformers.util import batch_to_device
from torch import nn

from trainer.config import ConfigError
from trainer.encoding.fuse import SILENT, transformers_of


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
    """Lower the bias of [CLS], [SEP], <pad> and their like, so that they are never active, in any library."""
    decoder = decoder_of(transformer, name)
    if decoder.bias is None:
        raise ConfigError(
            f"model.base_model: the vocabulary layer of {name} has no bias to silence special tokens with"
        )
    decoder.bias[transformer.tokenizer.all_special_ids] = SILENT


@torch.no_grad()
def check_not_dense(model: SparseEncoder, texts: list[str], name: str) -> None:
    """Stop before training when every logit is positive: relu makes a vector sparse by cutting negative logits.

    A head without any (one that ends in a sigmoid, as NorBERT4's `30 * sigmoid(x / 7.5)` does) stays dense whatever the
    weight of the regularizer.
    """
    transformer, lowest = transformers_of(model.eval())[0], []
    for text in texts:  # one by one: the logits of four need more memory than a training step for sixteen
        features = batch_to_device(transformer.preprocess([text], prompt=model.prompts.get("document")), model.device)
        by_word = transformer(features)["token_embeddings"].amin((0, 1))
        by_word[model.tokenizer.all_special_ids] = torch.inf  # silenced
        lowest.append(by_word.min().item())
        if not lowest[-1] > 0:  # NaN is none of this
            return
    if lowest:  # a plan may have no texts
        raise ConfigError(
            f"model.base_model: {name} is dense at start: every logit of every token is positive on {len(texts)} "
            f"training texts (the lowest is {min(lowest):.3g}), so relu cuts nothing and training cannot make it sparse. "
            "Its head ends in a bounded function such as a sigmoid soft cap; use a model whose logits can be negative"
        )
