"""A dense model that needs neither training nor the hub, for CSR to make a sparse code of.

Every word piece has a random direction, and a text's vector is about their mean (random indexing): texts are alike as far
as they share words. The pieces are those of a BEIR folder's training questions and passages.

python -m tests.benchmarks.dense_base ../shared/data/norquad models/dense_base
"""

import sys
import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from trainer.config.schema import FromScratchConfig
from trainer.data.beir import read_search_set
from trainer.models.scratch import build_from_scratch


def main(data: str, folder: str) -> None:
    """Write the model, and say how many weights it has."""
    search = read_search_set(Path(data), "train", "train")
    size = FromScratchConfig(vocab_size=8000, hidden_size=128, num_hidden_layers=1, intermediate_size=128)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as base:
        build_from_scratch(size, [*search.queries.values(), *search.corpus.values()], Path(base))
        modules = [Transformer(base, max_seq_length=512), Pooling(size.hidden_size, "mean")]
        model = SentenceTransformer(modules=modules, device="cpu")
        model.save_pretrained(folder)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} weights in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
