"""What the killed runs train: three small configs, their data, and how a run ends."""

import json
import os
import signal
import time
from pathlib import Path

from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_dense

STEPS, SAVE_EVERY = 18, 3
ARCHITECTURES = ("inference-free-splade", "splade", "csr")
SECONDS = 600  # by then a run of a few seconds hangs, on the busiest machine too

CONFIG = """
model: {{architecture: {architecture}, {model}}}
training: {{max_steps: {steps}, per_device_train_batch_size: 4, learning_rate: 1e-3, {query_rate} max_seq_length: 16,
           eval_steps: {save}, save_steps: {save}, save_total_limit: 2, logging_steps: 1}}
loss: {{{loss}}}
datasets: {{mine: {{source: rows.jsonl, eval_rows: 6}}}}
evaluation: {{nanobeir_datasets: [], search: [four]}}
hardware: {{device: cpu}}
"""
SMALL = (
    "base_model: from-scratch, from_scratch: {vocab_size: 300, hidden_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2, intermediate_size: 32}"
)
PARTS = {
    "inference-free-splade": {
        "model": SMALL,
        "query_rate": "query_learning_rate: 1e-2,",
        "loss": "type: splade, document_regularizer_weight: 1e-3",
    },
    "splade": {
        "model": "base_model: bert",
        "query_rate": "",
        "loss": "type: splade, target_document_dims: 40, target_query_dims: 20",
    },
    "csr": {
        "model": "base_model: dense, csr_hidden_dim: 64, csr_k: 4, csr_k_aux: 8, csr_k_start: 8, csr_revive_steps: 4",
        "query_rate": "",
        "loss": "type: csr",
    },
}


def write_work(folder: Path, architecture: str) -> None:
    """Everything a run reads: its config, rows with and without a negative, a search, a base model."""
    rows = [
        {"anchor": f"hva er {n}", "positive": f"svaret er {n}"} | ({"negative": f"ikke {n}"} if n % 2 else {})
        for n in range(60)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    search = folder / "four"
    search.mkdir()
    texts = [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(DOCUMENTS)]
    (search / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)))
    queries = [{"_id": f"q{n}", "text": text} for n, text in enumerate(QUERIES)]
    (search / "queries.dev.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (search / "qrels.dev.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t1\n" for n in range(4))
    )
    if architecture == "splade":
        write_bert(folder / "bert")
    if architecture == "csr":
        write_dense(folder).rename(folder / "dense_")
        (folder / "dense_").rename(folder / "dense")
    (folder / "soak.yaml").write_text(
        CONFIG.format(architecture=architecture, steps=STEPS, save=SAVE_EVERY, **PARTS[architecture])
    )


def wait_for(pid: int, seconds: float = SECONDS) -> int:
    """The exit status of a run; kills it and raises when it hangs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"the run did not end within {seconds:.0f} s")


def newest_step(folder: Path, name: str) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = (folder / "models" / name / "checkpoints").glob("checkpoint-*")
    return max((int(path.name.rpartition("-")[2]) for path in found), default=0)


def ended_well(folder: Path, name: str, status: int) -> None:
    if status:
        raise AssertionError(f"the run ended with {status}:\n{(folder / f'{name}.log').read_text()[-3000:]}")
