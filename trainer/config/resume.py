"""What a resumed run does with each key of the config that has changed: apply it, or refuse it with a reason."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from trainer.config.schema import (
    ColumnMapping,
    DatasetsConfig,
    EvaluationConfig,
    FamilySource,
    FromScratchConfig,
    HardwareConfig,
    HubConfig,
    HubSource,
    LocalSource,
    LossConfig,
    MiningConfig,
    ModelCardConfig,
    ModelConfig,
    PromptsConfig,
    QuickstartSource,
    ScandiQaConfig,
    TeacherConfig,
    TrainingConfig,
    section_at,
)


@dataclass(frozen=True)
class Refused:
    """A key that keeps its value for the whole run."""

    because: str
    only_null: bool = False
    """Only a change to or from null is refused; from one value to another it is applied."""


# The run goes on with the new value, from its next step.
APPLIED = None

MODEL = Refused("the model in the checkpoint was built with it")
PARAMETERS = Refused("the checkpoint holds the optimizer's state of the parameters that were trained, and of no others")
PACKING = Refused("whether texts are packed decides which rows share a batch")
ROWS = Refused("the rows that this run trains on and holds out follow from it")
ORDER = Refused("the order in which this run draws its rows follows from it")
RANDOM = Refused("which rows are held out, and the order of all others, follow from it")
UNIT = Refused("the weight of one regularizer means nothing to another")
CONTROLLER = Refused("the checkpoint holds a weight that was found for a target, or none", only_null=True)
GROUPS = Refused(
    "the optimizer's state in the checkpoint is in groups of one rate each, and this is one more or one less",
    only_null=True,
)

# By section, as in schema.py.
RULES: dict[type[BaseModel], dict[str, Refused | None]] = {
    FromScratchConfig: {
        "vocab_size": MODEL,
        "hidden_size": MODEL,
        "num_hidden_layers": MODEL,
        "num_attention_heads": MODEL,
        "intermediate_size": MODEL,
        "max_position_embeddings": MODEL,
        "dropout": MODEL,
        "init": MODEL,
        "lexical_bias": MODEL,
    },
    PromptsConfig: {"query": MODEL, "document": MODEL},
    ModelConfig: {
        "base_model": MODEL,
        "revision": MODEL,
        "trust_remote_code": MODEL,
        "architecture": MODEL,
        "use_router": APPLIED,  # says what follows from the architecture
        "attention": PACKING,
        "pooling_strategy": MODEL,
        "activation_function": MODEL,
        "query_init": MODEL,
        "prompts": MODEL,
        "freeze_static_embedding": PARAMETERS,
        "csr_k": MODEL,
        "csr_k_aux": MODEL,
        "csr_hidden_dim": MODEL,
        "csr_k_start": APPLIED,
        "csr_k_share": APPLIED,
        "csr_revive_steps": APPLIED,
        "csr_train_base": PARAMETERS,
        "from_scratch": MODEL,
    },
    TrainingConfig: {
        "num_train_epochs": APPLIED,
        "max_steps": APPLIED,
        "per_device_train_batch_size": APPLIED,
        "per_device_eval_batch_size": APPLIED,
        "gradient_accumulation_steps": APPLIED,
        "learning_rate": APPLIED,
        "query_learning_rate": GROUPS,
        "max_seq_length": APPLIED,
        "warmup_steps": APPLIED,
        "lr_scheduler_type": APPLIED,
        "weight_decay": APPLIED,
        "max_grad_norm": APPLIED,
        "bf16": APPLIED,  # autocast alone: weights and the optimizer's state are float32 throughout
        "fp16": APPLIED,
        "torch_compile": APPLIED,
        "dataloader_num_workers": APPLIED,
        "dataloader_pin_memory": APPLIED,
        "dataloader_prefetch_factor": APPLIED,
        "eval_steps": APPLIED,
        "save_steps": APPLIED,
        "save_total_limit": APPLIED,
        "load_best_model_at_end": APPLIED,
        "logging_steps": APPLIED,
        "seed": RANDOM,
    },
    TeacherConfig: {
        "model": APPLIED,
        "revision": APPLIED,
        "kind": APPLIED,
        "cache": APPLIED,
        "objective": APPLIED,
        "weight": APPLIED,
        "score_scale": APPLIED,
        "temperature": APPLIED,
        "batch_size": APPLIED,
    },
    LossConfig: {
        "type": MODEL,
        "document_regularizer_weight": APPLIED,
        "query_regularizer_weight": APPLIED,
        "target_document_dims": CONTROLLER,
        "target_query_dims": CONTROLLER,
        "regularizer": UNIT,
        "document_dims_cap": APPLIED,
        "teacher": APPLIED,
        "scale": APPLIED,
        "cached": APPLIED,
        "mini_batch_size": APPLIED,
        "beta": APPLIED,
        "gamma": APPLIED,
    },
    MiningConfig: {
        "method": ROWS,
        "model": ROWS,
        "revision": ROWS,
        "per_query": ROWS,
        "range": ROWS,
        "margin": ROWS,
    },
    HubSource: {"enabled": ROWS, "source": ROWS, "revision": ROWS, "max_samples": ROWS},
    FamilySource: {
        "enabled": ROWS,
        "source": ROWS,
        "revision": ROWS,
        "max_samples": ROWS,
        "eval_rows": ROWS,
        "mine": ROWS,
    },
    ScandiQaConfig: {
        "enabled": ROWS,
        "eval_rows": ROWS,
        "mine": ROWS,
        "norquad": ROWS,
        "noropenbookqa": ROWS,
        "scandiqa": ROWS,
        "supervised_da": ROWS,
        "paws_x": ROWS,
    },
    ColumnMapping: {"anchor": ROWS, "positive": ROWS, "negative": ROWS},
    LocalSource: {
        "enabled": ROWS,
        "source": ROWS,
        "revision": ROWS,
        "subset": ROWS,
        "split": ROWS,
        "eval_split": ROWS,
        "columns": ROWS,
        "language": APPLIED,  # counts rows, and changes none
        "max_samples": ROWS,
        "eval_rows": ROWS,
        "mine": ROWS,
    },
    QuickstartSource: {"enabled": ROWS, "sets": ROWS, "mine": ROWS},
    DatasetsConfig: {
        "sampling_strategy": ORDER,
        "epoch": ORDER,
        "length_window": ORDER,
        "nli": ROWS,
        "scandi_qa": ROWS,
        "ddsc": ROWS,
        "quickstart": ROWS,
    },
    EvaluationConfig: {
        "nanobeir_datasets": APPLIED,
        "nanobeir_languages": APPLIED,
        "search": APPLIED,
        "mteb_tasks": APPLIED,
        "track_sparsity": APPLIED,
        "log_decoded_samples": APPLIED,
    },
    ModelCardConfig: {"model_name": APPLIED, "language": APPLIED, "license": APPLIED, "tags": APPLIED},
    HardwareConfig: {"device": APPLIED, "tf32": APPLIED, "gradient_checkpointing": APPLIED, "fused_head": APPLIED},
    HubConfig: {"push": APPLIED, "repo": APPLIED, "private": APPLIED},
}


def why_refused(path: tuple[str, ...], old: Any, new: Any) -> str | None:
    """Why a resumed run cannot change this key from its old value to the new one; None where it goes on with the new."""
    section = section_at(path[:-1])
    assert section is not None, path  # a path of the schema
    rule = ROWS if section is DatasetsConfig and path[-1] not in RULES[section] else RULES[section][path[-1]]
    if rule is None or (rule.only_null and None not in (old, new)):
        return None
    return rule.because
