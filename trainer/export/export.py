"""Exports a trained model, and the documents it encodes, to what runs them: search engines, ONNX and columns."""

from trainer.config import ConfigError
from trainer.export.bulk import Elasticsearch, OpenSearch
from trainer.export.documents import export_documents
from trainer.export.lucene import Lucene
from trainer.export.parquet import Parquet
from trainer.export.qdrant import Qdrant
from trainer.export.request import Request
from trainer.export.seismic import Seismic
from trainer.models.remote_code import check_code

ENGINES = {
    "lucene": Lucene,
    "opensearch": OpenSearch,
    "elasticsearch": Elasticsearch,
    "qdrant": Qdrant,
    "seismic": Seismic,
    "parquet": Parquet,
}
FORMATS = (*ENGINES, "onnx")


def export(to: str, request: Request) -> None:
    """Write what `to` takes, and check it. Raises ConfigError, one line, for what the user can mend."""
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: known are {', '.join(FORMATS)}")
    check_code(request.run.final)
    if to == "onnx":
        from trainer.export.onnx import export_onnx  # onnxruntime is for this format alone

        export_onnx(request)
    else:
        export_documents(ENGINES[to], to, request)
