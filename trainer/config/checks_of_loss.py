"""Contradictions within the loss, and between it and the architecture."""

from collections.abc import Iterator

from trainer.config.names import Contradiction, dotted, missing_revision
from trainer.config.schema import Config, TeacherConfig, TeacherModel
from trainer.config.tree import Path_

# Keys of the loss that csr has no use for; `regularizer` has a default, so it is not among them.
SPLADE_KEYS = (
    "document_regularizer_weight",
    "query_regularizer_weight",
    "target_document_dims",
    "target_query_dims",
    "document_dims_cap",
)
TEACHER_KINDS = ("cross-encoder", "dense", "sparse", "bm25", "data")


def contradictions_of_loss(config: Config) -> Iterator[Contradiction]:
    """Of the section `loss`."""
    loss, architecture = config.loss, config.model.architecture
    teacher = loss.teacher
    if teacher:
        yield from _teachers(teacher)
    expected = "csr" if architecture == "csr" else "splade"
    if loss.type != expected:
        yield ("loss", "type"), f"is {loss.type}, but architecture {architecture} needs {expected}"
        return
    if expected == "csr":
        for key in (*SPLADE_KEYS, "cached"):
            if getattr(loss, key):
                yield ("loss", key), "is for SPLADE; a csr model is sparse by model.csr_k. Remove it."
        if teacher and not loss.gamma:
            yield (
                ("loss", "teacher"),
                "has no effect with loss.gamma 0, which leaves out the loss it is a part of. Raise gamma",
            )
        return
    for route in ("document", "query"):
        yield from _weight_or_target(config, route)
    if loss.regularizer == "idf-flops" and architecture != "inference-free-splade":
        yield (
            ("loss", "regularizer"),
            f"idf-flops is for inference-free-splade, where queries weigh words by IDF, not {architecture}",
        )
    cap, target = loss.document_dims_cap, loss.target_document_dims
    if cap and target and cap >= target:
        yield (
            ("loss", "document_dims_cap"),
            f"({cap}) must be less than target_document_dims ({target}): documents up to the cap are not penalised, "
            "so no weight brings their mean below it",
        )


def _teachers(teacher: TeacherConfig) -> Iterator[Contradiction]:
    here: Path_ = ("loss", "teacher")
    for key, field in TeacherModel.model_fields.items():
        if teacher.models is not None and getattr(teacher, key) != field.default:
            yield (*here, key), "has no effect beside 'loss.teacher.models'. Write it under a teacher's name"
    if not teacher.teachers:
        yield (*here, "models"), "names no teacher: write name: {kind: …, model: …} for each"
    for key, one in teacher.teachers.items():
        yield from _one_teacher(tuple(key.split(".")), one)
        if teacher.passages == "batch" and one.kind in ("cross-encoder", "data"):
            why = f"is for teachers that give each text a vector (dense, sparse, bm25), not for {one.kind}"
            yield (*here, "passages"), f"batch {why}. Set it to row"
    if teacher.temperature != 1 and teacher.objective != "kl":
        yield (*here, "temperature"), "has no effect on margin-mse. Remove it, or set objective: kl"
    if teacher.passages == "batch" and teacher.objective != "kl":
        yield (*here, "passages"), "batch compares probabilities: set loss.teacher.objective: kl"


def _one_teacher(path: Path_, teacher: TeacherModel) -> Iterator[Contradiction]:
    if teacher.kind is None:
        yield (*path, "kind"), f"is missing. It is one of {', '.join(TEACHER_KINDS)}"
    elif teacher.kind in ("bm25", "data"):
        for key in ("model", "revision", "cache"):
            if getattr(teacher, key) is not None:
                yield (*path, key), f"has no effect with kind {teacher.kind}. Remove it"
    elif teacher.model is None:
        yield (*path, "kind"), f"{teacher.kind} needs '{dotted((*path, 'model'))}'"
    else:
        yield from missing_revision((*path, "model"), teacher.model, teacher.revision)
    if teacher.prompts and teacher.kind != "dense":
        yield (*path, "prompts"), f"is for kind dense, not for {teacher.kind}. Remove it"


def _weight_or_target(config: Config, route: str) -> Iterator[Contradiction]:
    """Each route's sparsity is said once: by a weight, or by the dims that the weight is found for."""
    weight_key, target_key = f"{route}_regularizer_weight", f"target_{route}_dims"
    weight, target = getattr(config.loss, weight_key), getattr(config.loss, target_key)
    inference_free = config.model.architecture == "inference-free-splade"
    if target and weight:
        yield (
            ("loss", target_key),
            f"({target}) finds the weight during training, 'loss.{weight_key}' ({weight:g}) gives it: remove one of them "
            "(null unsets a parent's). A target holds for every vocabulary, batch size and data set",
        )
    elif route == "query" and target and inference_free:
        yield ("loss", target_key), "is for splade: queries of inference-free-splade are their own words. Remove it."
    elif route == "document" and not target and not weight:
        yield (
            ("loss", weight_key),
            f"must be more than 0, or documents stay dense. Or say how many dims documents shall have: loss.{target_key}",
        )
    elif route == "query" and not target and not weight and not inference_free:
        yield (
            ("loss", weight_key),
            "must be more than 0 for splade, or queries stay dense (0 is for inference-free-splade). "
            f"Or say how many dims queries shall have: loss.{target_key}",
        )
