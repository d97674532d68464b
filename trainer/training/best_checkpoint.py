"""Which checkpoint a run ends with, what its score depends on, and when two scores cannot be compared."""

from dataclasses import dataclass
from typing import Any

from trainer.config import Config
from trainer.data.choosing import choice_of
from trainer.data.training_data import TrainingData
from trainer.runs.choice import SCORE
from trainer.system.distributed import from_first, processes
from trainer.training.evaluators import SearchEvaluator

# Keys of the sections evaluation and loss that no score in training depends on.
UNSCORED = {"mteb_tasks", "track_sparsity", "log_decoded_samples", "teacher", "cached", "mini_batch_size"}


@dataclass(frozen=True)
class BestCheckpoint:
    """How the best checkpoint is found: by a metric, over queries that choose."""

    metric: str | None
    """The library's name of the metric; None where nothing is evaluated."""
    choices: list[dict[str, Any]]
    """Which queries choose, for the manifest."""
    depends_on: dict[str, Any]
    """All that a checkpoint's score depends on besides the weights: two scores with the same can be compared."""


def best_checkpoint_of(config: Config, data: TrainingData, evaluator: SearchEvaluator | None) -> BestCheckpoint:
    """How this run's best checkpoint is found, the same in all processes."""
    metric = f"eval_{SCORE}" if evaluator else "eval_loss" if data.eval else None
    choices = from_first(choices_of(config, data, evaluator))
    depends_on: dict[str, Any] = {"metric": metric, "max_seq_length": config.training.max_seq_length}
    if evaluator:
        settings = config.evaluation.model_dump(exclude=UNSCORED)
        depends_on |= {f"evaluation.{key}": value for key, value in settings.items()}
        depends_on["searches"] = sorted(evaluator.parts)
        depends_on["queries that choose"] = choices
        if config.model.long_documents != "cut":  # as in every checkpoint that does not say it
            depends_on["model.long_documents"] = config.model.long_documents
    elif metric:
        depends_on |= {f"loss.{key}": value for key, value in config.loss.model_dump(exclude=UNSCORED).items()}
        depends_on["rows per batch in evaluation"] = config.training.per_device_eval_batch_size * processes()
    return BestCheckpoint(metric, choices, from_first(depends_on))


def choices_of(config: Config, data: TrainingData, evaluator: SearchEvaluator | None) -> list[dict[str, Any]]:
    """Which queries choose the checkpoint, for the manifest; all of NanoBEIR's do."""
    choices = [choice_of(search) for search in data.search if search.chooser]
    if evaluator and config.training.load_best_model_at_end:
        others = evaluator.parts.keys() - {search.name for search in data.search}
        choices += [{"search": name, "rule": "all", "also_reported": True} for name in sorted(others)]
    return choices


def checkpoint_line(config: Config, best: BestCheckpoint) -> str:
    """Which checkpoint the run ends with, and why; and what its weights are mixed with."""
    line = _which_checkpoint(config, best)
    mixture = config.training.mixture
    return f"{line}. Its weights are then mixed: {mixture} (training.start_share)" if mixture else line


def _which_checkpoint(config: Config, best: BestCheckpoint) -> str:
    if best.metric is None:
        return "result    the last step: there is nothing to evaluate with"
    if not config.training.load_best_model_at_end:
        return "result    the last step: training.load_best_model_at_end is false"
    if best.metric == "eval_loss":
        return "result    the checkpoint with the lowest evaluation loss: there is no search set"
    line = "result    the checkpoint with the highest mean nDCG@10 over the queries that choose"
    if also := [choice["search"] for choice in best.choices if choice["also_reported"]]:
        line += f"; those of {', '.join(also)} are reported too, so their score is optimistic"
    return line


def what_differs(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Why the scores of two checkpoints cannot be compared."""
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return f"they were measured otherwise ({', '.join(names)})"
