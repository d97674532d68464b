"""The words that sample texts are indexed under: what a sparse model makes of them."""

from collections.abc import Iterator
from typing import Any

from sentence_transformers import SparseEncoder

from trainer.encoding.vocabulary import dims_are_words

SAMPLES = {
    "query": ["hvor høyt er Galdhøpiggen", "hvornår blev Danmark medlem af EU", "vilken är Sveriges största sjö"],
    "document": [
        "Galdhøpiggen er Norges høyeste fjell med 2469 meter over havet.",
        "Danmark blev medlem af De Europæiske Fællesskaber den 1. januar 1973.",
        "Vänern är Sveriges största sjö och ligger i Västergötland.",
    ],
}


def top_terms(model: SparseEncoder, count: int = 15) -> list[dict[str, Any]]:
    """The heaviest terms of each sample text, with their weights; none for a CSR model, whose dims are no words."""
    if not dims_are_words(model):
        return []
    rows = []
    for route, texts in SAMPLES.items():
        encode = model.encode_query if route == "query" else model.encode_document
        vectors = encode(texts, show_progress_bar=False)
        for text, terms in zip(texts, model.decode(vectors, top_k=count), strict=True):
            rows.append({"text": text, "route": route, "terms": [[term, round(weight, 3)] for term, weight in terms]})
    return rows


def terms_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line per text."""
    for row in rows:
        words = ", ".join(f"{term.strip()} {weight:.2f}" for term, weight in row["terms"][:8])
        yield f"terms       {row['route']} '{row['text']}': {words}"
