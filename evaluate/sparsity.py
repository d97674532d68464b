"""How sparse a model's vectors are on real texts, and what keeping fewer dimensions costs."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
from sentence_transformers import SparseEncoder

from evaluate.passage_vectors import PassageVectors
from evaluate.scores import DEPTH, mean_ndcg
from trainer.config import ConfigError
from trainer.encoding.encode import encode
from trainer.encoding.inverted_index import InvertedIndex, comparable
from trainer.encoding.vocabulary import term_of
from trainer.runs.results import Ranking
from trainer.system.progress_bar import ProgressReport, in_columns

# Most dimensions per text, from a short query's worth to more than most documents have; None is no limit.
PRUNED_TO = (4, 8, 16, 32, 64, 128, 256, None)
MOST_FREQUENT = 20
HISTOGRAM_BINS = 40


def measure_sparsity(
    passage_vectors: PassageVectors,
    queries: dict[str, str],
    passages: dict[str, str],
    relevant: dict[str, dict[str, int]] | None = None,
    part_of: Callable[[str], str] = lambda text_id: "",
) -> dict[str, Any]:
    """Active dims of both routes, FLOPS and index size, as they are and pruned to fewer dims per text.

    queries, passages: texts by id. With `relevant` (grades by query and passage id), nDCG@10 shows what pruning costs. It
    is measured within these passages, for queries with a relevant one among them, and is the mean over the parts that
    `part_of` names. Raises ConfigError when there is no query or no passage.
    """
    if not queries or not passages:
        raise ConfigError(f"sparsity needs texts, and there are {len(queries)} queries and {len(passages)} passages")
    model, asked = passage_vectors.model, list(queries.values())
    with ProgressReport(desc=in_columns("sparsity", "encoding", 12), total=len(asked), unit="queries") as progress:
        vectors = {"query": encode(model, asked, "query", passage_vectors.batch_size, progress)}
    vectors["document"] = passage_vectors.encode(list(passages.values()), "sparsity")
    routes = {route: describe(rows, model) for route, rows in vectors.items()}
    judged = judged_here(queries, passages, relevant or {})
    pruned = []
    for count in PRUNED_TO:
        query, document = (prune(vectors[route], count) for route in ("query", "document"))
        row = {
            "max_active_dims": count,
            "query_active_dims": query.nnz / len(queries),
            "document_active_dims": document.nnz / len(passages),
            "index_bytes": InvertedIndex(document).bytes,
            "flops": flops(query, document),
        }
        if judged:
            sides = (comparable(model, query), list(queries)), (comparable(model, document), list(passages))
            row["ndcg_at_10"] = mean_ndcg(search_parts(*sides, judged, part_of))
        pruned.append(row)
    routes["document"]["index_bytes"] = pruned[-1]["index_bytes"]
    return {
        "dimensions": vectors["document"].shape[1],
        "routes": routes,
        "flops": pruned[-1]["flops"],
        "judged_queries": len(judged),
        "pruned": pruned,
    }


def describe(vectors: sp.csr_matrix, model: SparseEncoder) -> dict[str, Any]:
    """How many dims the texts of one route have active, and which. vectors: [texts, dimensions]."""
    texts = vectors.shape[0]
    active, active_in = np.diff(vectors.indptr), vectors.getnnz(axis=0)
    width = -(-int(np.ptp(active) + 1) // HISTOGRAM_BINS)  # whole numbers of dims per bin
    counts, edges = np.histogram(active, np.arange(active.min(), active.max() + width + 1, width))
    busiest = [int(dimension) for dimension in np.argsort(-active_in, kind="stable")[:MOST_FREQUENT]]
    return {
        "texts": texts,
        "active_dims": {
            "mean": float(active.mean()),
            "p50": float(np.percentile(active, 50)),
            "p95": float(np.percentile(active, 95)),
            "max": int(active.max()),
        },
        "never_active_share": float((active_in == 0).mean()),
        "most_frequent": [
            {"dimension": dimension, "term": term_of(model, dimension), "share": float(active_in[dimension] / texts)}
            for dimension in busiest
            if active_in[dimension]
        ],
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def prune(vectors: sp.csr_matrix, count: int | None) -> sp.csr_matrix:
    """The `count` largest weights of each text by absolute value, of equal ones the lower dimensions; None: all."""
    if count is None:
        return vectors
    rows = np.repeat(np.arange(vectors.shape[0]), np.diff(vectors.indptr))
    order = np.lexsort((vectors.indices, -np.abs(vectors.data), rows))  # text by text, heaviest first
    heaviest = order[np.arange(vectors.nnz) - vectors.indptr[rows] < count]
    return sp.csr_matrix((vectors.data[heaviest], (rows[heaviest], vectors.indices[heaviest])), shape=vectors.shape)


def flops(query: sp.csr_matrix, document: sp.csr_matrix) -> float:
    """Products expected per pair of a query and a passage: Σ p_query(j) · p_document(j) (arXiv 2004.05665)."""
    return float((query.getnnz(axis=0) / query.shape[0]) @ (document.getnnz(axis=0) / document.shape[0]))


def judged_here(
    queries: dict[str, str], passages: dict[str, str], relevant: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Relevance among these queries and passages, for the queries that have a relevant passage among them."""
    judged = {
        query: {passage: grade for passage, grade in relevant.get(query, {}).items() if passage in passages}
        for query in queries
    }
    return {query: grades for query, grades in judged.items() if any(grade > 0 for grade in grades.values())}


def search_parts(
    query: tuple[sp.csr_matrix, list[str]],
    document: tuple[sp.csr_matrix, list[str]],
    judged: dict[str, dict[str, int]],
    part_of: Callable[[str], str],
) -> dict[str, Ranking]:
    """What every part's queries find among its passages. query, document: vectors, and the ids of their rows."""
    (queries, query_ids), (passages, passage_ids) = query, document
    rankings = {}
    for part in sorted({part_of(text_id) for text_id in judged}):
        asked = [row for row, text_id in enumerate(query_ids) if text_id in judged and part_of(text_id) == part]
        searched = [row for row, text_id in enumerate(passage_ids) if part_of(text_id) == part]
        results = InvertedIndex(passages[searched]).search(queries[asked], DEPTH)
        found = {
            query_ids[row]: {passage_ids[searched[n]]: float(score) for n, score in zip(numbers, scores, strict=True)}
            for row, (numbers, scores) in zip(asked, results, strict=True)
        }
        rankings[part] = Ranking(found, {text_id: judged[text_id] for text_id in found})
    return rankings


def sparsity_lines(values: dict[str, Any]) -> Iterator[str]:
    """Both routes, then a table of what pruning saves and costs."""
    for route, figures in values["routes"].items():
        active = figures["active_dims"]
        yield (
            f"sparsity    {route}: {active['mean']:.0f} active dims (p50 {active['p50']:.0f}, p95 {active['p95']:.0f}, "
            f"max {active['max']}) of {values['dimensions']:,} in {figures['texts']:,} texts; "
            f"{figures['never_active_share']:.0%} of dims never active"
        )
        terms = ", ".join(f"{row['term']} {row['share']:.0%}" for row in figures["most_frequent"][:8])
        yield f"            in most texts: {terms or 'none'}"
    passages = values["routes"]["document"]["texts"]
    judged = values["judged_queries"]
    within = (
        f"nDCG@10 of {judged:,} queries, each within its task's part of these {passages:,} passages"
        if judged
        else "no relevance is known"
    )
    table = "            {:>9}   {:>7}   {:>8}   {:>9}   {:>7}   {}"
    yield table.format("dims kept", "query", "document", "index", "FLOPS", within)
    for row in values["pruned"]:
        yield table.format(
            row["max_active_dims"] or "all",
            f"{row['query_active_dims']:.1f}",
            f"{row['document_active_dims']:.1f}",
            f"{row['index_bytes'] / 1e6:.1f} MB",
            f"{row['flops']:.2f}",
            f"{row['ndcg_at_10']:.4f}" if judged else "",
        ).rstrip()
