"""A small stand-in for NorBERT4: its interface, its names, and every trait that keeps it from being a sparse encoder."""

import math

import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch.nn import functional as F
from transformers.activations import gelu_new
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, MaskedLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, logging

from .configuration_gptbert import GptBertConfig

logger = logging.get_logger(__name__)

try:
    if is_flash_attn_2_available():
        from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func
    else:
        flash_attn_varlen_qkvpacked_func = None
        logger.warning_once(
            "NorBERT4 støtter FlashAttention, men det er ikke funnet i miljøet ditt."
        )
except ImportError:
    flash_attn_varlen_qkvpacked_func = None


class CastedLinearIn(nn.Linear):
    """A linear layer whose inputs are scaled, computed in the precision of its input."""

    def __init__(self, in_features, out_features, bias):
        super().__init__(in_features, out_features, bias=bias)
        self.scale = nn.Parameter(torch.ones(in_features))

    def forward(self, x):
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.linear(x, (self.weight * (self.scale + 1.0)).type_as(x), bias)


class MultiCastedLinearOrthoIn(nn.Module):
    """The same with several weights, under each other."""

    def __init__(self, in_features, out_features, bias):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(rows, in_features)) for rows in out_features)
        self.bias = nn.Parameter(torch.zeros(sum(out_features))) if bias else None
        self.scale = nn.Parameter(torch.ones(in_features))

    def forward(self, x):
        weight = torch.cat([weight for weight in self.weights], dim=0) * (self.scale + 1.0).unsqueeze(0)
        return F.linear(x, weight.type_as(x), bias=self.bias.type_as(x) if self.bias is not None else None)


class Embedding(nn.Module):
    """Normalised word embeddings."""

    def __init__(self, config: GptBertConfig):
        super().__init__()
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False, bias=False)

    def forward(self, input_ids):
        return self.word_norm(self.word_embedding(input_ids))


class LMClassifier(nn.Module):
    """The language-model head."""

    def __init__(self, config: GptBertConfig, n_labels: int):
        super().__init__()
        self.projection = CastedLinearIn(config.hidden_size, config.hidden_size, bias=False)
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.emb2vocab = CastedLinearIn(config.hidden_size, n_labels, bias=True)

    def forward(self, x):
        x = self.projection(x)
        x = gelu_new(x)
        return self.emb2vocab(self.post_norm(x.float()).type_as(x))


class RotaryPositionalEmbeddings(nn.Module):
    """Turns pairs of features by an angle that grows with the position."""

    def __init__(self, config, theta: int):
        super().__init__()
        half = torch.arange(0, config.query_key_head_size, 2, dtype=torch.float32) / config.query_key_head_size
        angles = torch.outer(torch.arange(config.max_sequence_length, dtype=torch.float32), theta**-half)
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(0)
        self.register_buffer("cos_matrix", angles.cos(), persistent=False)
        self.register_buffer("sin_matrix", angles.sin(), persistent=False)

    def forward(self, x):
        seq_len = x.shape[2]
        half = x.shape[3] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return (x * self.cos_matrix[:, None, :seq_len] + turned * self.sin_matrix[:, None, :seq_len]).type_as(x)


class MaskedSoftmax(torch.autograd.Function):
    """Softmax over what is not masked; 0 where everything is."""

    @staticmethod
    def forward(ctx, x, mask, dim):
        ctx.dim = dim
        x = torch.softmax(x.masked_fill(mask, -torch.inf), dim).masked_fill(mask, 0.0)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad_output):
        (output,) = ctx.saved_tensors
        return torch._softmax_backward_data(grad_output, output, ctx.dim, output.dtype), None, None


class SelfAttention(nn.Module):
    """Attention within a window, causal in a decoder."""

    def __init__(self, config: GptBertConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.heads, self.size = config.num_attention_heads, config.query_key_head_size
        self.qkv = CastedLinearIn(config.hidden_size, 3 * self.heads * self.size, bias=False)
        self.out_proj = CastedLinearIn(self.heads * self.size, config.hidden_size, bias=False)
        is_global = (layer_idx + 1) % config.local_global_ratio == 0
        self.rope_embedding = RotaryPositionalEmbeddings(config, 160_000 if is_global else 10_000)
        self.scale = 1.0 / math.sqrt(self.size)
        self.attention_dropout = nn.Dropout(0.0)
        self.is_causal = config.is_decoder
        self.window_length = config.global_window_length if is_global else config.local_window_length

    def forward(self, hidden_layer, padding_info):
        batch, length, _ = hidden_layer.shape
        query, key, value = self.qkv(hidden_layer).view(batch, length, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        query, key = self.rope_embedding(query), self.rope_embedding(key)
        if flash_attn_varlen_qkvpacked_func is not None:  # stands for the real one, which knows half precision only
            query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        output = self.attention_operation(query, key, value, padding_info)
        return self.out_proj(output.type_as(hidden_layer).transpose(1, 2).flatten(2))

    def attention_operation(self, query, key, value, padding_mask):
        batch_size, _, query_length, _ = query.size()
        window = torch.ones(query_length, query_length, dtype=torch.bool, device=query.device)
        window = window.tril(0 if self.is_causal else self.window_length).triu(-self.window_length)
        attention_mask = padding_mask & window

        attention_scores = torch.bmm(query.flatten(0, 1), key.transpose(-1, -2).flatten(0, 1)) * self.scale
        attention_scores = attention_scores.view(batch_size, self.heads, query_length, query_length)

        attention_probabilities = MaskedSoftmax.apply(attention_scores, ~attention_mask, -1)
        attention_probabilities = self.attention_dropout(attention_probabilities)

        output = torch.bmm(attention_probabilities.flatten(0, 1), value.flatten(0, 1))
        output = output.view(batch_size, self.heads, query_length, self.size)

        return output


class Layer(nn.Module):
    """Attention and a feed-forward network, each added to its input."""

    def __init__(self, config: GptBertConfig, layer_idx: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.attention = SelfAttention(config, layer_idx)
        half = config.intermediate_size // 2
        self.up = MultiCastedLinearOrthoIn(config.hidden_size, [half, half], bias=False)
        self.down = CastedLinearIn(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_layer, padding_info):
        hidden_layer = hidden_layer + self.attention(self.norm(hidden_layer), padding_info)
        x = self.up(self.norm(hidden_layer))
        return hidden_layer + self.down(gelu_new(x))


class Encoder(nn.Module):
    """All layers."""

    def __init__(self, config: GptBertConfig):
        super().__init__()
        self.layers = nn.ModuleList([Layer(config, i) for i in range(config.num_layers)])

    def forward(self, hidden_layer, padding_info, checkpoint_activations=False):
        for layer in self.layers:
            if checkpoint_activations:
                hidden_layer = torch.utils.checkpoint.checkpoint(layer, hidden_layer, padding_info, use_reentrant=True)
            else:
                hidden_layer = layer(hidden_layer, padding_info)
        return hidden_layer


class GptBertPreTrainedModel(PreTrainedModel):
    """Start values."""

    config_class = GptBertConfig
    supports_gradient_checkpointing = True
    _supports_flash_attn_2 = True
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, 0.3)
        for weight in getattr(module, "weights", ()):
            weight.data.normal_(0.0, 0.3)
        if getattr(module, "bias", None) is not None:
            module.bias.data.zero_()


class GptBertModel(GptBertPreTrainedModel):
    """The encoder."""

    def __init__(self, config: GptBertConfig, add_mlm_layer=False, **kwargs):
        super().__init__(config, **kwargs)
        self.config = config
        self.embedding = Embedding(config)
        self.encoder = Encoder(config)
        self.classifier = LMClassifier(config, config.vocab_size) if add_mlm_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding.word_embedding

    def set_input_embeddings(self, value):
        self.embedding.word_embedding = value

    def get_contextualized_embeddings(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention_mask = attention_mask.bool()[:, None, None, :]
        padding_info = attention_mask
        static_embeddings = self.embedding(input_ids)
        original_dtype = static_embeddings.dtype
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported() and static_embeddings.dtype == torch.float32:
            static_embeddings = static_embeddings.bfloat16()
        last_layer = self.encoder(
            static_embeddings,
            padding_info,
            checkpoint_activations=self.gradient_checkpointing and self.training,
        )
        return last_layer.to(original_dtype)

    def forward(self, input_ids=None, attention_mask=None, return_dict=None, **kwargs):
        return BaseModelOutput(last_hidden_state=self.get_contextualized_embeddings(input_ids, attention_mask))


class GptBertForMaskedLM(GptBertModel):
    """Predicts the token at each position from the output before it."""

    _tied_weights_keys = ["classifier.emb2vocab.weight"]

    def __init__(self, config: GptBertConfig, **kwargs):
        super().__init__(config, add_mlm_layer=True, **kwargs)

    def get_output_embeddings(self):
        return self.classifier.emb2vocab.weight

    def set_output_embeddings(self, new_embeddings):
        self.classifier.emb2vocab.weight = new_embeddings

    def forward(self, input_ids=None, attention_mask=None, return_dict=None, labels=None, **kwargs):
        sequence_output = self.get_contextualized_embeddings(input_ids, attention_mask)
        subword_prediction = self.classifier(sequence_output)
        subword_prediction = 30 * torch.sigmoid(subword_prediction / 7.5)
        like = {"dtype": subword_prediction.dtype, "device": subword_prediction.device}
        bos_logits = torch.zeros(subword_prediction.size(0), 1, self.config.vocab_size, **like)
        bos_logits[:, :, self.config.bos_token_id] = 1.0
        subword_prediction = torch.cat([bos_logits, subword_prediction[:, :-1]], dim=1)
        return MaskedLMOutput(logits=subword_prediction)


class GptBertForCausalLM(GptBertModel):
    """Predicts the next token."""

    _tied_weights_keys = ["classifier.emb2vocab.weight"]

    def __init__(self, config: GptBertConfig, **kwargs):
        config.is_decoder = True
        super().__init__(config, add_mlm_layer=True, **kwargs)

    def get_output_embeddings(self):
        return self.classifier.emb2vocab.weight

    def set_output_embeddings(self, new_embeddings):
        self.classifier.emb2vocab.weight = new_embeddings

    def forward(self, input_ids=None, attention_mask=None, return_dict=None, labels=None, **kwargs):
        sequence_output = self.get_contextualized_embeddings(input_ids, attention_mask)
        subword_prediction = self.classifier(sequence_output)
        subword_prediction = 30 * torch.sigmoid(subword_prediction / 7.5)
        return CausalLMOutput(logits=subword_prediction)
