"""Small base models with random weights, written to a folder as from_pretrained expects them."""

import unicodedata
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from trainer.config.schema import FromScratchConfig
from trainer.models.scratch import train_tokenizer

QUERIES = ["hvor ligger mjøsa", "hvad er et pas", "vilken sjö är störst", "kva er ein fjord"]
DOCUMENTS = [
    "Mjøsa er Norges største innsjø og ligger på Østlandet.",
    "Et pas er et dokument, som man viser, når man rejser.",
    "Vänern är Sveriges största sjö och ligger i Västergötland.",
    "Ein fjord er ein lang og djup arm av havet som går inn i landet.",
]
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}
SIZE = FromScratchConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)


def nfd(texts: list[str]) -> list[str]:
    """The texts as macOS and PDFs give them: a letter and its mark are two characters."""
    return [unicodedata.normalize("NFD", text) for text in texts]


def write_bert(folder: Path, bias: float = -1.0, pad_token: bool = True) -> Path:
    """A BERT whose vocabulary bias is `bias`: the higher, the denser its vectors."""
    torch.manual_seed(1)
    tokenizer = train_tokenizer(SIZE, QUERIES + DOCUMENTS)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SHAPE))
    with torch.no_grad():
        model.cls.predictions.bias.fill_(bias)
    if not pad_token:
        tokenizer.pad_token = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_level_tokenizer(special: dict[str, str], first: str, last: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, with `first` and `last` around a text: the space before a word is part of its token."""
    bpe = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = list(special.values())
    bpe.train_from_iterator(
        QUERIES + DOCUMENTS,
        BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False),
    )
    ends = [(token, names.index(token)) for token in (first, last)]
    bpe.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=64, **special)


def write_roberta(folder: Path) -> Path:
    """A RoBERTa (XLM-R has the same head)."""
    torch.manual_seed(1)
    special = {
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    tokenizer = byte_level_tokenizer(special, "<s>", "</s>")
    model = RobertaForMaskedLM(
        RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=1, **SHAPE)
    )
    return save(model, tokenizer, folder)


def write_modernbert(folder: Path) -> Path:
    """A ModernBERT, with a vocabulary padded by 13 entries that no token has."""
    torch.manual_seed(1)
    special = {
        "cls_token": "[CLS]",
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    tokenizer = byte_level_tokenizer(special, "[CLS]", "[SEP]")
    ids = {"pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    config = ModernBertConfig(
        vocab_size=len(tokenizer) + 13, max_position_embeddings=64, local_attention=16, **ids, **SHAPE
    )
    return save(ModernBertForMaskedLM(config), tokenizer, folder)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    with torch.no_grad():
        model.get_output_embeddings().bias.fill_(-1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_dense(folder: Path) -> Path:
    """A dense sentence encoder: BERT and mean pooling."""
    bert = write_bert(folder / "bert")
    transformer = Transformer(str(bert), max_seq_length=32)
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")
    model.save_pretrained(str(folder / "dense"))
    return folder / "dense"
