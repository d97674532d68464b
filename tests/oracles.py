"""Measures worked out again, apart from the code that is tested."""

from math import log2


def mean_ndcg(ranked, relevant, depth=10):
    """Mean nDCG at `depth` with binary relevance, over the queries that have a relevant passage."""
    total = 0.0
    for query, wanted in relevant.items():
        gain = sum(1 / log2(place + 2) for place, passage in enumerate(ranked[query][:depth]) if passage in wanted)
        total += gain / sum(1 / log2(place + 2) for place in range(min(depth, len(wanted))))
    return total / len(relevant)
