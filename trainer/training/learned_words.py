"""The words that a model adds to documents: a search engineer sees what training has taught."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from sentence_transformers import SparseEncoder

from trainer.data.beir import SearchSet
from trainer.encoding.vocabulary import dims_are_words
from trainer.models.attention import with_padded_attention
from trainer.system.progress_bar import in_columns

DOCUMENTS = 4
WORDS_PER_DOCUMENT = 6
# Passages whose words are known as words. 10,000 have nearly all words that are a dimension, and are read in a second.
PASSAGES_READ = 10_000
SHOWN_CHARACTERS = 60
WORD = re.compile(r"[^\W\d_]{2,}")


def learned_lines(model: SparseEncoder, searches: list[SearchSet]) -> Iterator[str]:
    """A line for each of some passages of the last search set: the words that the model adds to it.

    Nothing where there is no search set, where dimensions are not words (CSR), and for a passage that gains no word.
    """
    if not searches or not dims_are_words(model):
        return
    passages = list(islice(searches[-1].corpus.values(), PASSAGES_READ))
    texts = spread(passages, DOCUMENTS)
    words = chain.from_iterable(map(WORD.findall, chain(searches[-1].queries.values(), passages)))
    for text, gained in zip(texts, added_words(model, texts, words), strict=True):
        if gained:
            shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1].rstrip()}…"
            yield in_columns("learned", f'"{shown}": + {", ".join(gained[:WORDS_PER_DOCUMENT])}')


def spread(passages: list[str], count: int) -> list[str]:
    """Up to `count` of the passages, from all parts of their order. One further on in each part, since languages or sources
    often take turns."""
    part = max(1, len(passages) // count)
    return [
        passages[min(number * part + number % part, len(passages) - 1)] for number in range(min(count, len(passages)))
    ]


def added_words(model: SparseEncoder, texts: list[str], words: Iterable[str]) -> list[list[str]]:
    """For each text, the words that its document vector holds and it does not, heaviest first.

    words: what counts as a word. Of these, only those are found that the tokenizer does not take apart, so that a
    dimension is the whole word. Empty lists where dimensions are not words.
    """
    if not dims_are_words(model):
        return [[] for _ in texts]
    with with_padded_attention(model):
        vectors = model.encode_document(texts, show_progress_bar=False, convert_to_sparse_tensor=False)
    word_of = whole_words(model, words)
    added = []
    for text, vector in zip(texts, vectors.cpu(), strict=True):
        own = set(re.findall(r"\w+", text.casefold()))
        heaviest = vector.argsort(descending=True)[: int((vector > 0).sum())].tolist()
        named = (word_of[dim] for dim in heaviest if dim in word_of)
        added.append(list(dict.fromkeys(word for word in named if word not in own)))
    return added


def whole_words(model: SparseEncoder, words: Iterable[str]) -> dict[int, str]:
    """The word of each dimension that is one, in lower case."""
    different = list(dict.fromkeys(words))
    if not different:
        return {}
    # byte-level tokenizers keep the space before a word in its token
    spaced = [f" {word}" for word in different]
    ids = model.tokenizer(spaced, add_special_tokens=False, verbose=False)["input_ids"]
    unknown = model.tokenizer.unk_token_id
    pairs = zip(ids, different, strict=True)
    return {tokens[0]: word.casefold() for tokens, word in pairs if len(tokens) == 1 and tokens[0] != unknown}
