"""Configuration of the stand-in for NorBERT4."""

from transformers import PretrainedConfig


class GptBertConfig(PretrainedConfig):
    """Sizes, under the names NorBERT4 gives them."""

    def __init__(
        self,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_attention_heads=2,
        query_key_head_size=16,
        value_head_size=16,
        max_sequence_length=64,
        local_window_length=4,
        global_window_length=32,
        local_global_ratio=2,
        layer_norm_eps=1e-7,
        unk_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        mask_token_id=4,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.query_key_head_size = query_key_head_size
        self.value_head_size = value_head_size
        self.max_sequence_length = max_sequence_length
        self.local_window_length = local_window_length
        self.global_window_length = global_window_length
        self.local_global_ratio = local_global_ratio
        self.layer_norm_eps = layer_norm_eps
        self.unk_token_id = unk_token_id
        self.mask_token_id = mask_token_id
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
