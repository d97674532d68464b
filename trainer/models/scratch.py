"""A small BERT and its WordPiece tokenizer, built from the training texts when there is no base model."""

import math
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import WordPieceTrainer
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from trainer.config.schema import FromScratchConfig

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NORMALIZER = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
PRE_TOKENIZER = pre_tokenizers.BertPreTokenizer()


def build_from_scratch(config: FromScratchConfig, texts: list[str], folder: Path) -> None:
    """Write a BERT for masked-language modelling and its tokenizer into `folder`, as from_pretrained expects them."""
    tokenizer = train_tokenizer(config, texts)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if config.init == "lexical":
        start_as_word_matcher(model, config.lexical_bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(config: FromScratchConfig, texts: list[str]) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer that keeps å, ä, æ, ø and ö apart; the same texts always give the same one."""
    wordpiece = Tokenizer(models.WordPiece(train_vocabulary(config.vocab_size, texts), unk_token="[UNK]"))
    wordpiece.normalizer, wordpiece.pre_tokenizer = NORMALIZER, PRE_TOKENIZER
    wordpiece.decoder = decoders.WordPiece()
    cls, sep = SPECIAL_TOKENS.index("[CLS]"), SPECIAL_TOKENS.index("[SEP]")
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=wordpiece,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=config.max_position_embeddings,
    )


def train_vocabulary(size: int, texts: list[str]) -> dict[str, int]:
    """Word pieces and their ids.

    The library numbers `##x` pieces in the order of a hash map, which differs from run to run, and breaks ties by number.
    Naming them all beforehand, as special tokens of a tokenizer that is then thrown away, settles the order.
    """
    texts = [without_long_words(text) for text in texts]
    words = (word for text in texts for word, _ in PRE_TOKENIZER.pre_tokenize_str(NORMALIZER.normalize_str(text)))
    pieces = [f"##{character}" for character in sorted({character for word in words for character in word})]
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer, wordpiece.pre_tokenizer = NORMALIZER, PRE_TOKENIZER
    trainer = WordPieceTrainer(vocab_size=size, special_tokens=[*SPECIAL_TOKENS, *pieces], show_progress=False)
    wordpiece.train_from_iterator(texts, trainer)
    return wordpiece.get_vocab()


# WordPiece reads a longer word as [UNK] whole, so its pieces would never be used; finding them takes the square of its
# length: a text of 1 MB without a blank took more than 40 s.
LONGEST_WORD = 100


def without_long_words(text: str) -> str:
    """The text without the words that the tokenizer will not take apart."""
    if len(text) <= LONGEST_WORD or not re.search(rf"\S{{{LONGEST_WORD + 1}}}", text):
        return text
    words = PRE_TOKENIZER.pre_tokenize_str(NORMALIZER.normalize_str(text))
    return " ".join(word for word, _ in words if len(word) <= LONGEST_WORD)


@torch.no_grad()
def start_as_word_matcher(model: BertForMaskedLM, bias: float) -> None:
    """Set the weights so that every token activates its own dimension, and hardly any other.

    Random directions in a wide space are nearly orthogonal, so with unit-length embeddings, a head that passes its input
    through and a decoder tied to the embeddings, a token's largest logit is its own. Training then starts from a word
    matcher (nDCG@10 0.91 on NorQuAD's dev questions, against 0.01 for BERT's random start) and learns weights and
    expansion, which a few thousand questions can teach, rather than the identity, which they cannot.

    bias: minus the logit that a word must overcome to be active at the start. A token's own logit is about
    0.6 × sqrt(hidden_size) (7 at 128), that of an unrelated word has a standard deviation of about 1, so over 400 tokens
    its maximum is about 3.
    """
    width = model.config.hidden_size
    embeddings, head = model.bert.embeddings, model.cls.predictions
    embeddings.word_embeddings.weight.normal_(0, 1 / math.sqrt(width))
    embeddings.position_embeddings.weight.mul_(0.1)
    embeddings.token_type_embeddings.weight.zero_()
    head.transform.dense.weight.copy_(torch.eye(width))
    head.transform.dense.bias.zero_()
    head.bias.fill_(bias)
