"""Which word a dimension stands for."""

import pytest
from sentence_transformers import SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

from tests.checkpoints import DOCUMENTS, write_bert, write_modernbert, write_roberta
from trainer.encoding.vocabulary import dims_are_words, term_of, token_of


@pytest.fixture
def splade(tmp_path):
    return SparseEncoder(str(write_bert(tmp_path)), device="cpu")


def test_terms_are_the_librarys_tokens_without_the_marks_of_word_pieces(splade):
    tokens = [token for row in splade.decode(splade.encode(DOCUMENTS, show_progress_bar=False)) for token, _ in row]
    ids = splade.tokenizer.convert_tokens_to_ids(tokens)
    assert any(token.startswith("##") for token in tokens)
    assert [term_of(splade, number) for number in ids] == [token.removeprefix("##") for token in tokens]


def test_a_byte_level_term_is_shown_as_it_is_read_and_half_a_letter_by_its_name(tmp_path):
    model = SparseEncoder(str(write_roberta(tmp_path)), device="cpu")
    number = model.tokenizer.convert_tokens_to_ids
    assert term_of(model, number("ĠstÃ¸rste")) == "største"
    assert term_of(model, number("Ã")) == "Ã"
    assert term_of(model, number("Ġ")) == "Ġ"


def test_an_entry_of_a_padded_vocabulary_is_a_dimension_without_a_word(tmp_path):
    model = SparseEncoder(str(write_modernbert(tmp_path)), device="cpu")
    tokens = len(model.tokenizer)
    assert term_of(model, tokens - 1) == "Østlandet"
    assert term_of(model, tokens) == f"dimension {tokens}"
    assert token_of(model, tokens) is None
    assert dims_are_words(model)


def test_an_autoencoders_dimensions_are_no_words_even_when_there_are_as_many_as_tokens(tmp_path, splade):
    transformer = Transformer(str(write_bert(tmp_path / "dense")))
    count = len(transformer.tokenizer)
    autoencoder = SparseAutoEncoder(input_dim=32, hidden_dim=count, k=8, k_aux=8)
    model = SparseEncoder(modules=[transformer, Pooling(32, "mean"), autoencoder], device="cpu")
    assert model.get_embedding_dimension() == count
    assert not dims_are_words(model)
    assert (token_of(model, 7), term_of(model, 7)) == (None, "dimension 7")
    assert dims_are_words(splade)
