"""The faults of NorBERT3's and NorBERT4's published code, which keep it from being a sparse encoder or make it a slow one.

They are mended by patterns, not by a diff for each file's SHA-256: several revisions and copies are in use, and the same
patterns convert all that were tried. A revision that they do not fit stops with the name of the fault.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from trainer.encoding.fuse import SILENT
from trainer.models.norbert_inserts import packed, places_of, rebuilt_after_load


@dataclass(frozen=True)
class Change:
    """One fault of the published code, and what takes its place.

    `edits` are (pattern, replacement) pairs; each must match at least once inside class `within` (anywhere when empty),
    and `gone` must not match there afterwards. A revision has the fault if `only_if` matches, unless `unless` does too.
    An `optional` one is left in where it cannot be mended: the model can be trained as it is.
    """

    name: str
    why: str
    edits: tuple[tuple[str, str | Callable[[re.Match], str]], ...]
    gone: str = r"(?!)"
    within: str = ""
    only_if: str = ""
    unless: str = r"(?!)"
    optional: bool = False

    def apply(self, code: str) -> str | None:
        """The code without the fault, or None when this revision does not have it. Raises NotFound with the pattern."""
        whole_class = rf"^class {self.within}\b.*\n(?:(?!\S).*(?:\n|\Z))*"
        place = re.search(whole_class if self.within else r"(?s:.*)", code, re.MULTILINE)
        if place is None:
            raise NotFound(f"this was looked for and not found: class {self.within}")
        part = place[0]
        if re.search(self.unless, part, re.MULTILINE) or not re.search(self.only_if, part, re.MULTILINE):
            return None
        for pattern, replacement in self.edits:
            part, count = re.subn(pattern, replacement, part, flags=re.MULTILINE)
            if not count:
                raise NotFound(f"this was looked for and not found: {pattern}")
        if left := re.search(self.gone, part, re.MULTILINE):
            raise NotFound(f"this is still there: {' '.join(left[0].split())[:100]}")
        return code[: place.start()] + part + code[place.end() :]


class NotFound(Exception):
    """What keeps a change from being made: a pattern that is not found, or a fault in another place."""


def before_the_classes(*functions: Callable) -> tuple[str, Callable[[re.Match], str]]:
    """The edit that copies these functions in front of the first class."""
    source = "".join(f"{inspect.getsource(function)}\n\n" for function in functions)
    return r"\A((?s:.*?))^(?=(?:@.*\n)*class )", lambda found: found[1] + source


# ------------------------------------------------------------------------------------------- what both have
# Patterns of faults, by which a fault is recognised, or is seen to be left in another place.
READS_IS_DECODER = r"config\.is_decoder\b(?!\s*=[^=])"
OUTPUT_WEIGHT = r"def get_output_embeddings\b.*\n +return .*\.weight\b"
REENTRANT = r"\bcheckpoint\.checkpoint\((?![^()]*use_reentrant=False).*"
FIVE_ARGUMENTS = r"\bsoftmax_backward_data\((?!\w+, \w+, \w+\)).*"

# Tables such as RoPE's cosines are not saved with the weights. transformers 5 builds a model without memory behind it, and
# then gives such tables memory that nobody has written to: NaN, or numbers that are slightly wrong.
TABLES = Change(
    "unsaved tables",
    "transformers 5 leaves buffers that are not saved uninitialised after from_pretrained: NaN, or wrong positions",
    (
        # every class that registers one, down to its last indented line
        (r"^(class \w+\b(?=.*\n(?:(?!\S).*\n)*?.*persistent=False))", r"@rebuilt_after_load\n\1"),
        before_the_classes(rebuilt_after_load),
        (
            r"^( +)def _init_weights\(self, (\w+)(?:: [\w.]+)?\)(?: -> None)?:\n",
            r"\g<0>\1    if hasattr(\2, 'rebuild_tables'):\n\1        return \2.rebuild_tables()\n",
        ),
    ),
    only_if="persistent=False",
)

IS_DECODER = Change(
    "is_decoder",
    "transformers 5 has no config.is_decoder",
    ((r"(?<![\w.])((?:self\.)?config)\.is_decoder\b(?!\s*=[^=])", r'getattr(\1, "is_decoder", False)'),),
    gone=READS_IS_DECODER,
    only_if=READS_IS_DECODER,
)

GELU = Change(
    "GELU",
    "its formula, written out, keeps five tensors of the feed-forward network's width, and torch's function one",
    (
        (r"^from transformers\.activations import gelu_new\n", ""),
        (r"\bgelu_new\((\w+)\)", r'F.gelu(\1, approximate="tanh")'),
    ),
    gone=r"^.*\bgelu_new\b.*",
    only_if=r"\bfunctional as F$",
    optional=True,
)

SOFTMAX = Change(
    "masked softmax",
    "a function with a backward pass of its own cannot be exported to OpenSearch",
    (
        (r"\bMaskedSoftmax\.apply\(", "masked_softmax("),
        (
            r"^(?=class MaskedSoftmax\b)",
            "def masked_softmax(x, mask, dim):\n"
            "    if torch.jit.is_tracing():\n"
            '        return x.masked_fill(mask, float("-inf")).softmax(dim).masked_fill(mask, 0.0)\n'
            "    return MaskedSoftmax.apply(x, mask, dim)\n\n\n",
        ),
    ),
    optional=True,
)

# ------------------------------------------------------------------------------------------- NorBERT4
# With torch's function every token sees itself, so that no row is empty. That changes the vectors of padding alone, which
# no text sees. Without the function, for engines with an older torch, an empty row gives 0, as published.
TORCH_ATTENTION = r"""
\1if torch.jit.is_tracing() or self.config._attn_implementation == "eager":
\1    scores = (query @ key.transpose(-1, -2) * self.scale).masked_fill(~attention_mask, float("-inf"))
\1    return self.attention_dropout(scores.softmax(-1).masked_fill(~attention_mask, 0.0)) @ value
\1position = torch.arange(query_length, device=query.device)
\1seen = attention_mask | (position == position[:, None])
\1dropout = self.attention_dropout.p if self.training else 0.0
\1output = F.scaled_dot_product_attention(query, key, value, seen, dropout, scale=self.scale)
""".lstrip("\n")
# From the scores to their use.
PUBLISHED_ATTENTION = (
    r"^( +)attention_scores = torch\.bmm\(.*\n(?:.*\n){1,6}?.*MaskedSoftmax\.apply\(.*\n(?:.*\n){1,6}?"
    r" +output = output\.view\(.*\n"
)
PACKED_ATTENTION = r"""
\1    if isinstance(padding_mask, dict):
\1        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
\1        options = {"dropout": self.attention_dropout.p if self.training else 0.0, "scaling": self.scale}
\1        options |= {"sliding_window": self.window_length + 1} | padding_mask
\1        return attend(self, query, key, value, None, **options)[0].transpose(1, 2)
""".lstrip("\n")
# Texts one after the other without padding, [1, tokens], with where each starts: as transformers passes them to its own
# models. The window is one more than the tokens that are seen on either side.
PACKED = Change(
    "padded texts only",
    "texts could be packed, instead of padded, with the package flash-attention only, and in bf16 only",
    (
        (
            r"^(from transformers\.modeling_utils import )PreTrainedModel$",
            r"\1ALL_ATTENTION_FUNCTIONS, PreTrainedModel",
        ),
        (r"^( +)_supports_flash_attn_2 = True$", r"\g<0>\n\1_supports_flash_attn = _supports_attention_backend = True"),
        (
            r"^(class RotaryPositionalEmbeddings\b(?:.*\n)*? +def forward\(self, x\b[^)]*)\)",
            r"\1, padding_info=None)",
        ),
        (r"^( +)seq_len = x\.shape\[2\]$", r"\1seq_len = places_of(padding_info, x.shape[2])"),
        (r"_matrix\[:, None, :seq_len\b", r"_matrix[:, None, seq_len"),
        (r"^ +def forward\(self, hidden_layer\b[^)]*\bpadding_info\):$", r"\g<0>"),  # the name that the next edits use
        (r"\bself\.rope_embedding\((query|key)\)", r"self.rope_embedding(\1, padding_info)"),
        (r"^( +)def attention_operation\(self, query\b.*:\n(?: +\"\"\".*\n)?", r"\g<0>" + PACKED_ATTENTION),
        (
            r"(\*\*kwargs\n? *\) ?-?>?(?:.*\n)(?:.*\n){0,4}?.*\bself\.get_contextualized_embeddings\([^)]*)\)",
            r"\1, packed_texts=packed(kwargs))",
        ),
        (r"(def get_contextualized_embeddings\([^)]*?),?\n? *\)", r"\1, packed_texts=None)"),
        (
            r"^( +)padding_info = attention_mask$",
            r"\1padding_info = attention_mask if packed_texts is None else packed_texts",
        ),
        (
            r"^( +)(\w+) = torch\.cat\(\[bos_logits, \2\[:, :-1\]\], dim=1\)\n",
            r"\g<0>\1if 'cu_seq_lens_q' in kwargs:  # a text's last token does not foretell the next text's first\n"
            r"\1    \2[:, kwargs['cu_seq_lens_q'][:-1].long()] = 0.0\n",
        ),
        before_the_classes(packed, places_of),
    ),
    optional=True,
)

NORBERT4 = (
    Change(
        "soft cap",
        "30 * sigmoid(x / 7.5) makes every logit positive, so relu cuts nothing and every word is active",
        ((r"^ +(\w+) = [\d.]+ \* torch\.sigmoid\(\1 / [\d.]+\)\n", ""),),
        gone=r"^.*(?:sigmoid|tanh)\b.*",
        within="GptBertForMaskedLM",
    ),
    Change(
        "BOS logit",
        "a made-up logit of 1 makes the beginning-of-sequence token active in every text",
        ((r"^ +\w+\[:, :, self\.config\.bos_token_id\] = [\d.]+\n", ""),),
        gone=r"^.*bos_token_id.*",
        within="GptBertForMaskedLM",
    ),
    Change(
        "logits of every word",
        "zeros as wide as the vocabulary were put before the logits, of which the fused head hands over one",
        ((r"\btorch\.zeros\((\w+)\b.*\bvocab_size\b.*", r"torch.zeros_like(\1[:, :1])"),),
        within="GptBertForMaskedLM",
        optional=True,
    ),
    TABLES,
    Change(
        "tied weights",
        "transformers 5 cannot save a model whose _tied_weights_keys is a list; the weights are not tied",
        ((r"^( +)_tied_weights_keys = \[[^\]]*\]", r"\1_tied_weights_keys = None"),),
        gone=r"^ +_tied_weights_keys\b(?! = None$).*",
    ),
    IS_DECODER,
    Change(
        "output embeddings",
        "get_output_embeddings returned a tensor where callers expect the layer",
        (
            (r"return self\.classifier\.emb2vocab\.weight\b", "return self.classifier.emb2vocab"),
            (r"self\.classifier\.emb2vocab\.weight = ", "self.classifier.emb2vocab = "),
        ),
        gone=OUTPUT_WEIGHT,
    ),
    Change(
        "gradient checkpointing",
        "re-entrant checkpointing breaks with several processes",
        ((r"\buse_reentrant=True", "use_reentrant=False"),),
        gone=REENTRANT,
    ),
    Change(
        "bf16 by GPU",
        "the encoder ran in bf16 on every GPU that can, whatever the weights; now only when autocast says so",
        (
            (
                r"^ +if torch\.cuda\.is_available\(\) and torch\.cuda\.is_bf16_supported\(\)[^\n]*:\n"
                r" +(\w+) = \1\.bfloat16\(\)\n",
                "",
            ),
        ),
        gone=r"^.*is_bf16_supported.*",
    ),
    Change(
        "flash attention",
        "where flash-attention is installed, attention was computed in bf16 whatever the weights, and not at all on a CPU",
        ((r"\bif is_flash_attn_2_available\(\):", "if False:"),),
        gone=r"^.*is_flash_attn_2_available\(\).*",
        only_if="flash_attn",
    ),
    Change(
        "advice",
        "at every start it advised to install flash-attention, which is not used",
        ((r"^ +logger\.warning_once\(\n.*FlashAttention.*\n +\)\n", ""),),
        gone=r"^.*støtter FlashAttention.*",
        optional=True,
    ),
    GELU,
    Change(
        "attention matrix",
        "each layer kept [texts, heads, length, length] weights to train, by a function that cannot be exported",
        ((PUBLISHED_ATTENTION, TORCH_ATTENTION),),
        optional=True,
    ),
    PACKED,
    SOFTMAX,
)

# ------------------------------------------------------------------------------------------- NorBERT3
TIED = """

    _tied_weights_keys = {"classifier.nonlinearity.5.weight": "embedding.word_embedding.weight"}


"""
NORBERT3 = (
    Change(
        "infinite logits",
        "-inf times a padding mask of 0 is NaN, so every batch with padding has a NaN loss",
        ((r"(\[:, :, [^\]\n]*\] = )(?:float\(['\"]-inf['\"]\)|-(?:torch|math)\.inf)", rf"\g<1>{SILENT}"),),
        gone=r"^.*\binf\b.*",
        within="NorbertForMaskedLM",
    ),
    Change(
        "softmax backward",
        "transformers 5's softmax_backward_data takes three arguments, so every backward pass fails with five",
        ((r"\bsoftmax_backward_data\((\w+), (\w+), (\w+), \1\.dim, \3\)", r"softmax_backward_data(\1, \2, \3)"),),
        gone=FIVE_ARGUMENTS,
        only_if=FIVE_ARGUMENTS,
    ),
    TABLES,
    Change(
        "post_init",
        "transformers 5 cannot load a model that does not call post_init",
        ((r"^( +)self\.classifier = .*\n", r"\g<0>\1self.post_init()\n"),),
        within="NorbertModel",
        unless=r"self\.post_init\(\)",
    ),
    Change(
        "tied weights",
        "transformers 5 cannot save shared weights unless a dict says which",
        ((r"(?<!\s)\s*\Z", TIED),),
        within="NorbertForMaskedLM",
        unless=r"^ +_tied_weights_keys = \{",
    ),
    IS_DECODER,
    Change(
        "output embeddings",
        "get_output_embeddings returned a tensor where callers expect the layer",
        (
            (r"return self\.classifier\.nonlinearity\[-1\]\.weight\b", "return self.classifier.nonlinearity[-1]"),
            (r"self\.classifier\.nonlinearity\[-1\]\.weight = new", "self.classifier.nonlinearity[-1] = new"),
        ),
        gone=OUTPUT_WEIGHT,
    ),
    Change(
        "gradient checkpointing",
        "re-entrant checkpointing breaks with several processes",
        ((r"\bcheckpoint\.checkpoint\(([^()]*)\)", r"checkpoint.checkpoint(\1, use_reentrant=False)"),),
        gone=REENTRANT,
        only_if=r"checkpoint\.checkpoint\(",
        unless=r"checkpoint\.checkpoint\([^()]*use_reentrant=False",
    ),
    GELU,
    SOFTMAX,
)
