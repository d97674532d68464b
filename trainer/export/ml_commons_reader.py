"""Encodes texts with a document model's zip as OpenSearch's ml-commons plug-in does, and nothing of this project.

    python -I ml_commons_reader.py MODEL.zip TEXTS.json VECTORS.json

Each text by itself: the tokens of tokenizer.json with its special tokens and its cut, both inputs in a dictionary, and a
name for every weight that is not 0, by decoding its number alone without special tokens.
"""

import json
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import torch
from tokenizers import Tokenizer

SCRIPT = __file__


def read_vectors(file: Path, texts: list[str]) -> list[dict[str, float]]:
    """The words of each text, with their weights."""
    with tempfile.TemporaryDirectory() as aside:
        with ZipFile(file) as zipped:
            zipped.extractall(aside)
        (program,) = Path(aside).glob("*.pt")
        model = torch.jit.load(str(program), map_location="cpu")
        tokenizer = Tokenizer.from_file(str(Path(aside) / "tokenizer.json"))
    vectors = []
    for encoding in map(tokenizer.encode, texts):
        inputs = {"input_ids": torch.tensor([encoding.ids]), "attention_mask": torch.tensor([encoding.attention_mask])}
        with torch.no_grad():
            weights = model(inputs)["output"][0]
        names = {tokenizer.decode([n], skip_special_tokens=True): n for n in weights.nonzero().flatten().tolist()}
        vectors.append({name: float(weights[number]) for name, number in names.items() if name})
    return vectors


if __name__ == "__main__":
    _, bundle, sample, vectors = sys.argv
    found = read_vectors(Path(bundle), json.loads(Path(sample).read_text(encoding="utf-8")))
    assert not {"trainer", "evaluate", "transformers", "sentence_transformers"} & set(sys.modules)
    Path(vectors).write_text(json.dumps(found), encoding="utf-8")
