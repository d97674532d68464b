"""Which word a dimension of a sparse vector stands for."""

from typing import Any

from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder


def dims_are_words(model: Any) -> bool:
    """Whether a SparseEncoder's dimensions are the entries of its vocabulary. Those of an autoencoder (CSR) are not."""
    return not any(isinstance(module, SparseAutoEncoder) for module in model.modules())


def token_of(model: Any, dimension: int) -> str | None:
    """The token that a dimension stands for; None for CSR, and for the entries that pad a vocabulary."""
    if not dims_are_words(model) or dimension >= len(model.tokenizer):
        return None
    return model.tokenizer.convert_ids_to_tokens(dimension)


def term_of(model: Any, dimension: int) -> str:
    """A dimension's token as people read it; 'dimension 7' where it has none."""
    token = token_of(model, dimension)
    if token is None:
        return f"dimension {dimension}"
    term = model.tokenizer.convert_tokens_to_string([token]).strip().removeprefix("##")
    # a space, a control character or half a letter of a byte-level vocabulary is readable only under the token's own name
    return term if term.isprintable() and term.strip("\N{REPLACEMENT CHARACTER}") else token
