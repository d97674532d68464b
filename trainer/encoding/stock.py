"""Opens a model as anyone does: with stock sentence-transformers, and nothing of this project.

    python -I stock.py FOLDER TEXTS.json VECTORS TRUST

Run as a script in a process of its own. `-I` keeps this project off the path; the import below would not be found.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SCRIPT = __file__
SIDES = ("query", "document")


def carries_code(folder: Path) -> bool:
    """Whether a saved model brings Python code, without which it does not open."""
    return any(folder.glob("*.py"))


def open_model(folder: Path, trust_remote_code: bool, device: str = "cpu") -> Any:
    """The SparseEncoder in a folder. On the CPU, one machine always gives the same numbers."""
    from sentence_transformers import SparseEncoder

    return SparseEncoder(str(folder), trust_remote_code=trust_remote_code, device=device, local_files_only=True)


def encode_both(model: Any, texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """Dense arrays [texts, dimensions] of the queries and the documents, each by its own route."""
    settings = {"convert_to_sparse_tensor": False, "show_progress_bar": False, "batch_size": 8}
    encoders = {"query": model.encode_query, "document": model.encode_document}
    return {side: encoders[side](texts[side], **settings).float().numpy() for side in SIDES}


if __name__ == "__main__":
    _, opened, sample, vectors, trust = sys.argv
    found = encode_both(
        open_model(Path(opened), trust == "trust"), json.loads(Path(sample).read_text(encoding="utf-8"))
    )
    assert not any(name.split(".")[0] in ("trainer", "evaluate") for name in sys.modules)
    with Path(vectors).open("wb") as file:  # under this very name: savez adds one of its own to a path
        np.savez(file, query=found["query"], document=found["document"])
