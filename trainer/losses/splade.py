"""SpladeLoss for batches whose passages go through the network in forward passes of about one length."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sentence_transformers.sparse_encoder.losses import SpladeLoss as StockSpladeLoss
from torch import Tensor, nn

from trainer.data.further_queries import NAMES, ROWS, SharedPassages
from trainer.data.tokens import PLACE


class SpladeLoss(StockSpladeLoss):
    """The library's, with the columns of a batch put together from their forward passes."""

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """sentence_features: as TokenCollator makes them, or one entry for each column."""
        features = list(sentence_features)
        queries, *documents = embed(self.model, features)
        shared = SharedPassages.of(features[0])
        ranking = self.loss.compute_loss_from_embeddings([queries, *documents], labels, shared)
        losses = dict(ranking) if isinstance(ranking, dict) else {"base_loss": ranking}
        for route, vectors in (("document", torch.cat(documents)), ("query", queries)):
            regularizer = getattr(self, f"{route}_regularizer").compute_loss_from_embeddings(vectors)
            losses[f"{route}_regularizer_loss"] = regularizer * getattr(self, f"{route}_regularizer_weight")
        return losses


def embed(model: nn.Module, features: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The vectors [rows, vocabulary] of each column: of the queries, the positives, and the negatives if any.

    Further queries follow those of the rows.
    """
    # a network may be given every feature that it does not know
    read = [{name: value for name, value in each.items() if name not in (PLACE, *NAMES)} for each in features]
    vectors = [model(each)["sentence_embedding"] for each in read]
    places = [each[PLACE] for each in features if PLACE in each]
    if not places:
        return vectors
    queries, *passages = vectors
    in_order = torch.cat(passages)[torch.cat(places).argsort()]
    return [queries, *in_order.split(features[0].get(ROWS, len(queries)))]
