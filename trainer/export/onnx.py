"""ONNX: the document encoder with its pooling in one graph, in float32 and int8, and the query side as files."""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config import ConfigError
from trainer.export import onnx_example
from trainer.export.check import compare, embedded_documents, embedded_queries, write_figures
from trainer.export.graph import DocumentGraph, document_tokenizer
from trainer.export.query_side import write_query_tokenizer
from trainer.export.request import Request
from trainer.export.vectors import Encoder, has_words

OPSET = 17
# By how much a score may differ, as a share of the query's best. int8 rounds the weights of every layer, so documents
# whose scores are that near may also change places.
FLOAT_SHARE, INT8_SHARE = 1e-4, 0.05


def export_onnx(to: str, request: Request) -> None:
    """model.onnx, model_int8.onnx, the tokenizers and an example. Raises ConfigError when the float32 graph is not exact.

    The int8 graph is kept when its scores are within INT8_SHARE of the model's; else it is removed, which is said.
    """
    if request.corpus or request.queries or request.shard.of > 1:
        raise ConfigError(
            f"{to} is the model itself: it takes no CORPUS, QUERIES or SHARD (--corpus, --queries, --shard)"
        )
    folder, say = request.folder(to), request.say
    folder.mkdir(parents=True, exist_ok=True)
    encoder = Encoder.open(request.run.final, "cpu", 8)
    write_graph(encoder.model, folder / "model.onnx")
    quantise(folder / "model.onnx", folder / "model_int8.onnx")
    write_beside(folder, encoder)
    queries, documents = embedded_queries(), embedded_documents()
    wanted = (encoder.queries(queries) @ encoder.documents(documents).T).toarray()
    for name, share, words in GRAPHS:
        figures_file = folder / f"check-{Path(name).stem}.json"
        figures_file.unlink(missing_ok=True)  # of an earlier export
        found = onnx_example.Encoder(folder, name)
        scores = found.queries(queries).astype(np.float64) @ found.documents(documents).T
        allowed = share * wanted.max(axis=1, keepdims=True).repeat(len(documents), axis=1)
        try:
            figures = {"to": to, "model": name, "quantisation": words} | compare(
                wanted, scores, allowed, near_tie=share
            )
        except ConfigError as error:
            exact = name == "model.onnx"
            for refused in GRAPHS if exact else [(name,)]:  # int8 is made from float32
                (folder / refused[0]).unlink(missing_ok=True)
            if exact:
                raise
            say(f"left out  {name}: {error.format_message()}")
            continue
        write_figures(figures_file, figures, say)
        say(f"exported  {folder / name} ({(folder / name).stat().st_size / 2**20:.1f} MiB)")


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


GRAPHS = (
    ("model.onnx", FLOAT_SHARE, "float32"),
    ("model_int8.onnx", INT8_SHARE, f"int8 weights: within {INT8_SHARE:.0%} of a query's best score"),
)
