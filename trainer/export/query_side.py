"""The query side of inference-free models as files: a tokenizer, and a weight for every token."""

import json
from pathlib import Path

import scipy.sparse as sp
from tokenizers import Tokenizer

from trainer.config import ConfigError
from trainer.export.check import require_same_vectors
from trainer.export.graph import copy_of
from trainer.export.vectors import Encoder, matrix_of, nine_digits
from trainer.models.build import static_embedding

# transformers' model_max_length of tokenizers that read texts of any length is greater.
NO_LIMIT = 10**9
# Lucene refuses query weights of 0 or less, and greater ones; a token that is not listed would weigh 1.
SMALLEST_QUERY_WEIGHT, LARGEST_QUERY_WEIGHT = 1e-6, 64.0


def write_query_tokenizer(folder: Path, encoder: Encoder, *, for_lucene: bool) -> None:
    """idf.json and tokenizer.json, as OpenSearch's tokenizer models read them; nothing when queries need a network.

    OpenSearch names a token by decoding it alone: without a decoder it gives the token as it is in the vocabulary, where
    byte-level tokenizers' bytes would all be one replacement character. Special tokens would change where a text is cut.
    """
    embedding = static_embedding(encoder.model)
    if embedding is None:
        return
    weights = dict(zip(encoder.terms, embedding.weight.tolist(), strict=True))
    if for_lucene:
        if (largest := max(weights.values())) > LARGEST_QUERY_WEIGHT:
            raise ConfigError(f"a query weight is {largest:.1f}; OpenSearch takes {LARGEST_QUERY_WEIGHT:.0f} at most")
        weights = {term: max(weight, SMALLEST_QUERY_WEIGHT) for term, weight in weights.items()}
    tokenizer = copy_of(embedding.tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if embedding.tokenizer.model_max_length < NO_LIMIT:
        tokenizer.enable_truncation(embedding.tokenizer.model_max_length)
    values = json.loads(tokenizer.to_str()) | {"decoder": None, "post_processor": None}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", values), ("idf.json", nine_digits(weights))):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def queries_by_files(folder: Path, texts: list[str], terms: list[str]) -> sp.csr_matrix:
    """Query vectors as OpenSearch makes them from the two files: [queries, dimensions]."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    idf = json.loads((folder / "idf.json").read_text(encoding="utf-8"))
    names = [[tokenizer.decode([token], skip_special_tokens=True) for token in tokenizer.encode(t).ids] for t in texts]
    return matrix_of([{name: idf.get(name, 1.0) for name in of_text if name} for of_text in names], terms)


def require_same_queries(folder: Path, texts: list[str], exact: sp.csr_matrix, terms: list[str]) -> None:
    """Raise ConfigError when the files give other query weights than the model."""
    found = queries_by_files(folder, texts, terms)
    require_same_vectors("the exported tokenizer and weights give", texts, found, exact.maximum(0))
