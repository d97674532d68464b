"""Puts the fused head into a sentence-transformers model, in memory only: what is saved stays as it is without it."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from threading import get_ident

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Router, SpladePooling, Transformer
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from trainer.config import one_line
from trainer.encoding.fused_head import splade_max, splade_max_packed
from trainer.encoding.products import use_onednn, use_torch

# The logit of a word that is never active, in NorBERT3's converted code and in our bias of special tokens: far below any
# other, and within float16's range (65,504), so relu makes it 0 in every precision.
SILENT = -1e4
# A text to try a model with; its tokens differ, so that logits in another place are seen to be.
PROBE = "Galdhøpiggen er Norges høyeste fjell, og ligger i Lom kommune i Innlandet."
# Twice the largest relative difference between two orders of summation that was seen, in float32.
TOLERANCE = 1e-4
# NorBERT4's linear layer, whose weights are multiplied by a scale for each feature of the input.
SCALED = "CastedLinearIn"


class NotFusable(Exception):
    """Why a model keeps its own head."""


def fuse(model: SparseEncoder, device: str | None = None) -> str:
    """Replace every masked-language-model head and the pooling after it by the fused head. Returns what was done, in words.

    On CPUs, the linear layers of every network then compute through oneDNN, too. A head that gives other logits for a text
    than a projection of its input (a new architecture, a soft cap) stays as it is, and the reason is returned. device:
    where the model will compute, if not where it is.
    """
    pairs = list(_pairs(model))
    for transformer in transformers_of(model) if (device or model.device.type) == "cpu" else ():
        use_onednn(transformer.model)
    try:
        heads = [FusedHead(transformer, pooling) for transformer, pooling in pairs]
    except NotFusable as reason:
        return f"as the library computes it: {reason}"
    for head in heads:
        head.install()  # after the layers: a decoder may be one of them
    return "fused, without logits" if heads else "none"


def unfuse(model: SparseEncoder) -> None:
    """Take the fused heads out again."""
    for transformer in transformers_of(model):
        use_torch(transformer.model)
    for transformer, pooling in _pairs(model):
        for module in (transformer.model.get_output_embeddings(), pooling):
            vars(module).pop("forward", None)


def transformers_of(model: SparseEncoder) -> list[Transformer]:
    """The networks of an encoder."""
    return [module for module in model.modules() if isinstance(module, Transformer)]


def is_fused(model: SparseEncoder) -> bool:
    """Whether the model has a fused head now."""
    return any("forward" in vars(pooling) for _, pooling in _pairs(model))


def _pairs(model: SparseEncoder) -> Iterator[tuple[Transformer, SpladePooling]]:
    """Every transformer that is followed by a SpladePooling."""
    for container in (model, *(module for module in model if isinstance(module, Router))):
        routes = container.sub_modules.values() if isinstance(container, Router) else [container]
        for modules in routes:
            for transformer, pooling in pairwise(modules):
                if isinstance(transformer, Transformer) and isinstance(pooling, SpladePooling):
                    yield transformer, pooling


class FusedHead:
    """One transformer's head: its decoder hands its input over, and the pooling computes the vectors from it."""

    def __init__(self, transformer: Transformer, pooling: SpladePooling) -> None:
        """Raises NotFusable with the reason."""
        if pooling.pooling_strategy != "max":
            raise NotFusable(f"pooling is {pooling.pooling_strategy}, not max")
        self.decoder, self.pooling = transformer.model.get_output_embeddings(), pooling
        if type(self.decoder).__name__ not in ("Linear", SCALED):
            raise NotFusable(f"the vocabulary layer is a {type(self.decoder).__name__}")
        if self.decoder.weight.device.type == "cuda" and find_spec("triton") is None:
            raise NotFusable("triton, which GPUs need for it, is not installed")
        self.hidden: dict[int, Tensor] = {}  # by thread: two may encode with one model at the same time
        self.shifted, self.silent = self._try(transformer)
        self._try_without_logits(transformer)

    def install(self) -> None:
        """Compute with it from now on."""
        self.decoder.forward = self.hand_over
        self.pooling.forward = self.pool

    def hand_over(self, hidden: Tensor) -> Tensor:
        """The decoder's new forward. What it returns stands for logits, of one word, that nobody reads."""
        self.hidden[get_ident()] = hidden
        return hidden.detach()[..., :1].clone()

    def pool(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """SpladePooling's new forward."""
        hidden = self.scaled(self.hidden.pop(get_ident()))
        weight, bias, activation = self.decoder.weight, self.decoder.bias, self.pooling.activation_function
        if self.silent is not None:
            bias = hidden.new_zeros(len(weight)) if bias is None else bias
            bias = bias.index_fill(0, self.silent.to(bias.device), SILENT)
        if "cu_seq_lens_q" in features:  # texts one after the other, without padding
            hidden, starts = hidden.squeeze(0), features["cu_seq_lens_q"]
            if self.shifted:
                hidden, starts = without_last(hidden, starts)
            vectors = splade_max_packed(hidden, weight, bias, starts, activation)
        else:
            mask = features["attention_mask"]
            if self.shifted:  # the logits of a token come from the one before it; those of the last one go nowhere
                mask = nn.functional.pad(mask[:, 1:], (0, 1))
            vectors = splade_max(hidden, weight, bias, mask, activation)
        if self.pooling.embedding_dimension is None:
            self.pooling.embedding_dimension = vectors.shape[1]
        features["sentence_embedding"] = vectors
        return features

    def scaled(self, hidden: Tensor) -> Tensor:
        """The decoder's input as a plain linear layer would take it."""
        scaled = type(self.decoder).__name__ == SCALED
        return hidden * (self.decoder.scale + 1.0).to(hidden.dtype) if scaled else hidden

    @torch.no_grad()
    def _logits(self, transformer: Transformer, hook: Callable) -> Tensor:
        """What the model makes of the probe, [1, tokens, words], with this hook on its decoder."""
        training, handle = transformer.training, self.decoder.register_forward_hook(hook)
        try:
            features = transformer.eval().preprocess([PROBE])
            return transformer(batch_to_device(features, self.decoder.weight.device))["token_embeddings"]
        finally:
            handle.remove()
            transformer.train(training)

    def _try_without_logits(self, transformer: Transformer) -> None:
        """Raise NotFusable when the model does something with its logits that one word's in place of all cannot bear."""
        try:
            self._logits(transformer, lambda _, given, logits: self.hand_over(*given))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            raise NotFusable(f"the model needs the logits of every word: {one_line(error)}") from None
        finally:
            self.hidden.clear()

    @torch.no_grad()
    def _try(self, transformer: Transformer) -> tuple[bool, Tensor | None]:
        """Whether the model moves the decoder's logits one token on, and which words it silences."""
        seen: list[Tensor] = []
        changed = self._logits(transformer, lambda _, given, logits: seen.extend([given[0], logits.clone()]))
        if len(seen) != 2:
            raise NotFusable(f"the vocabulary layer is called {len(seen) // 2} times")
        hidden, direct = seen
        own = nn.functional.linear(self.scaled(hidden), self.decoder.weight, self.decoder.bias)
        if not _same(own, direct):
            raise NotFusable(f"the vocabulary layer, a {type(self.decoder).__name__}, is no plain projection here")
        silent = ((changed == SILENT) & (direct != SILENT)).all(dim=(0, 1)).nonzero().squeeze(1)
        direct[..., silent] = SILENT
        if changed.shape == direct.shape and _same(changed, direct):
            return False, silent if len(silent) else None
        moved = torch.cat([torch.zeros_like(direct[:, :1]), direct[:, :-1]], dim=1)
        if changed.shape == direct.shape and _same(changed, moved):
            return True, None
        raise NotFusable("the model changes its logits after the vocabulary layer in an unknown way")


def without_last(hidden: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Packed texts, [tokens, width], with the last token of each put behind all others; where they start, [texts + 1]."""
    last = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    last[starts[1:].long() - 1] = True
    return hidden[last.argsort(stable=True)], starts - torch.arange(len(starts), device=starts.device)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return bool(((ours - theirs).abs() <= TOLERANCE * theirs.abs().clamp_min(1.0)).all())
