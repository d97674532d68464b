"""The data behind a model card."""

from dataclasses import dataclass
from typing import Any

from sentence_transformers.sparse_encoder import SparseEncoderModelCardData

from trainer.config import Config

SCORES = "label"  # the column, as the library calls it


@dataclass
class CardData(SparseEncoderModelCardData):
    """The library's card data without the rows it samples from the training data: those may be nobody else's business."""

    def set_widget_examples(self, dataset: Any) -> None:
        """No example texts."""

    def compute_dataset_metrics(self, dataset: Any, dataset_info: dict[str, Any], *args: Any, **kwargs: Any) -> dict:
        """Sizes and lengths of a data set, without sample rows, and without a teacher's scores, which some rows lack."""
        if SCORES in dataset.column_names:
            dataset = dataset.remove_columns(SCORES)
        info = super().compute_dataset_metrics(dataset, dataset_info, *args, **kwargs)
        return {key: value for key, value in info.items() if "example" not in key}


def build_card(config: Config) -> CardData:
    """Card data as the config says."""
    card = config.model_card
    return CardData(
        language=card.language,
        license=card.license,
        model_name=card.model_name,
        tags=["sentence-transformers", "sparse-encoder", "sparse", *card.tags],
        generate_widget_examples=False,
    )
