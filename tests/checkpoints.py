"""Small base models with random weights, written to a folder as from_pretrained expects them."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertForMaskedLM

from trainer.config.schema import FromScratchConfig
from trainer.models.scratch import train_tokenizer

QUERIES = ["hvor ligger mjøsa", "hvad er et pas", "vilken sjö är störst", "kva er ein fjord"]
DOCUMENTS = [
    "Mjøsa er Norges største innsjø og ligger på Østlandet.",
    "Et pas er et dokument, som man viser, når man rejser.",
    "Vänern är Sveriges största sjö och ligger i Västergötland.",
    "Ein fjord er ein lang og djup arm av havet som går inn i landet.",
]
SIZE = FromScratchConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
)


def write_bert(folder: Path, bias: float = -1.0, pad_token: bool = True) -> Path:
    """A BERT whose vocabulary bias is `bias`: the higher, the denser its vectors."""
    torch.manual_seed(1)
    tokenizer = train_tokenizer(SIZE, QUERIES + DOCUMENTS)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        model.cls.predictions.bias.fill_(bias)
    if not pad_token:
        tokenizer.pad_token = None
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
