"""Encoding on real texts: documents in bulk, and queries of an inference-free model one at a time."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SparseEncoder

from tests.benchmarks.speed.process import answer, best_seconds, peak_mib
from tests.benchmarks.speed.step import config_of
from trainer.config import load_config
from trainer.data.texts import read_json_lines
from trainer.encoding.encode import encode
from trainer.encoding.fuse import fuse
from trainer.models.build import build_model, fetch_base_model

DOCUMENTS, QUERIES, BATCH = 128, 500, 32


def measure(side: str, folder: str, what: str, length: int = 256) -> dict[str, Any]:
    """documents: CPU seconds and peak MiB; queries: milliseconds each, by the clock on the wall; side: ours or stock."""
    rows = [row for _, row in read_json_lines(Path(folder, "triplets.jsonl"))]
    file = config_of(Path(folder), f"encode-{side}", "cpu", batch=8, steps=1, length=length)
    config = load_config(file).config
    model = build_model(config, fetch_base_model(config), [], [row["positive"] for row in rows[:8]], "cpu")
    if side == "ours":
        fuse(model)
    return MEASURES[what](model, side, rows)


def documents(model: SparseEncoder, side: str, rows: list[dict[str, str]]) -> dict[str, Any]:
    """All passages to sparse rows."""
    texts = list(dict.fromkeys(row["positive"] for row in rows))[:DOCUMENTS]
    calls = {
        "ours": lambda: encode(model, texts, "document", BATCH),
        "stock": lambda: model.encode_document(texts, batch_size=BATCH, show_progress_bar=False),
    }
    return {"seconds": best_seconds(calls[side]), "mib": peak_mib()}


def queries(model: SparseEncoder, side: str, rows: list[dict[str, str]]) -> dict[str, Any]:
    """One query at a time, as a search asks for them."""
    texts = [row["anchor"] for row in rows[:QUERIES]]
    calls = {
        "ours": lambda text: encode(model, [text], "query", 1),
        "stock": lambda text: model.encode_query(text, show_progress_bar=False),
    }
    call, found = calls[side], []
    for text in texts[:20] + texts:
        start = time.perf_counter()
        call(text)
        found.append((time.perf_counter() - start) * 1000)
    return {f"p{share}": float(np.percentile(found[20:], share)) for share in (50, 95)}


MEASURES = {"documents": documents, "queries": queries}

if __name__ == "__main__":
    answer(measure)
