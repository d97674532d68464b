"""The words that a document gains, as they are printed after training."""

import pytest
import torch
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

from trainer.data.beir import SearchSet
from trainer.training.learned_words import added_words, learned_lines, spread

# The word pieces of a tokenizer: dimension by dimension.
PIECES = ["[UNK]", "sykehuset", "sjukhuset", "sygehuset", "##huset", "i", ".", "12", "Bodø", "sju"]


class Tokenizer:
    unk_token_id = 0

    def __len__(self):
        return len(PIECES)

    def __call__(self, texts, **options):
        return {"input_ids": [[PIECES.index(text.strip())] if text.strip() in PIECES else [0, 4] for text in texts]}


class Model:
    """Gives a text the vector written down for it."""

    def __init__(self, vectors, *modules):
        self.vectors, self.own, self.tokenizer = vectors, modules, Tokenizer()

    def __iter__(self):
        return iter(())

    def modules(self):
        return iter(self.own)

    def encode_document(self, texts, **options):
        rows = torch.zeros(len(texts), len(PIECES))
        for row, text in zip(rows, texts, strict=True):
            for dim, weight in self.vectors[text].items():
                row[dim] = weight
        return rows


TEXT = "Sykehuset i Bodø."
VECTOR = {0: 9.0, 1: 3.0, 2: 1.5, 3: 2.5, 4: 4.0, 5: 1.0, 6: 5.0, 7: 6.0, 8: 1.0, 9: 0.5}
WORDS = ["sykehuset", "sjukhuset", "sygehuset", "i", "Bodø", "ambulanse"]


def test_the_words_a_document_gained_are_whole_words_it_does_not_say_heaviest_first():
    assert added_words(Model({TEXT: VECTOR}), [TEXT], WORDS) == [["sygehuset", "sjukhuset"]]
    assert added_words(Model({TEXT: {1: 3.0, 2: 0.0}}), [TEXT], WORDS) == [[]]


def test_no_words_are_told_where_dimensions_are_none():
    assert added_words(Model({TEXT: VECTOR}, SparseAutoEncoder(4, 8, 2, 2)), [TEXT], WORDS) == [[]]


def test_a_line_is_printed_for_a_passage_that_gained_words():
    search = SearchSet("x", {"q": "sjukhuset, sygehuset"}, {"a": TEXT, "b": "i"}, {"q": {"a": 1}})
    assert list(learned_lines(Model({TEXT: VECTOR, "i": {5: 1.0}}), [search])) == [
        f'learned   "{TEXT}": + sygehuset, sjukhuset'
    ]
    assert list(learned_lines(Model({}), [])) == []


@pytest.mark.parametrize("passages", range(1, 40))
def test_passages_come_from_all_parts_of_the_corpus_and_none_twice(passages):
    found = spread([str(number) for number in range(passages)], 4)
    assert len(set(found)) == len(found) == min(passages, 4)
    assert found[0] == "0"
