"""A head over the vocabulary for an encoder that was published without one, fitted in closed form to its own tokens.

The last hidden state of a token is projected by ridge regression onto the token's own word: its centred input embedding, of
length 1. Its largest logit is then mostly its own word's, and the next are words that the encoder uses alike, in all of its
languages. The projection goes into the dense layer of the library's masked-language-model head, the words into its
decoder, so the saved model is a stock one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log1p

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Transformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from trainer.config import ConfigError
from trainer.encoding.fuse import PROBE, transformers_of
from trainer.encoding.fused_head import splade_max
from trainer.models.cut_vocabulary import weights_by_piece
from trainer.models.heads import decoder_of

# Tokens that the projection is fitted to: a hundred for each of 384 dimensions.
MOST_TOKENS = 40_000
# A projection from n dimensions that is fitted to fewer tokens than this times n follows their noise.
TOKENS_PER_DIMENSION = 4
# Every so many texts one is held out; they choose ridge and cut-off.
HELD_OUT_EVERY = 8
MOST_HELD_OUT_TOKENS, MOST_HELD_OUT_TEXTS = 3_000, 64
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
# Below this share of tokens whose largest logit is their own word's, states do not say which token they are of.
LEAST_OWN = 0.05
# Root mean square of a projection's components. Around 0, GELU, SiLU and tanh are lines: at 0.025 GELU bends by 2 %.
# (Behind a shift of +8 GELU is a line too, but bfloat16 rounds numbers near 8 to 1/16.)
PROJECTED = 0.025
# A word whose own tokens' logits are low is cut off lower, by so much of the difference: at 300 dims 0.76 to 0.84 of a
# text's own words stay active, against 0.66 to 0.75 with one cut-off for all words.
SHARE_OF_OWN = 0.5
# Tokens that a word's own mean counts beside those that were seen.
PRIOR_TOKENS = 3.0
# The median logit of own words that are active.
OWN_LOGIT = 3.0
# Cosine of what the head computes and of what was fitted; GELU's bend leaves 0.999.
FAITHFUL = 0.98
BATCH = 16


@dataclass(frozen=True)
class HeadFit:
    """What a head was fitted to, and how it does on texts that were held out."""

    texts: int
    tokens: int
    own: float
    """Share of held-out tokens whose largest logit is their own word's."""
    active_dims: float
    """Mean over held-out texts, at the cut-off that was chosen."""
    own_active: float
    """Share of a held-out text's own words that are active in its vector."""


def head_fit(model: SparseEncoder) -> HeadFit | None:
    """How the model's head was fitted when it was built; None for a head of its own, and for a model that was saved."""
    return next((getattr(network, "head_fit", None) for network in transformers_of(model)), None)


@torch.no_grad()
def fit_head(transformer: Transformer, texts: Sequence[str], active_dims: int, name: str) -> None:
    """Fit the head in place. Raises ConfigError when there are too few texts, or states that do not tell tokens apart.

    texts: documents with their prompt in front. active_dims: dimensions that documents shall have on average at the start.
    name: the base model's, for messages. The same texts give the same head.
    """
    was_training = transformer.training
    transformer.eval()
    head = Head(transformer, name)
    words = normalize(head.embeddings - head.embeddings.mean(0), dim=1)
    most = len(words) - len(transformer.tokenizer.all_special_ids)
    if active_dims >= most:  # then there is no weight to cut off at
        raise ConfigError(f"model.head_dims: {active_dims:,} is not fewer than the {most:,} words of {name}. Lower it")
    fitted, held_out = _sample(transformer, texts)
    states, tokens = head.states(fitted)
    need = TOKENS_PER_DIMENSION * states.shape[1]
    tried = [each[:MOST_HELD_OUT_TOKENS] for each in head.states(held_out[:MOST_HELD_OUT_TEXTS])]
    if len(tokens) < need or not len(tried[1]):
        raise ConfigError(
            f"model.head: fit needs {need:,} tokens of text, {TOKENS_PER_DIMENSION} for each of the {states.shape[1]} "
            f"dimensions of {name}, in {HELD_OUT_EVERY} texts or more; the training texts have {len(tokens):,} tokens in "
            f"{len(fitted) + len(held_out):,}. Add texts"
        )
    own, projection = _best_projection(states, tokens, words, (tried[0], tried[1]), head.dense.bias is not None)
    if own < LEAST_OWN:
        raise ConfigError(
            f"model.head: the tokens of {name} cannot be told apart by their last hidden states: the largest logit of a "
            f"fitted head is the token's own word's for {own:.1%} of those held out. Take another base model"
        )
    head.set_projection(projection)
    head.check(projection, held_out[:BATCH])
    level = SHARE_OF_OWN * _own_level(_project(states, projection), tokens, words)
    dims, own_active = _set_decoder(head, words, level, held_out[:MOST_HELD_OUT_TEXTS], active_dims)
    transformer.train(was_training)
    transformer.head_fit = HeadFit(len(fitted) + len(held_out), len(tokens), own, dims, own_active)


@torch.no_grad()
def weigh_words(transformer: Transformer, idf: Tensor, name: str) -> None:
    """Scale each word's logit so that a word of both query and document adds about its IDF to their product, in place.

    For SPLADE, whose queries have no weights of their own. idf: [vocabulary], not negative. What is active stays so.
    """
    decoder = decoder_of(transformer, name)
    factor = (idf * log1p(OWN_LOGIT)).sqrt().expm1().to(decoder.weight) / OWN_LOGIT
    factor[transformer.tokenizer.all_special_ids] = 1.0  # these are silenced
    for bias in _biases(transformer):
        bias.mul_(factor)
    decoder.weight.mul_(factor[:, None])


class Head:
    """A masked-language-model head: a dense layer, an activation, a norm, and the decoder onto the vocabulary."""

    def __init__(self, transformer: Transformer, name: str) -> None:
        """Raises ConfigError for a head that is built in another way."""
        self.transformer, self.name = transformer, name
        self.decoder = decoder_of(transformer, name)
        self.embeddings = transformer.model.get_input_embeddings().weight.detach().float()
        kind = type(transformer.model).__name__
        parts = self._before_the_decoder()
        if parts is None or self.decoder.bias is None or self._has_more_than(*parts):
            raise ConfigError(
                f"model.head: the head of {name} ({kind}) cannot be fitted: it is not a dense layer, an activation and a "
                "norm in front of a decoder with a bias, and nothing else. Set model.head: own"
            )
        self.dense, norm = parts
        for module in (self.dense, norm, self.decoder):  # NorBERT4's linear layers have a scale of their own
            if isinstance(scale := getattr(module, "scale", None), nn.Parameter):
                scale.zero_()
        if getattr(norm, "weight", None) is not None:
            norm.weight.fill_(1.0)
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
        if self.embeddings.shape != self.decoder.weight.shape or len(self.dense.weight) != self.embeddings.shape[1]:
            raise ConfigError(
                f"model.head: the head of {name} ({kind}) cannot be fitted: its decoder is "
                f"{list(self.decoder.weight.shape)}, its embeddings {list(self.embeddings.shape)}. Set model.head: own"
            )

    def set_projection(self, projection: Tensor) -> None:
        """Put the projection, [width (+ 1 for the bias), width of the embeddings], into the dense layer."""
        width = self.dense.weight.shape[1]
        self.dense.weight.copy_(projection[:width].T)
        if self.dense.bias is not None:
            self.dense.bias.copy_(projection[width])

    def check(self, projection: Tensor, texts: list[str]) -> None:
        """Raise ConfigError when the activation and the norm make something else of a projection than its direction."""
        for given, handed, _, real in self._batches(texts):
            cosine = torch.cosine_similarity(_project(given[real], projection), handed[real], dim=1)
            if not cosine.min() > FAITHFUL:
                raise ConfigError(
                    f"model.head: the head of {self.name} ({type(self.transformer.model).__name__}) cannot be fitted: its "
                    "activation is no line around 0. Set model.head: own"
                )

    def set_decoder(self, weight: Tensor, bias: Tensor) -> None:
        """Give the decoder its own weights, tied to nothing."""
        self.decoder.weight = nn.Parameter(weight.to(self.decoder.weight))
        for each in _biases(self.transformer):
            each.copy_(bias)

    def states(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """What the dense layer reads of each token that is not special, [tokens, width], and the tokens."""
        found = [(given[real], ids[real]) for given, _, ids, real in self._batches(texts)]
        nothing = torch.empty(0, self.dense.weight.shape[1]), torch.empty(0, dtype=torch.long)
        states, tokens = zip(nothing, *found, strict=True)
        return torch.cat(states), torch.cat(tokens)

    def projected(self, texts: list[str]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of what the decoder reads, [texts, length, width], of the token ids, and which of them are no padding."""
        for _, handed, ids, _ in self._batches(texts):
            yield handed, ids, ids != self.transformer.tokenizer.pad_token_id

    def _batches(self, texts: list[str]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """What the dense layer and the decoder read, the token ids, and which are words: no padding, nothing special."""
        seen: dict[str, Tensor] = {}
        special = torch.tensor(self.transformer.tokenizer.all_special_ids)

        def read_by_decoder(hidden: Tensor) -> Tensor:
            seen["decoder"] = hidden.float()
            return hidden[..., :1].clone()  # stands for logits of all words, which nobody reads

        dense = self.dense.register_forward_hook(lambda _, given, __: seen.update(dense=given[0].float()))
        self.decoder.forward = read_by_decoder
        try:
            ordered = sorted(texts, key=len, reverse=True)
            for start in range(0, len(ordered), BATCH):
                features = self.transformer.preprocess(ordered[start : start + BATCH])
                self.transformer(features)
                ids = features["input_ids"]
                yield seen["dense"], seen["decoder"], ids, ~torch.isin(ids, special)
        finally:
            dense.remove()
            del self.decoder.forward

    def _before_the_decoder(self) -> tuple[nn.Linear, nn.Module] | None:
        """The last layers with weights, or norms without, that are called before the decoder: dense layer and norm."""
        called: list[nn.Module] = []
        leaves = [module for module in self.transformer.model.modules() if not list(module.children())]
        hooks = [leaf.register_forward_pre_hook(lambda module, _: called.append(module)) for leaf in leaves]
        try:
            self.transformer(self.transformer.preprocess([PROBE]))
        finally:
            for hook in hooks:
                hook.remove()
        called = [leaf for leaf in called if isinstance(leaf, nn.Linear) or "Norm" in type(leaf).__name__]
        match called[-3:]:
            case [nn.Linear() as dense, norm, decoder] if decoder is self.decoder and not isinstance(norm, nn.Linear):
                return dense, norm
        return None

    def _has_more_than(self, dense: nn.Module, norm: nn.Module) -> bool:
        """Whether the head has weights besides these layers', which nothing would fit."""
        model = self.transformer.model
        if model.base_model is model:  # NorBERT's encoder and head are not told apart by a name
            return False
        known = {id(each) for part in (model.base_model, dense, norm, self.decoder) for each in part.parameters()}
        others = [each for each in model.parameters() if id(each) not in known]
        return any(each.shape != self.decoder.bias.shape for each in others)


# ------------------------------------------------------------------------------------------- the steps
def _sample(transformer: Transformer, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Different texts, spread evenly over all, with about MOST_TOKENS tokens; of these, the ones that are held out."""
    different = list(dict.fromkeys(texts))
    longest = transformer.max_seq_length
    probe = different[:: max(1, len(different) // 100)]
    length = sum(min(len(ids), longest) for ids in transformer.tokenizer(probe, verbose=False)["input_ids"]) / len(
        probe
    )
    chosen = different[:: max(1, round(len(different) * length / MOST_TOKENS))]
    held_out = chosen[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [text for number, text in enumerate(chosen, 1) if number % HELD_OUT_EVERY], held_out


def _best_projection(
    states: Tensor, tokens: Tensor, words: Tensor, held_out: tuple[Tensor, Tensor], with_bias: bool
) -> tuple[float, Tensor]:
    """The ridge regression by which most held-out tokens have their own word's logit as the largest, and their share.

    A token weighs 1/sqrt(its count), so that frequent words do not decide alone.
    """
    weight = torch.bincount(tokens, minlength=len(words)).double()[tokens].rsqrt()[:, None]
    inputs = _with_ones(states, with_bias).double()
    gram, targets = (inputs * weight).T @ inputs, (inputs * weight).T @ words[tokens].double()
    best: tuple[float, Tensor] = (-1.0, torch.empty(0))
    for ridge in RIDGES:
        damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
        projection = torch.linalg.solve(damped, targets)
        projection *= PROJECTED / (inputs @ projection).square().mean().sqrt()
        logits = _project(held_out[0], projection.float()) @ words.T
        own = (logits.argmax(1) == held_out[1]).float().mean().item()
        if own > best[0]:
            best = own, projection.float()
    return best


def _set_decoder(head: Head, words: Tensor, level: Tensor, texts: list[str], active_dims: int) -> tuple[float, float]:
    """Choose cut-off and scale on held-out texts and set the decoder. Returns their active dims and share of own words."""
    special = head.transformer.tokenizer.all_special_ids
    unit, highest, own_words, own_logits = words / words.shape[1] ** 0.5, [], [], []
    for hidden, ids, real in head.projected(texts):
        above = 2.0  # logits are cosines: over 0 with this, so that log1p and relu can be taken back
        maxima = splade_max(hidden, unit, above - level, real).expm1() - above
        maxima[:, special] = -torch.inf
        highest.append(maxima)
        is_word = real & ~torch.isin(ids, torch.tensor(special))
        own = torch.zeros_like(maxima, dtype=torch.bool)
        own[is_word.nonzero()[:, 0], ids[is_word]] = True
        own_words.append(own)
        own_logits.append(maxima[own])
    maxima, own, logits = torch.cat(highest), torch.cat(own_words), torch.cat(own_logits)
    cut = maxima.flatten().topk(min(active_dims * len(maxima) + 1, maxima.numel())).values[-1]
    if not (logits > cut).any():
        raise ConfigError(
            f"model.head_dims: at {active_dims} active dims, no word of a text is active in its own vector. Raise it"
        )
    scale = OWN_LOGIT / (logits[logits > cut].median() - cut)
    head.set_decoder(unit * scale, -(level + cut) * scale)
    active = maxima > cut
    return active.sum(1).float().mean().item(), (active & own).sum().item() / own.sum().item()


def _biases(transformer: Transformer) -> list[nn.Parameter]:
    """The biases with a number for each word, each once: BERT and RoBERTa have a second, often tied to the decoder's."""
    return list({id(each): each for each in weights_by_piece(transformer.model) if each.ndim == 1}.values())


def _own_level(projected: Tensor, tokens: Tensor, words: Tensor) -> Tensor:
    """The mean logit of each word's own tokens, [words]; those of few tokens lean on the mean of all."""
    logits = (projected * words[tokens]).sum(1)
    count = torch.bincount(tokens, minlength=len(words))
    total = torch.zeros(len(words)).index_add_(0, tokens, logits)
    return (total + PRIOR_TOKENS * logits.mean()) / (count + PRIOR_TOKENS)


def _project(states: Tensor, projection: Tensor) -> Tensor:
    """What the decoder reads, divided by the square root of its width: without mean, and of length 1."""
    projected = _with_ones(states, len(projection) > states.shape[1]) @ projection
    return normalize(projected - projected.mean(1, keepdim=True), dim=1)


def _with_ones(states: Tensor, with_bias: bool) -> Tensor:
    return torch.cat([states, torch.ones(len(states), 1)], dim=1) if with_bias else states
