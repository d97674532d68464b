"""A small stand-in for NorBERT3: its interface, its names, and every trait that keeps it from being a sparse encoder."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils import checkpoint
from transformers import PreTrainedModel
from transformers.activations import gelu_new
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.pytorch_utils import softmax_backward_data

from .configuration_norbert import NorbertConfig


class MaskedSoftmax(torch.autograd.Function):
    """Softmax over what is not masked."""

    @staticmethod
    def forward(ctx, scores, mask, dim):
        ctx.dim = dim
        weights = scores.masked_fill(mask, float("-inf")).softmax(dim)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, grad_output):
        (output,) = ctx.saved_tensors
        return softmax_backward_data(ctx, grad_output, output, ctx.dim, output), None, None


class Attention(nn.Module):
    """Attention with a learned bias per distance."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.head_size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        position = torch.arange(config.max_position_embeddings)
        distance = (position[:, None] - position[None, :]).clamp(-8, 8) + 8
        self.register_buffer("position_indices", distance, persistent=True)

    def forward(self, hidden_states, attention_mask, relative_embedding):
        batch, length, width = hidden_states.shape
        query, key, value = (
            part.view(batch, length, self.num_heads, self.head_size).transpose(1, 2)
            for part in self.in_proj(hidden_states).chunk(3, dim=-1)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_size)
        scores = scores + relative_embedding[self.position_indices[:length, :length]].permute(2, 0, 1)
        weights = MaskedSoftmax.apply(scores, attention_mask, -1)
        context = (weights @ value).transpose(1, 2).reshape(batch, length, width)
        return self.out_proj(context), weights.detach()


class GeGLU(nn.Module):
    """GELU of one half times the other."""

    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return x * gelu_new(gate)


class EncoderLayer(nn.Module):
    """Attention and a feed-forward network."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, 2 * config.intermediate_size),
            GeGLU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )

    def forward(self, x, padding_mask, relative_embedding):
        attention_output, attention_probs = self.attention(self.norm(x), padding_mask, relative_embedding)
        x = x + attention_output
        return x + self.mlp(self.norm(x)), attention_probs


class Encoder(nn.Module):
    """All layers."""

    def __init__(self, config, activation_checkpointing=False):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.activation_checkpointing = activation_checkpointing

    def forward(self, hidden_states, attention_mask, relative_embedding):
        hidden_states, attention_probs = [hidden_states], []
        for layer in self.layers:
            if self.activation_checkpointing:
                hidden_state, attention_p = checkpoint.checkpoint(layer, hidden_states[-1], attention_mask, relative_embedding)
            else:
                hidden_state, attention_p = layer(hidden_states[-1], attention_mask, relative_embedding)
            hidden_states.append(hidden_state)
            attention_probs.append(attention_p)
        return hidden_states, attention_probs


class MaskClassifier(nn.Module):
    """The language-model head; its decoder is the embedding."""

    def __init__(self, config, subword_embedding):
        super().__init__()
        self.nonlinearity = nn.Sequential(
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps, elementwise_affine=False),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.GELU(),
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps, elementwise_affine=False),
            nn.Dropout(config.hidden_dropout_prob),
            nn.Linear(subword_embedding.size(1), subword_embedding.size(0)),
        )
        self.nonlinearity[-1].weight = subword_embedding

    def forward(self, x):
        return self.nonlinearity(x)


class Embedding(nn.Module):
    """Words, and a bias per distance and head."""

    def __init__(self, config):
        super().__init__()
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)
        self.relative_embedding = nn.Parameter(torch.randn(17, config.num_attention_heads))

    def forward(self, input_ids):
        return self.word_layer_norm(self.word_embedding(input_ids)), self.relative_embedding


class NorbertPreTrainedModel(PreTrainedModel):
    """Start values are those of the modules."""

    config_class = NorbertConfig
    base_model_prefix = "norbert3"
    supports_gradient_checkpointing = True

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, Encoder):
            module.activation_checkpointing = value

    def _init_weights(self, module):
        pass


class NorbertModel(NorbertPreTrainedModel):
    """The encoder."""

    def __init__(self, config, add_mlm_layer=False, gradient_checkpointing=False, **kwargs):
        super().__init__(config, **kwargs)
        self.config = config
        self.embedding = Embedding(config)
        self.transformer = Encoder(config, activation_checkpointing=gradient_checkpointing)
        self.classifier = MaskClassifier(config, self.embedding.word_embedding.weight) if add_mlm_layer else None

    def get_input_embeddings(self):
        return self.embedding.word_embedding

    def set_input_embeddings(self, value):
        self.embedding.word_embedding = value

    def get_contextualized_embeddings(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = ~attention_mask.bool()[:, None, None, :]
        static_embeddings, relative_embedding = self.embedding(input_ids)
        return self.transformer(static_embeddings, mask, relative_embedding)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
    ):
        hidden_states, attention_probs = self.get_contextualized_embeddings(input_ids, attention_mask)
        return BaseModelOutput(last_hidden_state=hidden_states[-1])


class NorbertForMaskedLM(NorbertModel):
    """Predicts the token at each position."""

    _keys_to_ignore_on_load_unexpected = ["head"]

    def __init__(self, config, **kwargs):
        super().__init__(config, add_mlm_layer=True, **kwargs)

    def get_output_embeddings(self):
        return self.classifier.nonlinearity[-1].weight

    def set_output_embeddings(self, new_embeddings):
        self.classifier.nonlinearity[-1].weight = new_embeddings

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        labels=None,
    ):
        hidden_states, attention_probs = self.get_contextualized_embeddings(input_ids, attention_mask)
        subword_prediction = self.classifier(hidden_states[-1])
        subword_prediction[:, :, :106+1] = float("-inf")
        return MaskedLMOutput(logits=subword_prediction)
