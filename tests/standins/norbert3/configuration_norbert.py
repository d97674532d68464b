"""Configuration of the stand-in for NorBERT3."""

from transformers import PretrainedConfig


class NorbertConfig(PretrainedConfig):
    """Sizes, under the names NorBERT3 gives them."""

    def __init__(
        self,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        layer_norm_eps=1e-7,
        hidden_dropout_prob=0.0,
        pad_token_id=3,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        super().__init__(pad_token_id=pad_token_id, **kwargs)
