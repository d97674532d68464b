"""Encodes queries and documents with the files beside it. Needs onnxruntime, tokenizers and numpy, and nothing else.

    python example.py "hvor høyt er Galdhøpiggen" "Galdhøpiggen er 2469 meter høyt."

model.onnx takes token ids and gives one weight per dimension; model_int8.onnx is smaller, less exact, and often faster.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Encoder:
    """A folder's model: [texts, dimensions] of queries and of documents; scores are their products."""

    def __init__(self, folder: Path, model: str = "model.onnx") -> None:
        self.settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.session = onnxruntime.InferenceSession(str(folder / model), providers=["CPUExecutionProvider"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.words = [self.tokenizer.id_to_token(number) for number in range(self.settings["dimensions"])]
        self.table = None
        if (folder / "query").is_dir():  # queries need no neural network: a tokenizer, and a weight for every token
            self.query_tokenizer = Tokenizer.from_file(str(folder / "query/tokenizer.json"))
            self.table = json.loads((folder / "query/idf.json").read_text(encoding="utf-8"))

    def documents(self, texts: list[str], batch_size: int = 8) -> np.ndarray:
        """Through the network."""
        return self._run([self.settings["document_prompt"] + text for text in texts], batch_size)

    def queries(self, texts: list[str], batch_size: int = 8) -> np.ndarray:
        """From the table where there is one, else through the network too."""
        if self.table is None:
            return self._run([self.settings["query_prompt"] + text for text in texts], batch_size)
        found = np.zeros((len(texts), self.settings["dimensions"]), dtype=np.float32)
        for row, text in enumerate(texts):
            for number in set(self.query_tokenizer.encode(text).ids):
                found[row, number] = self.table[self.words[number]]
        return found

    def _run(self, texts: list[str], batch_size: int) -> np.ndarray:
        parts = []
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer.encode_batch(texts[start : start + batch_size])
            ids = np.array([encoding.ids for encoding in batch], dtype=np.int64)
            mask = np.array([encoding.attention_mask for encoding in batch], dtype=np.int64)
            parts.append(self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0])
        return np.concatenate(parts)


if __name__ == "__main__":
    query, *documents = sys.argv[1:]
    encoder = Encoder(Path(__file__).parent)
    vectors = encoder.documents(documents)
    for text, vector, score in zip(documents, vectors, vectors @ encoder.queries([query])[0], strict=True):
        heaviest = np.argsort(-vector)[:5]
        names = [encoder.words[number] if encoder.settings["words"] else str(number) for number in heaviest]
        print(
            f"{score:.3f}  {text}  {', '.join(f'{name} {vector[n]:.2f}' for name, n in zip(names, heaviest, strict=True))}"
        )
