"""ONNX: the document encoder with its pooling in one graph, in float32 and int8, and the query side as files."""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from trainer.config import ConfigError
from trainer.export import onnx_example
from trainer.export.check import (
    Rounding,
    Rule,
    Weights,
    compare,
    embedded_documents,
    embedded_queries,
    exactly,
    used_by,
    write_figures,
)
from trainer.export.graph import DocumentGraph, document_tokenizer
from trainer.export.query_side import write_query_tokenizer
from trainer.export.request import Request
from trainer.export.vectors import Encoder, has_words

Pair = tuple[sp.csr_matrix, sp.csr_matrix]

OPSET = 17
# By how much a text's weight in any dimension may differ, as a share of its largest one.
FLOAT_SHARE, INT8_SHARE = 1e-4, 0.05


def export_onnx(to: str, request: Request) -> None:
    """model.onnx, model_int8.onnx, the tokenizers and an example. Raises ConfigError when the float32 graph is not exact.

    The int8 graph is kept when its weights, and so its scores and its order, are as near to the model's as stated; else
    it is removed, which is said.
    """
    if request.corpus or request.queries or request.shard.of > 1:
        raise ConfigError(
            f"{to} is the model itself: it takes no CORPUS, QUERIES or SHARD (--corpus, --queries, --shard)"
        )
    folder, say = request.folder(to), request.say
    folder.mkdir(parents=True, exist_ok=True)
    encoder = Encoder.open(request.run.final, "cpu", 8)
    require_pooled_prompts(encoder.model)
    write_graph(encoder.model, folder / "model.onnx")
    quantise(folder / "model.onnx", folder / "model_int8.onnx")
    write_beside(folder, encoder)
    queries, documents = embedded_queries(), embedded_documents()
    exact = encoder.queries(queries), encoder.documents(documents)
    for name, share, words in GRAPHS:
        figures_file = folder / f"check-{Path(name).stem}.json"
        figures_file.unlink(missing_ok=True)  # of an earlier export
        graph = onnx_example.Encoder(folder, name)
        found = tuple(sp.csr_matrix(vectors) for vectors in (graph.queries(queries), graph.documents(documents)))
        try:
            figures = {"to": to, "model": name, "quantisation": words}
            figures |= compare_vectors((name, share, words), exact, found, looked_up=graph.table is not None)
        except ConfigError as error:
            exact_one = name == "model.onnx"
            for refused in GRAPHS if exact_one else [(name,)]:  # int8 is made from float32
                (folder / refused[0]).unlink(missing_ok=True)
            if exact_one:
                raise
            say(f"left out  {name}: {error.format_message()}")
            continue
        write_figures(figures_file, figures, say)
        say(f"exported  {folder / name} ({(folder / name).stat().st_size / 2**20:.1f} MiB)")


def compare_vectors(graph: tuple[str, float, str], exact: Pair, found: Pair, *, looked_up: bool) -> dict[str, Any]:
    """Figures of what a graph gives: (queries, documents), [texts, dimensions] each, beside the model's own.

    Queries that are `looked_up` are not rounded. Raises ConfigError when a weight is further off than the share of its
    text's largest one, or for another order.
    """
    (name, share, words), largest = graph, 0.0
    for wanted, given in zip(exact, found, strict=True):
        shares = abs(given - wanted).max(axis=1).toarray() / np.maximum(wanted.max(axis=1).toarray(), TINY)
        largest = max(largest, float(shares.max()))
    if not largest <= share:  # also true of NaN
        raise ConfigError(
            f"a weight of {name} is off by {100 * largest:.3g} % of its text's largest, where {100 * share:g} % is stated"
        )
    asked, held, found_queries, found_documents = used_by(*exact, *found)
    of_queries, of_documents = (within(share * wanted.max(axis=1).toarray()) for wanted in exact)
    queries, documents = Weights.of(asked, exactly if looked_up else of_queries), Weights.of(held, of_documents)
    rule = Rule(queries, documents, monotone=False, engine=words * (name != "model.onnx"))
    figures = compare(queries, documents, found_queries @ found_documents.T, rule)
    return figures | {"largest_difference_of_a_weight": largest}


def within(tolerance: np.ndarray) -> Rounding:
    """Any weight of a text may be off by its tolerance, [texts, 1], either way."""

    def rounding(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        either_way = np.broadcast_to(tolerance, weights.shape)
        return either_way, either_way

    return rounding


def require_pooled_prompts(model: Any) -> None:
    """Raise ConfigError for a model that leaves a prompt's tokens out of its mean: a graph cannot tell which they are."""
    if any(model.prompts.values()) and any(not getattr(module, "include_prompt", True) for module in model.modules()):
        raise ConfigError(
            "onnx: the dense model's pooling leaves the prompt's tokens out (include_prompt: false), which the graph cannot"
        )


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
        "words": has_words(encoder.model),
        "query_prompt": encoder.model.prompts.get("query") or "",
        "document_prompt": encoder.model.prompts.get("document") or "",
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(onnx_example.__file__, folder / "example.py")


# What a text without any weight is divided by.
TINY = 1e-30

GRAPHS = (
    ("model.onnx", FLOAT_SHARE, "float32"),
    ("model_int8.onnx", INT8_SHARE, f"int8: a text's weights within {INT8_SHARE:.0%} of its largest one"),
)
