"""A base model's vocabulary cut to what texts use: pieces and vectors stay, numbers change, and nothing becomes unknown."""

import json
import subprocess
import sys
from itertools import chain

import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.checkpoints import DOCUMENTS, QUERIES, SHAPE, write_dense, write_modernbert
from tests.conftest import ROOT, run_trainer
from tests.standins import COMMIT, SHAPES, write_norbert
from tests.test_models import build, config_of, dense_vectors
from tests.test_normalizers import KINDS
from trainer.config import ConfigError, load_config
from trainer.config.schema import ModelConfig
from trainer.data.vocabulary_texts import read_vocabulary_texts
from trainer.encoding.stock import encode_both
from trainer.models import cut_vocabulary as module
from trainer.models.build import build_model, fetch_base_model
from trainer.models.cut_tokenizer import CannotBeCut, cut_tokenizer, needed_pieces
from trainer.models.cut_vocabulary import ReadTexts, cut_to_texts, vocabulary_cut
from trainer.models.normalizers import compose_first
from trainer.publish.publish import encode_in_a_fresh_process, largest_difference
from trainer.training.describe import vocabulary_lines

# The tokenizers were made of all of these texts. Those that are counted use some of the pieces.
COUNTED, OTHERS = [QUERIES[0], DOCUMENTS[0]], DOCUMENTS[1:]
NOTHING = {"query": "", "document": ""}
TEXTS = ReadTexts([QUERIES[0]], [DOCUMENTS[0]], NOTHING)
FAMILIES = {
    BertConfig: (BertForMaskedLM, {"max_position_embeddings": 64}),
    RobertaConfig: (RobertaForMaskedLM, {"max_position_embeddings": 66}),
}


def model_config(**keys):
    return ModelConfig.model_validate(
        {"base_model": "a/model", "architecture": "splade", "vocabulary": "texts"} | keys, strict=False
    )


def write(folder, kind):
    """A tokenizer of this kind and a masked language model for it, as a base model is saved."""
    make, family = KINDS[kind]
    tokenizer = make()
    network, shape = FAMILIES[BertConfig if family is BertConfig else RobertaConfig]
    torch.manual_seed(1)
    config = network.config_class(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape, **SHAPE)
    network(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder, task="fill-mask"):
    return Transformer(str(folder), transformer_task=task)


def save(transformer, folder):
    transformer.model.save_pretrained(folder)
    transformer.tokenizer.save_pretrained(folder)
    return folder


def pieces(tokenizer, texts):
    return [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts)["input_ids"]]


def all_pieces(tokenizer, texts):
    """Every piece of the texts, as often as it is there."""
    return list(chain.from_iterable(pieces(tokenizer, texts)))


def by_id(tokenizer):
    """The pieces in the order of their ids."""
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    return sorted(vocabulary, key=vocabulary.get)


@torch.no_grad()
def computed(transformer, text):
    """Logits, or hidden states, of a text."""
    return transformer.eval()(transformer.preprocess([text]))["token_embeddings"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A WordPiece base model."""
    return write(tmp_path_factory.mktemp("wordpiece"), "wordpiece")


@pytest.fixture(scope="module", params=KINDS)
def models_of_a_kind(request, tmp_path_factory):
    """A base model, the same with its vocabulary cut, and that opened from where it was saved."""
    base = write(tmp_path_factory.mktemp("base"), request.param)
    whole, cut = load(base), load(base)
    for each in (whole, cut):
        compose_first(each.tokenizer)  # as every base model is loaded
    cut_to_texts(cut, model_config(), TEXTS)
    return whole, cut, load(save(cut, tmp_path_factory.mktemp("cut")))


# ---------------------------------------------------------------------------------- the whole
def test_counted_texts_keep_their_pieces_and_what_the_model_computes_of_them(models_of_a_kind):
    whole, cut, _ = models_of_a_kind
    before, after = by_id(whole.tokenizer), by_id(cut.tokenizer)
    assert len(after) < len(before)
    assert after == [piece for piece in before if piece in after]
    assert pieces(cut.tokenizer, COUNTED) == pieces(whole.tokenizer, COUNTED)
    kept = [before.index(piece) for piece in after]
    for text in COUNTED:
        assert torch.allclose(computed(cut, text), computed(whole, text)[..., kept], atol=1e-5)
    config = cut.model.config
    assert config.vocab_size == len(after)
    assert config.pad_token_id == cut.tokenizer.pad_token_id == after.index(cut.tokenizer.pad_token)


def test_other_texts_are_spelled_with_shorter_pieces_and_nothing_becomes_unknown(models_of_a_kind):
    whole, cut, _ = models_of_a_kind
    before, after = all_pieces(whole.tokenizer, OTHERS), all_pieces(cut.tokenizer, OTHERS)
    assert cut.tokenizer.unk_token not in after + before
    assert len(after) > len(before)
    read = [each.tokenizer.batch_decode(each.tokenizer(OTHERS)["input_ids"]) for each in (whole, cut)]
    assert read[0] == read[1]


def test_a_cut_model_opens_again_with_the_same_ids_and_outputs(models_of_a_kind):
    _, cut, again = models_of_a_kind
    assert again.tokenizer.is_fast
    assert again.tokenizer(DOCUMENTS)["input_ids"] == cut.tokenizer(DOCUMENTS)["input_ids"]
    assert again.tokenizer.special_tokens_map == cut.tokenizer.special_tokens_map
    assert again.tokenizer.model_input_names == cut.tokenizer.model_input_names
    for text in DOCUMENTS:
        assert torch.allclose(computed(again, text), computed(cut, text), atol=1e-6)


def test_a_model_without_a_head_keeps_its_hidden_states(written):
    whole, cut = load(written, "feature-extraction"), load(written, "feature-extraction")
    cut_to_texts(cut, model_config(), TEXTS)
    assert len(cut.tokenizer) < len(whole.tokenizer)
    for text in COUNTED:
        assert torch.allclose(computed(cut, text), computed(whole, text), atol=1e-5)


ALONE = """
import json, sys
from transformers import AutoTokenizer
opened = [AutoTokenizer.from_pretrained(folder) for folder in sys.argv[2:]]
assert all(each.is_fast for each in opened) and not {"trainer", "tests"} & set(sys.modules)
print(json.dumps([each(json.loads(sys.argv[1]))["input_ids"] for each in opened]))
"""


@pytest.mark.slow
def test_cut_tokenizers_give_the_same_ids_in_a_process_without_code_of_ours(tmp_path):
    expected, folders = [], []
    for kind in KINDS:
        transformer = load(write(tmp_path / kind, kind))
        cut_to_texts(transformer, model_config(), TEXTS)  # as it is loaded, a tokenizer of its family's own class
        folders.append(save(transformer, tmp_path / f"{kind} cut"))
        expected.append(transformer.tokenizer(DOCUMENTS)["input_ids"])
    command = [sys.executable, "-I", "-c", ALONE, json.dumps(DOCUMENTS), *map(str, folders)]
    assert json.loads(subprocess.run(command, check=True, capture_output=True, cwd=tmp_path).stdout) == expected


# ---------------------------------------------------------------------------------- what each kind needs
def content(model, added=(), processor=None):
    """A tokenizer's tokenizer.json."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(added))
    if processor is not None:
        tokenizer.post_processor = processor
    return json.loads(tokenizer.to_str())


def cut(tokenizer, *used):
    """The tokenizer with the pieces that these need."""
    return cut_tokenizer(tokenizer, needed_pieces(tokenizer, set(used)))[0]


def test_a_piece_of_bpe_brings_the_pieces_that_it_is_merged_from():
    letters = ["a", "b", "c", "d"]
    merges = [("a", "b"), ("c", "d"), ("ab", "c"), ("ab", "cd"), ("d", "a")]
    bpe = models.BPE(
        {piece: number for number, piece in enumerate([*letters, "ab", "cd", "abc", "abcd", "da"])}, merges
    )
    after = cut(content(bpe), "abcd")
    assert after.get_vocab() == {"a": 0, "b": 1, "c": 2, "d": 3, "ab": 4, "cd": 5, "abcd": 6}
    assert json.loads(after.to_str())["model"]["merges"] == [["a", "b"], ["c", "d"], ["ab", "cd"]]
    assert [after.encode(text).tokens for text in ("abcd", "abc", "da")] == [["abcd"], ["ab", "c"], ["d", "a"]]


def test_a_bpe_of_bytes_keeps_them():
    vocabulary = {f"<0x{number:02X}>": number for number in range(256)} | {"a": 256, "ab": 257, "b": 258}
    bpe = models.BPE(vocabulary, [("a", "b")], byte_fallback=True)
    assert cut(content(bpe)).encode("abå").tokens == ["a", "b", "<0xC3>", "<0xA5>"]


def test_a_cut_unigram_weighs_unknown_characters_as_before():
    """An unknown character costs 10 more than the least likely piece, here 60. Without `er`, it would cost 50."""
    scores = {"<unk>": 0, "w": -15, "wx": -1, "x": -20, "xq": -40, "e": -20, "r": -20, "er": -50}
    whole = content(models.Unigram([(piece, float(score)) for piece, score in scores.items()], unk_id=0))
    after = cut(whole, "w", "wx", "xq")
    assert after.encode("wxq").tokens == Tokenizer.from_str(json.dumps(whole)).encode("wxq").tokens == ["w", "xq"]
    assert cut_tokenizer(whole, set(scores) - {"er"})[0].encode("wxq").tokens == ["wx", "q"]


def test_a_character_without_a_piece_of_its_own_keeps_the_pieces_that_spell_it():
    words = ["[UNK]", "a", "##a", "b", "##b", "ab", "aq", "##qb", "qab"]
    wordpiece = models.WordPiece({piece: number for number, piece in enumerate(words)}, unk_token="[UNK]")
    after = cut(content(wordpiece), "a")
    assert after.get_vocab().keys() == set(words) - {"ab"}
    assert after.encode("ab aq aqb").tokens == ["a", "##b", "aq", "aq", "##b"]
    unigram = [("<unk>", 0.0), ("▁a", -1.0), ("a", -1.0), ("b", -1.0), ("ab", -1.0), ("▁ab", -1.0), ("bq", -9.0)]
    assert cut(content(models.Unigram(unigram, unk_id=0))).get_vocab().keys() == {"<unk>", "▁a", "a", "b", "bq"}


PROCESSORS = {
    "template": lambda: processors.TemplateProcessing("[A] $A [B]", special_tokens=[("[A]", 5), ("[B]", 6)]),
    "bert": lambda: processors.BertProcessing(("[B]", 6), ("[A]", 5)),
    "roberta": lambda: processors.RobertaProcessing(("[B]", 6), ("[A]", 5), trim_offsets=False, add_prefix_space=False),
    "sequence": lambda: processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.BertProcessing(("[B]", 6), ("[A]", 5))]
    ),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_is_put_around_a_text_has_the_new_ids(kind):
    words = ["[UNK]", "a", "##a", "aa", "aaa", "[A]", "[B]"]
    wordpiece = models.WordPiece({piece: number for number, piece in enumerate(words)}, unk_token="[UNK]")
    after = cut(content(wordpiece, processor=PROCESSORS[kind]()), "a")
    encoded = after.encode("aaa")
    assert encoded.tokens == ["[A]", "a", "##a", "##a", "[B]"]
    assert encoded.ids == [after.token_to_id(token) for token in encoded.tokens] == [3, 1, 2, 2, 4]


def test_a_tokenizer_of_whole_words_is_not_cut():
    with pytest.raises(CannotBeCut, match="WordLevel"):
        cut(content(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")))


# ---------------------------------------------------------------------------------- models
def build_cut(folder, base, architecture, *overrides, queries=TEXTS.queries, documents=TEXTS.documents):
    """The model of a run that trains on these texts."""
    config = config_of(folder, base, architecture, "model.vocabulary=texts", *overrides)
    return build_model(config, fetch_base_model(config), queries, documents, "cpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_norbert_gives_the_same_vectors_with_the_words_that_are_kept(tmp_path, shape):
    base = write_norbert(tmp_path, shape)
    trust = ("model.trust_remote_code=true", f"model.revision={COMMIT}")
    whole, cut = build(tmp_path, base, "splade", *trust), build_cut(tmp_path, base, "splade", *trust)
    before, after = by_id(whole.tokenizer), by_id(cut.tokenizer)
    assert len(after) < len(before)
    columns = [before.index(piece) for piece in after]
    expected = dense_vectors(whole, COUNTED)[:, columns]
    assert expected.max() > 0
    assert dense_vectors(cut, COUNTED) == pytest.approx(expected, abs=1e-5)


def test_padding_keeps_its_id_where_positions_are_counted_from_it(tmp_path):
    """RoBERTa counts positions from pad_token_id + 1 on, here 7: nothing that stands before it may go."""
    words = ["<s>", "</s>", "<unk>", "aa", "bb", "cc", "<pad>", "a", "##a", "b", "##b", "c", "##c", "dd", "d", "##d"]
    wordpiece = models.WordPiece({piece: number for number, piece in enumerate(words)}, unk_token="<unk>")
    backend = Tokenizer(wordpiece)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    config = RobertaConfig(vocab_size=len(words), max_position_embeddings=80, pad_token_id=6, **SHAPE)
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    transformer = load(tmp_path)
    before = computed(transformer, "a b c")
    cut_to_texts(transformer, model_config(), ReadTexts(["a"], ["b c"], NOTHING))
    assert transformer.tokenizer.get_vocab().keys() == set(words) - {"dd"}
    assert transformer.tokenizer.pad_token_id == transformer.model.config.pad_token_id == 6
    kept = [number for number, word in enumerate(words) if word != "dd"]
    assert torch.allclose(computed(transformer, "a b c"), before[..., kept], atol=1e-5)


def test_an_inference_free_model_has_a_weight_and_a_dimension_for_each_piece(tmp_path):
    """ModernBERT's 13 entries that pad the vocabulary go too. A query's first word keeps its piece, which has a blank."""
    base = write_modernbert(tmp_path / "base")
    model = build_cut(tmp_path, base, "inference-free-splade", queries=["ligger"], documents=["hvad", "Vänern"])
    (query,), (document, _) = (model[0].sub_modules[side] for side in ("query", "document"))
    assert pieces(query.tokenizer, ["ligger"]) == [["[CLS]", "Ġligger", "[SEP]"]]
    assert len(pieces(document.tokenizer, ["ligger"])[0]) > 3
    network, size = document.model, len(by_id(document.tokenizer))
    assert query.tokenizer.get_vocab() == document.tokenizer.get_vocab()
    assert len(query.weight) == len(network.get_input_embeddings().weight) == network.config.vocab_size == size
    assert network.get_output_embeddings().out_features == size


def test_a_csr_model_encodes_as_before_and_opens_in_plain_sentence_transformers(tmp_path):
    dense = write_dense(tmp_path)
    keys = ("model.vocabulary=texts", 'model.prompts={"query": "spørsmål: "}')
    torch.manual_seed(3)
    whole = build(tmp_path, dense, "csr", keys[1])
    torch.manual_seed(3)
    cut = build(tmp_path, dense, "csr", *keys)  # counts all of these texts
    assert vocabulary_cut(whole) is None
    assert vocabulary_cut(cut).changed == 0
    before = dense_vectors(whole, QUERIES, "query")
    assert dense_vectors(cut, QUERIES, "query") == pytest.approx(before, abs=1e-5)
    cut.save_pretrained(str(tmp_path / "saved"))
    again = SparseEncoder(str(tmp_path / "saved"), device="cpu")
    assert dense_vectors(again, QUERIES, "query") == pytest.approx(before, abs=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == vocabulary_cut(cut).pieces


def test_a_model_with_numbers_for_each_piece_elsewhere_is_not_cut(written):
    transformer = load(written)
    transformer.model.register_buffer("frequencies", torch.ones(len(transformer.tokenizer)))
    with pytest.raises(
        ConfigError, match="cannot be cut: BertForMaskedLM has numbers for each piece in frequencies too"
    ):
        cut_to_texts(transformer, model_config(), TEXTS)


def test_a_model_that_computes_something_else_with_other_ids_is_not_cut(written):
    transformer = load(written, "feature-extraction")
    transformer.model.get_input_embeddings().register_forward_hook(lambda table, _, rows: rows * table.num_embeddings)
    with pytest.raises(ConfigError, match=r"BertModel computes something else with other ids for its tokens\. Set"):
        cut_to_texts(transformer, model_config(), TEXTS)


def test_a_model_with_fewer_pieces_than_its_tokenizer_is_not_cut(written):
    transformer = load(written)
    size = len(transformer.tokenizer)
    transformer.tokenizer.add_tokens(["fjordarm"])
    with pytest.raises(ConfigError, match=f"has a token with the id {size}, and BertForMaskedLM {size} pieces"):
        cut_to_texts(transformer, model_config(), TEXTS)


def test_a_tokenizer_in_python_is_not_cut(written):
    transformer = load(written)
    transformer.processor = ByT5Tokenizer()
    with pytest.raises(
        ConfigError, match=r"a/model cannot be cut: its tokenizer is Python code, not a fast tokenizer\."
    ):
        cut_to_texts(transformer, model_config(), TEXTS)


def test_a_text_that_would_have_no_token_left_is_named(tmp_path):
    """`zabxc` was `zab ##xc`. Without `zab`, the longest pieces are `z ##abx`, and there is no `##c`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "q", "z", "##a", "##b", "##x", "zab", "##xc", "##abx"]
    backend = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(tmp_path)
    BertForMaskedLM(BertConfig(vocab_size=len(words), **SHAPE)).save_pretrained(tmp_path)
    transformer = load(tmp_path)
    assert pieces(transformer.tokenizer, ["zabxc"]) == [["zab", "##xc"]]
    with pytest.raises(ConfigError, match=r'leaves the training text "zabxc" without a token\. Lower') as error:
        cut_to_texts(transformer, model_config(), ReadTexts(["z"], ["zabxc"], NOTHING, corpus=["qabx"]))
    assert "\n" not in error.value.format_message()


# ---------------------------------------------------------------------------------- what is counted
def test_pieces_that_are_used_less_often_go_and_prompts_stay(written):
    whole, transformer = load(written).tokenizer, load(written)
    vocabulary = set(whole.get_vocab())
    texts = ReadTexts(["mjøsa"], ["mjøsa ligger", "sjø"], {"query": "største", "document": ""})
    cut_to_texts(transformer, model_config(vocabulary_min_count=2), texts)
    kept = transformer.tokenizer.get_vocab().keys()
    long = {piece for piece in vocabulary - set(whole.all_special_tokens) if len(piece.removeprefix("##")) > 1}
    assert kept & long == long & set(all_pieces(whole, ["mjøsa", "største"]))
    assert transformer.vocabulary_cut.changed == 2  # both that have a word that is there once


def test_the_line_of_the_plan_counts_pieces_parameters_and_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COMPARED_TEXTS", 4)
    base = write_dense(tmp_path)
    config = config_of(tmp_path, base, "csr", "model.vocabulary=texts", "model.vocabulary_min_count=2")
    model = build(tmp_path, base, "csr", "model.vocabulary=texts", "model.vocabulary_min_count=2")
    cut = vocabulary_cut(model)
    whole = AutoTokenizer.from_pretrained(base)
    rows = len(whole) - len(model.tokenizer)
    assert cut.parameters_before - cut.parameters == 32 * rows
    assert cut.bytes_saved == 4 * 32 * rows
    counted = all_pieces(whole, QUERIES + DOCUMENTS)
    used = {piece for piece in counted if counted.count(piece) > 1} - set(whole.all_special_tokens)
    assert list(vocabulary_lines(config, model)) == [
        f"vocabulary  {len(whole)} pieces → {len(model.tokenizer)}: {len(used)} that 8 training texts use 2 times or more, "
        "the others spell any other text",
        f"          {cut.parameters_before:,} → {cut.parameters:,} parameters, 0 MiB less; "
        f"{cut.changed / 4:.1%} of 4 training texts are split differently",
    ]
    assert cut.changed > 0


def test_corpora_are_counted_in_the_place_of_the_training_texts(tmp_path, folder, written):
    lines = tmp_path / "more.jsonl"
    lines.write_text('{"title": "Om", "text": "katten", "source": "a book"}\n{"text": "", "source": "none"}\n')
    texts, notes = read_vocabulary_texts([str(folder), str(lines)])
    assert texts == [*DOCUMENTS, "Om katten"]
    assert notes == [f"{lines}: not read: columns source"]
    transformer = load(written)
    cut_to_texts(transformer, model_config(), ReadTexts(QUERIES, ["den"], NOTHING, corpus=texts))
    assert transformer.vocabulary_cut.texts == 5
    assert transformer.vocabulary_cut.compared == 5  # QUERIES and "den"


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("nowhere", None, "is neither a folder with a corpus.jsonl nor a .jsonl or .parquet file"),
        ("empty.jsonl", '{"text": " "}', "has no text in it"),
        ("other.jsonl", '{"words": "a"}', "there is no column 'text'"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_named(tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_vocabulary_texts([str(tmp_path / name)])
    assert name in error.value.format_message()


@pytest.mark.parametrize(
    "override,message",
    [
        ("model.vocabulary=texts", "'model.vocabulary' is texts, but a model from scratch has no other vocabulary"),
        ("model.vocabulary_texts=[a.jsonl]", "'model.vocabulary_texts' has no effect with model.vocabulary: keep"),
        ("model.vocabulary_min_count=2", "'model.vocabulary_min_count' has no effect with model.vocabulary: keep"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs" / "training_config_quickstart.yaml", [override])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["inference-free-splade", "csr"])
def test_a_run_says_what_was_cut_and_its_model_is_whole_for_others(tmp_path, architecture):
    base = write_dense(tmp_path) if architecture == "csr" else write_modernbert(tmp_path / "base")
    config_of(tmp_path, base, architecture, "model.vocabulary=texts", "training.max_steps=2")
    result = run_trainer(tmp_path, "train", "config.yaml")
    assert result.returncode == 0, result.stderr
    run, final = json.loads((tmp_path / "models/config/run.json").read_text()), tmp_path / "models/config/final"
    cut, whole = run["vocabulary"], AutoTokenizer.from_pretrained(base)
    assert f"\nvocabulary  {len(whole)} pieces → {cut['pieces']}: " in result.stdout
    texts = {"query": QUERIES, "document": DOCUMENTS}
    model = SparseEncoder(str(final), device="cpu")
    assert cut["pieces_before"] == len(whole) > cut["pieces"] == len(model.tokenizer)
    assert largest_difference(encode_both(model, texts), encode_in_a_fresh_process(final, texts)) == 0
    result = run_trainer(tmp_path, "train", "config.yaml", "--resume", "--set", "model.vocabulary=keep")
    assert result.returncode == 2
    assert "model.vocabulary" in result.stderr
    assert "the model in the checkpoint was built with it" in result.stderr
    assert json.loads((tmp_path / "models/config/run.json").read_text())["vocabulary"] == cut
