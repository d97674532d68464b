"""Qdrant: points as its API takes them, and their upload with its client."""

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from trainer.config import ConfigError, one_line
from trainer.export.corpus import chunks
from trainer.export.formats import NumberedFormat, by_term, json_line, sorted_by_number
from trainer.export.request import Request
from trainer.export.vectors import Encoder, Vector, nine_digits

VECTOR = "text"
COLLECTION = {"sparse_vectors": {VECTOR: {"index": {"on_disk": False}}}}
BATCH = 256


class Qdrant(NumberedFormat):
    """Points with dimensions by number, and the document's own id and text as payload."""

    beside = ("collection.json",)

    def document(self, name: str, text: str, vector: Vector) -> str:
        """A point. Its id must be a number or a UUID, so it is made from the document's."""
        sparse = sorted_by_number(nine_digits(vector))
        return json_line({"id": point_id(name), "vector": {VECTOR: sparse}, "payload": {"id": name, "text": text}})

    def read_document(self, record: str) -> tuple[str, Vector]:
        """Out of a point."""
        point = json.loads(record)
        return point["payload"]["id"], by_term(point["vector"][VECTOR])

    def query(self, name: str, text: str, vector: Vector) -> str:
        """The body of a query request."""
        sparse = sorted_by_number(nine_digits(vector))
        body = {"query": sparse, "using": VECTOR, "limit": 10, "with_payload": True}
        return json_line({"id": name, "text": text, "query": body})

    def read_query(self, record: str) -> Vector:
        """Out of a query request."""
        return by_term(json.loads(record)["query"]["query"])

    def write_beside(self, folder: Path, encoder: Encoder, request: Request) -> None:
        """collection.json: the body with which the collection is created."""
        (folder / "collection.json").write_text(json_line(COLLECTION), encoding="utf-8")


def point_id(name: str) -> str:
    """The same UUID for the same document every time, so that uploading again replaces it."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def upsert(folder: Path, url: str, collection: str, echo: Callable[[str], None]) -> int:
    """Upload every document file of an export, a batch at a time; the number of points. QDRANT_API_KEY is its key.

    `url` may be a folder, which the client then keeps the collection in by itself. Raises ConfigError when it fails.
    """
    from qdrant_client import QdrantClient, models
    from qdrant_client.http.exceptions import ApiException

    files = sorted(folder.glob("documents-*.jsonl"))
    try:
        where = {"url": url} if "://" in url else {"path": url}
        client = QdrantClient(**where, api_key=os.environ.get("QDRANT_API_KEY"))
        if not client.collection_exists(collection):
            index = models.SparseIndexParams(**COLLECTION["sparse_vectors"][VECTOR]["index"])
            client.create_collection(
                collection, vectors_config={}, sparse_vectors_config={VECTOR: models.SparseVectorParams(index=index)}
            )
        count = 0
        for file in files:
            with file.open(encoding="utf-8") as lines:
                for batch in chunks(lines, BATCH):
                    client.upsert(collection, [models.PointStruct(**json.loads(line)) for line in batch], wait=True)
                    count += len(batch)
        client.close()
    except (ApiException, OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"Qdrant at {url} does not take the points: {one_line(error)}. Run the command again"
        ) from None
    echo(f"uploaded  {count:,} points to the collection '{collection}' at {url}")
    return count
