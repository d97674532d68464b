"""Models that run inside OpenSearch: zips for its ml-commons plug-in, each with the request that registers it."""

import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor, nn

from trainer.config import ConfigError, one_line
from trainer.encoding.encode import document_modules
from trainer.encoding.vocabulary import dims_are_words
from trainer.encoding.windows import reads_in_windows, with_cut_documents
from trainer.export import ml_commons_reader
from trainer.export.check import require_same_vectors
from trainer.export.graph import DocumentGraph, document_tokenizer
from trainer.export.sample import embedded_texts
from trainer.export.vectors import Encoder, matrix_of
from trainer.system.files import sha256_of
from trainer.system.fresh_process import answer_of_a_fresh_process

# What the two zips and their requests are called in an export's folder.
DOCUMENT, QUERY = "document-model", "query-model"
# How far a weight may be off in the cluster's model, as a share of the largest: float32 summed in another order.
TOLERANCE = 1e-4
# How many documents are encoded with the zip: enough for several lengths, few enough for a large model on a CPU.
CHECKED = 16


class NeuralSparse(nn.Module):
    """The document encoder with the inputs and outputs of ml-commons: dictionaries, and no weight for special tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.graph = DocumentGraph(model)
        kept = torch.ones(len(model.tokenizer))
        kept[model.tokenizer.all_special_ids] = 0.0
        self.register_buffer("kept", kept)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """input_ids and attention_mask, [texts, tokens], to output, [texts, vocabulary]."""
        return {"output": self.graph(features["input_ids"], features["attention_mask"]) * self.kept}


def write_models(folder: Path, encoder: Encoder, name: str, echo: Callable[[str], None]) -> None:
    """The query model where query/ is there, and the document model. ConfigError when that gives other vectors."""
    if not dims_are_words(encoder.model):
        echo("left out  models to run in OpenSearch: its neural search needs words, and CSR's dimensions are none")
        return
    if (folder / "query").is_dir():
        files = {file: (folder / "query" / file).read_bytes() for file in ("tokenizer.json", "idf.json")}
        write_model(folder / QUERY, files, f"{name}-query", "SPARSE_TOKENIZE", echo)
    if encoder.model.prompts.get("document"):
        echo("left out  the document model: OpenSearch cannot put this model's prompt in front of a text")
        return
    # without a decoder: decoded alone, every token keeps the name it has in the vocabulary
    tokenizer = json.loads(document_tokenizer(encoder.model).to_str()) | {"decoder": None}
    files = {"model.pt": traced(encoder.model), "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode()}
    write_model(folder / DOCUMENT, files, f"{name}-document", "SPARSE_ENCODING", echo)
    try:
        largest = require_same_documents(folder / f"{DOCUMENT}.zip", encoder)
    except ConfigError:
        for suffix in (".zip", ".json"):
            (folder / f"{DOCUMENT}{suffix}").unlink()
        raise
    echo(f"checked   {DOCUMENT}.zip in a process of its own: weights off by {largest:.1g} at most")
    if reads_in_windows(encoder.model):
        limit = document_modules(encoder.model)[0].max_seq_length
        echo(
            f"cuts      {DOCUMENT}.zip reads {limit} tokens of a document. Send longer ones with their exported vectors"
        )


def traced(model: Any) -> bytes:
    """The document encoder as TorchScript."""
    module = NeuralSparse(model).eval()
    with (
        plain_attention(model),
        readable_names(model),
        tempfile.TemporaryDirectory() as aside,
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the tracer's, about Python values: lengths other than these are checked
        try:
            program = torch.jit.trace(module, (module.graph.example(),), strict=False, check_trace=False)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"the model cannot be traced for OpenSearch: {one_line(error)}") from None
        file = Path(aside) / "model.pt"
        torch.jit.save(program, str(file))
        return without_debug_records(file)


def without_debug_records(file: Path) -> bytes:
    """A TorchScript archive less its debug records: what runs stays, bit for bit.

    They hold, for the stacks of error messages, the paths of every source file on the machine that traced the model.
    """
    kept = io.BytesIO()
    with ZipFile(file) as archive, ZipFile(kept, "w") as target:
        for record in archive.infolist():
            if not record.filename.endswith(".debug_pkl"):
                target.writestr(ZipInfo(record.filename), archive.read(record))
    return kept.getvalue()


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Attention as matrix products: OpenSearch 2 runs torch 1.13, which has no scaled_dot_product_attention."""
    transformer = document_modules(model)[0].auto_model
    before = transformer.config._attn_implementation
    transformer.set_attn_implementation("eager")
    try:
        yield
    finally:
        transformer.set_attn_implementation(before)


@contextmanager
def readable_names(model: Any) -> Iterator[None]:
    """Code that comes with a base model is in a package named after its hash; torch cannot read a name like 1f00 again."""
    named = {type(module): type(module).__module__ for module in model.modules()}
    named = {each: name for each, name in named.items() if not all(part.isidentifier() for part in name.split("."))}
    for module_class, name in named.items():
        module_class.__module__ = name.rpartition(".")[2]
    try:
        yield
    finally:
        for module_class, name in named.items():
            module_class.__module__ = name


def write_model(stem: Path, files: dict[str, bytes], name: str, function: str, echo: Callable[[str], None]) -> None:
    """A zip, and the request that registers it, but for `url` and `model_group_id`, which the cluster knows."""
    target = stem.with_suffix(".zip")
    with ZipFile(target, "w") as zipped:
        for file, content in files.items():
            zipped.writestr(ZipInfo(file), content)
    request = {
        "name": name,
        "version": "1.0.0",
        "description": "Made by nordsparse.",
        "model_format": "TORCH_SCRIPT",
        "function_name": function,
        "model_content_size_in_bytes": target.stat().st_size,
        "model_content_hash_value": sha256_of(target),
    }
    stem.with_suffix(".json").write_text(json.dumps(request, indent=1) + "\n", encoding="utf-8")
    echo(f"model     {target} ({target.stat().st_size / 2**20:.1f} MiB, {function})")


def require_same_documents(file: Path, encoder: Encoder) -> float:
    """The largest difference between the model's vectors and those of the zip. Raises ConfigError for a real one."""
    documents = embedded_texts()[1][:CHECKED]
    texts = [*documents, documents[0].split()[0], " ".join(documents), "", "😀 3.14"]  # one longer than any model reads
    failure = f"{file.name} does not run in a process of its own"
    with answer_of_a_fresh_process(ml_commons_reader.SCRIPT, file, texts, failure=failure) as answer:
        found = matrix_of(json.loads(answer.read_text(encoding="utf-8")), encoder.terms)
    with with_cut_documents(encoder.model):
        exact = encoder.documents(texts)
    return require_same_vectors(f"{file.name} gives", texts, found, exact, TOLERANCE)
