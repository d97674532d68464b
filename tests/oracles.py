"""Measures and heads worked out again, apart from the code that is tested."""

from math import log2

from torch.nn.functional import linear


def splade_head(hidden, weight, bias, mask, activation="relu"):
    """What a masked-language-model head and SpladePooling compute, logits and all: [texts, words].

    hidden: [texts, length, width]; weight: [words, width]; bias: [words]; mask: [texts, length].
    """
    values = (linear(hidden, weight, bias) * mask.unsqueeze(-1).to(hidden.dtype)).relu().log1p()
    return (values.log1p() if activation == "log1p_relu" else values).max(1).values


def mean_ndcg(ranked, relevant, depth=10):
    """Mean nDCG at `depth` with binary relevance, over the queries that have a relevant passage."""
    total = 0.0
    for query, wanted in relevant.items():
        gain = sum(1 / log2(place + 2) for place, passage in enumerate(ranked[query][:depth]) if passage in wanted)
        total += gain / sum(1 / log2(place + 2) for place in range(min(depth, len(wanted))))
    return total / len(relevant)
