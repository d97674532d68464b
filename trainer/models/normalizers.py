"""What is done to a text before it is cut into tokens: Unicode's form NFC first, in whatever opens the saved model."""

from tokenizers.normalizers import NFC, NFKC, Normalizer, Sequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def compose_first(tokenizer: PreTrainedTokenizerBase) -> None:
    """Put NFC in front of a tokenizer's own normaliser: macOS writes `å` as a letter and a mark, which match nothing.

    Texts in NFC keep their ids. A tokenizer in Python has no normaliser to add to, and stays as it is.
    """
    if tokenizer.is_fast and not composes_first(tokenizer):
        set_normalizer(tokenizer, [NFC(), *steps_of(tokenizer)])


def composes_first(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text and its decomposed form get the same ids, whatever the vocabulary."""
    return tokenizer.is_fast and isinstance(next(iter(steps_of(tokenizer)), None), (NFC, NFKC))


def steps_of(tokenizer: PreTrainedTokenizerBase) -> list[Normalizer]:
    """A tokenizer's own normalisers, in their order."""
    own = tokenizer.backend_tokenizer.normalizer
    if own is None:
        return []
    return [own[number] for number in range(len(own))] if isinstance(own, Sequence) else [own]


def set_normalizer(tokenizer: PreTrainedTokenizerBase, steps: list[Normalizer]) -> None:
    """Give a tokenizer other normalisers, which are saved with it."""
    tokenizer.backend_tokenizer.normalizer = Sequence(steps)
    read_whole_file(tokenizer)


def read_whole_file(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have whoever opens the saved tokenizer take its tokenizer.json as it is.

    transformers' classes for single families (BertTokenizer, RobertaTokenizer, XLMRobertaTokenizer) read only the
    vocabulary of a saved tokenizer.json. Its general class takes the file as it is.
    """
    if type(tokenizer).__module__.startswith("transformers."):  # code that comes with a model reads the whole file
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # the family's; saved from here
        tokenizer.__class__ = PreTrainedTokenizerFast
