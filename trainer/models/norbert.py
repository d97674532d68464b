"""Converts the Python code that NorBERT3 and NorBERT4 bring along, so that they can become sparse encoders.

The code is rewritten in a copy of the base model's folder, before it is loaded. Nothing is patched in memory, so every
save carries the converted code, and the model opens anywhere without nordsparse.
"""

import ast
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.config import ConfigError
from trainer.models.heads import SILENT


@dataclass(frozen=True)
class Change:
    """One fault of the published code, and what takes its place.

    `edits` are (pattern, replacement) pairs; each must match at least once inside class `within` (anywhere when empty),
    and `gone` must not match there afterwards. A revision has the fault if `only_if` matches, unless `unless` does too.
    """

    name: str
    why: str
    edits: tuple[tuple[str, str | Callable[[re.Match], str]], ...]
    gone: str = r"(?!)"
    within: str = ""
    only_if: str = ""
    unless: str = r"(?!)"

    def apply(self, code: str) -> str | None:
        """The code without the fault, or None when this revision does not have it. Raises NotFound with the pattern."""
        start, end = class_span(code, self.within)
        part = code[start:end]
        if re.search(self.unless, part, re.MULTILINE) or not re.search(self.only_if, part, re.MULTILINE):
            return None
        for pattern, replacement in self.edits:
            part, found = re.subn(pattern, replacement, part, flags=re.MULTILINE)
            if not found:
                raise NotFound(f"this was looked for and not found: {pattern}")
        if left := re.search(self.gone, part, re.MULTILINE):
            raise NotFound(f"this is still there: {' '.join(left[0].split())[:100]}")
        return code[:start] + part + code[end:]


class NotFound(Exception):
    """What keeps a change from being made: a pattern that is not found, or a fault in another place."""


def class_span(code: str, name: str) -> tuple[int, int]:
    """Where the source of a top-level class starts and ends; the whole file for the empty name. Raises NotFound."""
    if not name:
        return 0, len(code)
    start = re.search(rf"^class {name}\b", code, re.MULTILINE)
    if start is None:
        raise NotFound(f"this was looked for and not found: class {name}")
    end = re.search(r"^\S", code[start.end() :].partition("\n")[2], re.MULTILINE)
    first_line = code.index("\n", start.end()) + 1
    return start.start(), first_line + end.start() if end else len(code)


# ------------------------------------------------------------------------------------------- what both have
# Tables such as RoPE's cosines are not saved with the weights. transformers 5 builds a model without memory behind it, and
# then gives such tables memory that nobody has written to: NaN, or numbers that are slightly wrong.
REBUILD = '''\
def rebuilt_after_load(module_class):
    """Class decorator: tables that are not saved with the weights are computed again once the weights are loaded."""
    build = module_class.__init__

    def __init__(self, *arguments, **options):
        build(self, *arguments, **options)
        self.built_from = arguments, options

    def rebuild_tables(self):
        arguments, options = self.built_from
        fresh = dict(type(self)(*arguments, **options).named_buffers(recurse=False))
        for name, table in self.named_buffers(recurse=False):
            table.copy_(fresh[name])

    module_class.__init__, module_class.rebuild_tables = __init__, rebuild_tables
    return module_class


'''


TABLES = Change(
    "unsaved tables",
    "transformers 5 leaves buffers that are not saved uninitialised after from_pretrained: NaN, or wrong positions",
    (
        # Every class that registers one, down to its last indented line.
        (r"^(class \w+\b(?=.*\n(?:(?!\S).*\n)*?.*persistent=False))", r"@rebuilt_after_load\n\1"),
        (r"\A((?s:.*?))^(?=(?:@.*\n)*class )", lambda found: found[1] + REBUILD),
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
    gone=r"config\.is_decoder\b(?!\s*=[^=])",
    only_if=r"config\.is_decoder\b(?!\s*=[^=])",
)

GELU = Change(
    "GELU",
    "its formula, written out, keeps five tensors of the feed-forward network's width, and torch's function one",
    (
        (r"^from transformers\.activations import gelu_new\n", ""),
        (r"\bgelu_new\((\w+)\)", r'F.gelu(\1, approximate="tanh")'),
    ),
    gone=r"^.*\bgelu_new\b.*",
    only_if=r"\A(?=(?:.*\n)*?.*\bfunctional as F$)(?:.*\n)*?from transformers\.activations import gelu_new$",
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
    only_if=r"^class MaskedSoftmax\b(?:.*\n)*?.*\bMaskedSoftmax\.apply\(",
)

# What must not be left anywhere.
OUTPUT_WEIGHT = r"def get_output_embeddings\b.*\n +return .*\.weight\b"
REENTRANT = r"\bcheckpoint\.checkpoint\((?![^()]*use_reentrant=False).*"
FIVE_ARGUMENTS = r"\bsoftmax_backward_data\((?!\w+, \w+, \w+\)).*"

# ------------------------------------------------------------------------------------------- NorBERT4
# With the function, a token always sees itself, so that no row is empty: that changes what padding sees, and nobody sees
# padding. Without it, for engines with an older torch, an empty row gives 0, as published.
ATTENTION = r"""
\1if torch.jit.is_tracing():
\1    scores = (query @ key.transpose(-1, -2) * self.scale).masked_fill(~attention_mask, float("-inf"))
\1    return scores.softmax(-1).masked_fill(~attention_mask, 0.0) @ value
\1position = torch.arange(query_length, device=query.device)
\1seen = attention_mask | (position == position[:, None])
\1dropout = self.attention_dropout.p if self.training else 0.0
\1output = F.scaled_dot_product_attention(query, key, value, seen, dropout, scale=self.scale)
"""
# From the scores to their use.
PRODUCTS = (
    r"^( +)attention_scores = torch\.bmm\(.*\n(?:.*\n){1,6}?.*MaskedSoftmax\.apply\(.*\n(?:.*\n){1,6}?"
    r" +output = output\.view\(.*\n"
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
        (
            (r"^ +\w+\[:, :, self\.config\.bos_token_id\] = [\d.]+\n", ""),
            # as wide as the logits it is put before, of which the fused head hands over one
            (r"\btorch\.zeros\w*\((\w+)\b.*", r"torch.zeros_like(\1[:, :1])"),
        ),
        gone=r"^.*(?:bos_token_id|config\.vocab_size).*",
        within="GptBertForMaskedLM",
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
        only_if="støtter FlashAttention",
    ),
    GELU,
    # A revision that computes attention in another way is trained as it is.
    Change(
        "attention matrix",
        "each layer kept [texts, heads, length, length] weights to train, by a function that cannot be exported",
        ((PRODUCTS, ATTENTION.lstrip("\n")),),
        only_if=PRODUCTS,
    ),
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


@dataclass(frozen=True)
class Family:
    """What to change in the code of a family of models, and in its config.json."""

    changes: tuple[Change, ...]
    settings: dict[str, bool]


# By the name of the code file, which is the same in every published model of the family.
FAMILIES = {
    "modeling_gptbert.py": Family(NORBERT4, {}),
    "modeling_norbert.py": Family(NORBERT3, {"tie_word_embeddings": True}),
}

# ------------------------------------------------------------------------------------------- conversion
HEADER = "# Converted by nordsparse: {changes}. sha256 of the lines below: {digest}\n"
HEADER_PATTERN = re.compile(r"\A# Converted by nordsparse: (.*)\. sha256 of the lines below: ([0-9a-f]{64})\n")
BESIDE = "beside"  # opens the header of a file that goes with a converted one


def convert_files(texts: dict[str, str], folder: Path, families: dict[str, Family] = FAMILIES) -> dict[str, str]:
    """A model's code files by name, those of a known family converted; `folder` is where errors say that they are.

    The other files then get a first line too. transformers looks a model's class up by its configuration's, so in one
    process two models with different code and the same configuration file would both get the code loaded first.
    """
    converted = {
        name: convert(text, folder / name, families[name].changes) for name, text in texts.items() if name in families
    }
    if not converted:
        return texts
    beside = " and ".join(f"{name} {_digest(text)[:16]}" for name, text in converted.items())
    others = {
        name: _with_header(text, f"{BESIDE} {beside}") if changes_in(text, folder / name) is None else text
        for name, text in texts.items()
        if name not in families
    }
    return converted | others


def convert(code: str, file: Path, changes: tuple[Change, ...]) -> str:
    """The code with every change that its revision needs, under a first line that lists them.

    Converted code comes back as it is. Raises ConfigError when a fault is neither found nor known to be absent, when
    the result is not valid Python, or when converted code was edited.
    """
    if changes_in(code, file) is not None:
        return code
    names = []
    for change in changes:
        try:
            changed = change.apply(code)
        except NotFound as reason:
            raise ConfigError(
                f"model.base_model: {file} is not a revision that can be converted, or was edited by hand: to mend its "
                f"{change.name} ({change.why}) {reason}. Pin another model.revision"
            ) from None
        if changed is not None:
            code = changed
            names.append(change.name)
    try:
        ast.parse(code)
    except SyntaxError as error:
        raise ConfigError(f"model.base_model: {file} is not valid Python once converted: {error}") from None
    return _with_header(code, ", ".join(names))


def changes_in(code: str, file: Path) -> list[str] | None:
    """The names of the changes that were made to this code; None when it was not converted.

    Raises ConfigError when it was edited since.
    """
    header = HEADER_PATTERN.match(code)
    if header is None:
        return None
    if _digest(code[header.end() :]) != header[2]:
        raise ConfigError(
            f"{file} was edited by hand after its conversion. Restore it, or train from the base model again"
        )
    return [] if header[1].startswith(BESIDE) else header[1].split(", ")


def _with_header(code: str, changes: str) -> str:
    return HEADER.format(changes=changes, digest=_digest(code)) + code


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()
