"""Tokenizers that bring texts into Unicode's form NFC themselves, also when others open what was saved."""

import json
import struct
import subprocess
import sys
import unicodedata
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.trainers import UnigramTrainer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    ByT5Tokenizer,
    RobertaConfig,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
)

from tests.checkpoints import DOCUMENTS, QUERIES, SIZE, byte_level_tokenizer, nfd
from trainer.config import ConfigError
from trainer.data.sources import QUICKSTART
from trainer.export.graph import copy_of
from trainer.models.normalizers import compose_first
from trainer.models.queries import query_tokenizer
from trainer.models.scratch import train_tokenizer
from trainer.training.describe import tokenizer_lines

# Bokmål, Danish, Swedish, Nynorsk, Northern Sámi, Icelandic, Faroese, Finnish, and what else is typed.
NORDIC = [
    *QUERIES,
    *DOCUMENTS,
    *(json.loads(line)["context"] for line in (QUICKSTART / "scandi_qa.jsonl").read_text("utf-8").splitlines()[:60]),
    "Máhtán lea Kárášjogas ja Čáhcesuolu; ŋ, đ, ŧ, š ja ž.",
    "Þórður á Íslandi, Føroyar og Ánur, yö Äänekoskella.",
    "ÅNGSTRÖM Ærø\tcafé ﬁ ½ 30 µm – «på» 😀 漢字",
]
SPECIAL = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
# sentencepiece's table of characters, without an entry: 256 empty nodes of its trie.
NO_RULES = struct.pack("<I", 1024) + bytes(1024)


def wordpiece():
    return train_tokenizer(SIZE, QUERIES + DOCUMENTS)


def bert():
    """As a BERT from the hub has it: its class builds the normaliser anew."""
    return BertTokenizer(vocab=wordpiece().get_vocab(), strip_accents=False)


def byte_level():
    return byte_level_tokenizer(SPECIAL, "<s>", "</s>")


def roberta():
    bpe = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    return RobertaTokenizer(vocab=bpe["vocab"], merges=[tuple(merge) for merge in bpe["merges"]])


def xlm_roberta():
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    unigram.train_from_iterator(
        QUERIES + DOCUMENTS,
        UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    vocabulary = [tuple(piece) for piece in json.loads(unigram.to_str())["model"]["vocab"]]
    return XLMRobertaTokenizer(vocab=[*vocabulary, ("<mask>", 0.0)], _spm_precompiled_charsmap=NO_RULES)


KINDS = {
    "wordpiece": (wordpiece, BertConfig),
    "bert": (bert, BertConfig),
    "byte level": (byte_level, RobertaConfig),
    "roberta": (roberta, RobertaConfig),
    "xlm-roberta": (xlm_roberta, XLMRobertaConfig),
}
ALONE = """
import json, sys
from transformers import AutoTokenizer
print(json.dumps([AutoTokenizer.from_pretrained(folder)(json.loads(sys.argv[1]))["input_ids"] for folder in sys.argv[2:]]))
assert not {"trainer", "tests"} & set(sys.modules)
"""


def write(folder, kind):
    """A base model's tokenizer as it is on the hub, and opened from there."""
    make, config = KINDS[kind]
    make().save_pretrained(folder)
    config().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_decomposed_texts_get_the_ids_of_composed_ones_and_those_stay_as_they_were(tmp_path, kind):
    assert nfd(NORDIC) != NORDIC == [unicodedata.normalize("NFC", text) for text in NORDIC]
    tokenizer = write(tmp_path, kind)
    before, inputs = tokenizer(NORDIC)["input_ids"], tokenizer.model_input_names
    assert tokenizer(nfd(NORDIC))["input_ids"] != before  # the opposite: as it comes, it tells them apart
    compose_first(tokenizer)
    assert tokenizer(NORDIC)["input_ids"] == tokenizer(nfd(NORDIC))["input_ids"] == before
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(nfd(NORDIC))["input_ids"] == before
    assert (again.model_input_names, again.special_tokens_map) == (inputs, tokenizer.special_tokens_map)


@pytest.mark.slow
def test_what_was_saved_composes_in_a_process_without_code_of_ours(tmp_path):
    expected, folders = [], []
    for kind in KINDS:
        tokenizer = write(tmp_path / kind, kind)
        compose_first(tokenizer)
        for side, each in (("document", tokenizer), ("query", query_tokenizer(tokenizer))):
            each.save_pretrained(tmp_path / kind / side)
            expected.append(each(NORDIC)["input_ids"])
            folders.append(str(tmp_path / kind / side))
    command = [sys.executable, "-I", "-c", ALONE, json.dumps(nfd(NORDIC)), *folders]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == expected


@pytest.mark.parametrize("kind", ["byte level", "roberta"])
def test_the_space_in_front_of_a_query_outlasts_saving(tmp_path, kind):
    query_tokenizer(write(tmp_path, kind)).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    alone, later = (again(text, add_special_tokens=False)["input_ids"] for text in ("innsjø", "Norges innsjø"))
    assert later[-len(alone) :] == alone


@pytest.mark.parametrize(
    "own", [normalizers.NFC(), normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])]
)
def test_a_tokenizer_that_composes_first_stays_as_it_is(tmp_path, own):
    tokenizer = bert()
    tokenizer.backend_tokenizer.normalizer = own
    before = tokenizer.backend_tokenizer.to_str()
    compose_first(tokenizer)
    assert (tokenizer.backend_tokenizer.to_str(), type(tokenizer)) == (before, BertTokenizer)
    assert not list(tokenizer_lines(SimpleNamespace(tokenizer=tokenizer)))


def test_a_tokenizer_in_python_stays_as_it_is_and_this_is_said():
    tokenizer = ByT5Tokenizer()
    before = tokenizer(NORDIC)["input_ids"]
    compose_first(tokenizer)
    assert tokenizer(NORDIC)["input_ids"] == before
    (line,) = tokenizer_lines(SimpleNamespace(tokenizer=tokenizer))
    assert line.startswith(
        "tokenizer does not bring texts into Unicode's form NFC: it is Python code, to which nothing"
    )
    with pytest.raises(ConfigError, match=r"^the model's tokenizer, ByT5Tokenizer, is Python code, and this export"):
        copy_of(tokenizer)
    with pytest.raises(ConfigError, match=r"another token than the same word later, so queries cannot be matched"):
        query_tokenizer(tokenizer)


def test_a_run_from_before_that_goes_on_keeps_its_tokenizer_and_says_so():
    (line,) = tokenizer_lines(SimpleNamespace(tokenizer=wordpiece()))
    assert line.startswith("tokenizer does not bring texts into Unicode's form NFC: it was saved before")
