"""Hours and disk of a step that has not run: from a measured rate, published sizes and assumed lengths of texts."""

from evaluate.prove.plan import BM25, Step
from trainer.config import Config

# Parameters that compute on every token, in millions, as the models' authors say; of multilingual-e5 without embeddings.
MILLIONS = {
    "ltg/norbert3-xs": 15,
    "ltg/norbert3-base": 123,
    "ltg/norbert4-base": 149,
    "ltg/norbert4-large": 360,
    "thivy/norbert4-base-scandinavian-embedding": 149,
    "intfloat/multilingual-e5-small": 22,
    "intfloat/multilingual-e5-base": 86,
    "intfloat/multilingual-e5-large": 303,
    "opensearch-project/opensearch-neural-sparse-encoding-multilingual-v1": 168,
}
# Measured on an H200 with NorBERT4-large's shape (docs/performance.md). Other sizes are taken to be in proportion.
TOKENS_PER_SECOND, AT_MILLIONS = 176_800, 360
# Checkpoints, and texts of other lengths than those of the measurement.
OVERHEAD = 1.2
# Rows of the three sets, roughly, as their repositories say: a round_robin epoch has so many of each.
ROWS = {"nli": 556_000, "scandi_qa": 143_000, "ddsc": 968_000}
# Assumed: tokens of a row's texts together, and of a text of the tasks.
TOKENS_PER_ROW, TOKENS_PER_TEXT = 200, 150
# Assumed: the least that a batch takes, however small the model, and a text that is encoded and searched.
SECONDS_PER_BATCH, SECONDS_PER_TEXT = 0.05, 5e-4
# Passages of NanoBEIR in one language, and texts of the seven tasks and of NanoBEIR in two languages.
NANO_PASSAGES, TEXTS = 57_000, 150_000
# Imports, data, token ids and torch.compile; BM25, fusions, latency and intervals.
START_SECONDS, MEASURE_SECONDS = 300.0, 900.0
HOW = (
    f"estimates: {TOKENS_PER_SECOND:,} tokens/s in training at {AT_MILLIONS} million parameters (measured on an H200), "
    f"other sizes in proportion; assumed are {TOKENS_PER_ROW} tokens a row, {SECONDS_PER_BATCH:g} s a batch at least, and "
    f"{1000 * SECONDS_PER_TEXT:g} ms a searched text at least"
)
# Bytes of a parameter in a checkpoint (weights and Adam's two moments) and in a final model; both in float32.
CHECKPOINT_BYTES, FINAL_BYTES = 12, 4


def seconds_of(step: Step) -> float | None:
    """How long a step may take on an H100; None for a model of unknown size."""
    subject = step.subject
    if subject.system == BM25:
        return MEASURE_SECONDS
    config = subject.config.config if subject.config else None
    millions = MILLIONS.get(config.model.base_model if config else subject.source or "")
    if millions is None:
        return None
    rate = TOKENS_PER_SECOND * AT_MILLIONS / millions
    if step.trains and config:
        return _training_seconds(config, rate)
    return _reading_seconds(TEXTS, rate) + MEASURE_SECONDS


def _training_seconds(config: Config, rate: float) -> float:
    """Steps, and the searches in NanoBEIR before, during and after them."""
    training, rows = config.training, rows_of(config)
    batches = rows / training.per_device_train_batch_size
    frozen = not config.loss.has_regularizers and not config.model.csr_train_base
    tokens = rows * TOKENS_PER_ROW * (1 / 3 if frozen else 1)  # frozen: a forward pass alone
    learning = max(tokens / rate, batches * SECONDS_PER_BATCH)
    searches = batches / training.gradient_accumulation_steps / training.eval_steps + 2
    topics = config.evaluation.nanobeir_datasets
    share = 1 if topics is None else len(topics) / 13
    passages = share * NANO_PASSAGES * len(config.evaluation.nanobeir_languages)
    return (learning + searches * _reading_seconds(passages, rate)) * OVERHEAD + START_SECONDS


def _reading_seconds(texts: float, rate: float) -> float:
    """To encode and search: a forward pass, a third of what a text takes in training."""
    return texts * max(TOKENS_PER_TEXT / (3 * rate), SECONDS_PER_TEXT)


def rows_of(config: Config) -> float:
    """Rows that are trained on, roughly."""
    training = config.training
    if training.max_steps > 0:
        return training.max_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
    sets = [rows for name, rows in ROWS.items() if (part := getattr(config.datasets, name)) and part.enabled] or [0]
    if config.datasets.sampling_strategy == "proportional":
        return training.num_train_epochs * sum(sets)
    shortest_or_longest = min(sets) if config.datasets.epoch == "smallest" else max(sets)
    return training.num_train_epochs * len(sets) * shortest_or_longest


def disk_of(config: Config) -> float | None:
    """Bytes of a run folder at its largest: the kept checkpoints, the one being written, and the final model."""
    millions = MILLIONS.get(config.model.base_model)
    if millions is None:
        return None
    return millions * 1e6 * (CHECKPOINT_BYTES * (config.training.save_total_limit + 1) + 2 * FINAL_BYTES)
