"""ONNX: the document encoder with its pooling in one graph, in float32 and int8, and the query side as files."""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from trainer.config import ConfigError
from trainer.encoding.encode import document_modules
from trainer.encoding.vocabulary import dims_are_words
from trainer.export import onnx_example
from trainer.export.check import compare_scores, scores_of, write_figures
from trainer.export.graph import DocumentGraph, document_tokenizer
from trainer.export.query_side import write_query_tokenizer
from trainer.export.request import Request
from trainer.export.sample import embedded_texts
from trainer.export.vectors import Encoder

OPSET = 17


class Graph(NamedTuple):
    """A file, by how much a text's weights may be off there, as a share of its largest, in words too, and its precision."""

    file: str
    share: float
    quantisation: str
    is_exact: bool


GRAPHS = (
    Graph("model.onnx", 1e-4, "float32", is_exact=True),
    Graph("model_int8.onnx", 0.05, "int8: a text's weights within 5% of its largest one", is_exact=False),
)


def export_onnx(request: Request) -> None:
    """model.onnx, model_int8.onnx, the tokenizers and an example. Raises ConfigError when the float32 graph is not exact.

    An int8 graph whose weights are further off than stated is removed, which is said.
    """
    if request.corpus or request.queries or request.shard.of > 1:
        raise ConfigError("onnx is the model itself: it takes no CORPUS, QUERIES or SHARD")
    folder, echo = request.folder("onnx"), request.echo
    folder.mkdir(parents=True, exist_ok=True)
    encoder = Encoder.open(request.run.final, "cpu", 8)
    require_pooled_prompts(encoder.model)
    write_graph(encoder.model, folder / "model.onnx")
    quantise(folder / "model.onnx", folder / "model_int8.onnx")
    write_beside(folder, encoder)
    for graph in GRAPHS:
        (folder / f"check-{Path(graph.file).stem}.json").unlink(missing_ok=True)  # of an earlier export
    queries, documents = embedded_texts()
    exact = encoder.queries(queries), encoder.documents(documents)
    for graph in GRAPHS:
        example = onnx_example.Encoder(folder, graph.file)
        found = tuple(sp.csr_matrix(vectors) for vectors in (example.queries(queries), example.documents(documents)))
        try:
            figures = compare_vectors(graph, exact, found, looked_up=example.table is not None)
        except ConfigError as error:
            for refused in GRAPHS if graph.is_exact else [graph]:  # the other is made from the exact one
                (folder / refused.file).unlink()
            if graph.is_exact:
                raise
            echo(f"left out  {graph.file}: {error.format_message()}")
            continue
        figures = {"model": graph.file, "quantisation": graph.quantisation} | figures
        write_figures(folder / f"check-{Path(graph.file).stem}.json", figures, echo)
        echo(f"exported  {folder / graph.file} ({(folder / graph.file).stat().st_size / 2**20:.1f} MiB)")
    if request.in_windows:
        limit = document_modules(encoder.model)[0].max_seq_length
        echo(
            f"cuts      the example reads {limit} tokens of a document. Split longer ones, and keep the largest weights"
        )


def compare_vectors(
    graph: Graph, exact: tuple[sp.csr_matrix, ...], found: tuple[sp.csr_matrix, ...], *, looked_up: bool
) -> dict[str, Any]:
    """Figures of a graph's (queries, documents), [texts, dimensions] each, beside the model's own.

    Queries that are `looked_up` are exact. Raises ConfigError for a weight off by more than the graph's share, and for
    another top 10 in float32.
    """
    shares = GRAPHS[0].share if looked_up else graph.share, graph.share
    for wanted, given, share in zip(exact, found, shares, strict=True):
        largest, off_by = (abs(rows).max(axis=1).toarray() for rows in (wanted, given - wanted))
        if not (off_by <= share * largest).all():  # also true of NaN
            worst = (off_by / np.maximum(largest, 1e-30)).max()
            raise ConfigError(
                f"a weight of {graph.file} is off by {100 * worst:.3g} % of its text's largest, "
                f"where {100 * share:g} % is stated"
            )
    wanted, read = scores_of(exact, found)
    return compare_scores(wanted, read, "" if graph.is_exact else graph.quantisation)


def require_pooled_prompts(model: Any) -> None:
    """Raise ConfigError for a model that leaves a prompt's tokens out of its mean: a graph cannot tell which they are."""
    if any(model.prompts.values()) and any(not getattr(module, "include_prompt", True) for module in model.modules()):
        raise ConfigError("onnx: the dense model's pooling leaves the prompt's tokens out, which a graph cannot")


def write_graph(model: Any, file: Path) -> None:
    """The document encoder, for any number of texts of any length."""
    graph = DocumentGraph(model).eval()
    inputs = graph.example()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about Python values: lengths other than these are checked
        torch.onnx.export(
            graph,
            tuple(inputs.values()),
            str(file),
            dynamo=False,  # the other exporter fixes the number of tokens to that of the example (torch 2.13)
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["weights"],
            dynamic_axes={name: {0: "texts", 1: "tokens"} for name in inputs} | {"weights": {0: "texts"}},
        )


def quantise(file: Path, target: Path) -> None:
    """Matrix products with int8 weights, one scale per column."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it advises a step that is for convolutions
    quantize_dynamic(
        str(file), str(target), op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8
    )


def write_beside(folder: Path, encoder: Encoder) -> None:
    """Tokenizers, settings and the example."""
    document_tokenizer(encoder.model).save(str(folder / "tokenizer.json"))
    shutil.rmtree(folder / "query", ignore_errors=True)
    write_query_tokenizer(folder / "query", encoder, for_lucene=False)
    settings = {
        "dimensions": len(encoder.terms),
        "words": dims_are_words(encoder.model),
        "query_prompt": encoder.model.prompts.get("query") or "",
        "document_prompt": encoder.model.prompts.get("document") or "",
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(onnx_example.__file__, folder / "example.py")
