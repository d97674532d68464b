"""OpenSearch and Elasticsearch: what their _bulk takes, search requests, and the index that both are for."""

import json
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trainer.config import ConfigError
from trainer.export.check import Rounding
from trainer.export.formats import Format, json_line
from trainer.export.ml_commons import DOCUMENT, QUERY, write_models
from trainer.export.query_side import LARGEST_QUERY_WEIGHT, write_query_tokenizer
from trainer.export.request import Request
from trainer.export.vectors import Encoder, Vector, escaped, is_space_or_control, nine_digits, require_distinct


class Bulk(Format):
    """What OpenSearch's and Elasticsearch's _bulk takes: an action line and a document line."""

    suffix = ".ndjson"
    lines_per_document = 2
    beside: ClassVar[tuple[str, ...]] = ("index.json",)
    field_type: ClassVar[str]
    vector_at: ClassVar[tuple[str, ...]]  # where a vector stands in a query clause
    engine_rounds = True
    document_rounding = Rounding(share=2.0**-8)
    quantisation = "the engine keeps 9 significant bits of a document's weight and cuts off the others"

    def document(self, name: str, text: str, vector: Vector) -> str:
        """Into whatever index the request names."""
        return json_line({"index": {"_id": name}}) + json_line({"text": text, "vector": nine_digits(vector)})

    def read_document(self, record: str) -> tuple[str, Vector]:
        """With the bits that Lucene's FeatureField keeps."""
        action, document, _ = record.split("\n")
        vector = json.loads(document)["vector"]
        return json.loads(action)["index"]["_id"], dict(zip(vector, kept_bits(list(vector.values())), strict=True))

    def query(self, name: str, text: str, vector: Vector) -> str:
        """The body of a search request."""
        if (largest := max(vector.values(), default=0.0)) > LARGEST_QUERY_WEIGHT:
            limit = f"the engine takes {LARGEST_QUERY_WEIGHT:.0f} at most"
            raise ConfigError(f"query '{text[:40]}' has a weight of {largest:.1f}; {limit}")
        return json_line({"id": name, "text": text, "query": self.clause(nine_digits(vector))})

    def read_query(self, record: str) -> Vector:
        """Out of the search request."""
        return reduce(getitem, self.vector_at, json.loads(record)["query"])

    def clause(self, vector: Vector) -> dict[str, Any]:
        """The query clause for a vector."""
        raise NotImplementedError

    def write_beside(self, folder: Path, encoder: Encoder, request: Request) -> None:
        """index.json: the body with which the index is created."""
        fields = {"text": {"type": "text"}, "vector": {"type": self.field_type}}
        (folder / "index.json").write_text(json_line({"mappings": {"properties": fields}}), encoding="utf-8")


class OpenSearch(Bulk):
    """rank_features, whose names may have any character, and models that run in the cluster."""

    beside = ("index.json", "query", *(f"{name}{suffix}" for name in (DOCUMENT, QUERY) for suffix in (".zip", ".json")))
    field_type, vector_at = "rank_features", ("neural_sparse", "vector", "query_tokens")

    def clause(self, vector: Vector) -> dict[str, Any]:
        """neural_sparse with a vector of ours."""
        return {"neural_sparse": {"vector": {"query_tokens": vector}}}

    def write_beside(self, folder: Path, encoder: Encoder, request: Request) -> None:
        """The index, query/ with the tokenizer and its weights where queries need no neural network, and the models."""
        super().write_beside(folder, encoder, request)
        write_query_tokenizer(folder / "query", encoder, for_lucene=True)
        # traced on another device, a model would run on that alone
        on_cpu = encoder
        if encoder.model.device.type != "cpu":
            on_cpu = Encoder.open(request.run.final, "cpu", 8, in_windows=request.in_windows)
        write_models(folder, on_cpu, request.run.name, request.echo)


class Elasticsearch(Bulk):
    """sparse_vector."""

    field_type, vector_at = "sparse_vector", ("sparse_vector", "query_vector")

    def terms(self, tokens: list[str]) -> list[str]:
        """Without dots, which versions before 8.16 refuse in the name of a dimension."""
        return require_distinct([escaped(token, lambda c: c == "." or is_space_or_control(c)) for token in tokens])

    def clause(self, vector: Vector) -> dict[str, Any]:
        """sparse_vector with all of a vector of ours: by default, newer versions leave out frequent terms."""
        return {"sparse_vector": {"field": "vector", "query_vector": vector, "prune": False}}


def kept_bits(weights: list[float]) -> list[float]:
    """Weights as Lucene's FeatureField stores them: the upper 17 bits of a float32, 9 of them significant."""
    bits = np.asarray(weights, dtype=np.float32).view(np.uint32)
    return ((bits >> 15) << 15).view(np.float32).astype(float).tolist()
