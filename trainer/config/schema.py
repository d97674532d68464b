"""Every key a config may hold, with its type, its default and what it means. Nothing else is accepted."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


def is_revision(text: str) -> bool:
    """Whether git could have a commit, tag or branch of this name. The hub's client takes one for part of a file's path."""
    return re.fullmatch(r"(?!/)(?!.*(\.\.|//|@\{))[^\x00-\x20\x7f~^:?*\[\\]+(?<![/.])", text) is not None


def _valid_revision(revision: str) -> str:
    if not is_revision(revision):
        raise PydanticCustomError("revision", "must be a commit, tag or branch")
    return revision


def _findable(name: str) -> str:
    """Too long, with a null byte, the home of nobody, in a folder that may not be read: the system raises for these."""
    try:
        Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PydanticCustomError(
            "source", "must be a file, folder or repository ({reason})", {"reason": reason}
        ) from None
    return name


Revision = Annotated[str, AfterValidator(_valid_revision)]
Source = Annotated[str, AfterValidator(_findable)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

NanoBeirTask = Literal[
    "climatefever",
    "dbpedia",
    "fever",
    "fiqa2018",
    "hotpotqa",
    "msmarco",
    "nfcorpus",
    "nq",
    "quoraretrieval",
    "scidocs",
    "arguana",
    "scifact",
    "touche2020",
]

# The word `base_model` takes when there is no base model to start from.
FROM_SCRATCH = "from-scratch"
# The values of `attention` that read the texts of a batch one after the other, without padding.
PACKED_ATTENTION = ("varlen", "flash_attention_2", "flash_attention_3")


class Section(BaseModel):
    """A part of the config: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class FromScratchConfig(Section):
    """A small BERT and its tokenizer, built from the training texts when `base_model: from-scratch`. At most a billion
    parameters in all."""

    vocab_size: Annotated[int, Field(gt=0, le=1_000_000)] = 8000
    """Entries of the WordPiece vocabulary, hence dimensions of every vector."""
    hidden_size: Annotated[int, Field(gt=0, le=16_384)] = 128
    """Width of the transformer; a multiple of num_attention_heads."""
    num_hidden_layers: Annotated[int, Field(gt=0, le=200)] = 2
    """Transformer layers."""
    num_attention_heads: Positive = 2
    """Attention heads per layer."""
    intermediate_size: Annotated[int, Field(gt=0, le=131_072)] = 512
    """Width of the feed-forward layers."""
    max_position_embeddings: Annotated[int, Field(gt=0, le=131_072)] = 512
    """Longest text in tokens that the model can read."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of activations dropped in training."""
    init: Literal["lexical", "normal"] = "lexical"
    """lexical: every token starts by activating itself, so the model begins as a word matcher; normal: BERT's random
    weights."""
    lexical_bias: Annotated[float, Field(ge=-20, le=0)] = -4.0
    """With init lexical, what is taken off every logit at the start. At -4 hardly a word that a document does not say is
    active, and a word that is not active learns nothing. Nearer to 0, more words can be learned, from a start that matches
    words less exactly."""


class PromptsConfig(Section):
    """Text that stands in front of every query and of every document. null: the base model's own; "": nothing."""

    query: str | None = None
    """In front of every query; not for inference-free-splade, whose queries are only looked up."""
    document: str | None = None
    """In front of every document."""


class ModelConfig(Section):
    """What is trained, and from which base model."""

    base_model: Source
    """A Hugging Face repository, a local folder, or `from-scratch`."""
    revision: Revision | None = None
    """Commit, tag or branch of the repository. The commit it stands for is recorded in run.json."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model. Needs `revision` to be a full commit hash; for a local folder, the
    commit it is a copy of. `make pin` shows the code, asks, and keeps the answer in pins.yaml."""
    code_sha256: dict[str, Sha256] | None = None
    """The SHA-256 of each Python file of the base model, by name. Other code is refused. pins.yaml has them."""
    architecture: Literal["inference-free-splade", "splade", "csr"]
    """inference-free-splade: queries need no neural network; splade: both go through it; csr: sparse codes of a dense
    model."""
    use_router: bool | None = None
    """Separate routes for queries and documents. Follows from the architecture; may be written to be explicit."""
    prompts: PromptsConfig | None = None
    """What stands in front of every query and document, in training, evaluation, exports and the saved model. null: the
    prompts that the base model was saved with."""
    head: Literal["own", "fit"] = "own"
    """SPLADE: own: the base model's masked-language-model head; fit: a head is fitted to the states of the training texts'
    tokens, for an encoder that has none, as most dense models."""
    head_dims: Positive = 400
    """head fit: active dims that documents have on average before training."""
    vocabulary: Literal["keep", "texts"] = "keep"
    """texts: cut the base model's vocabulary to the pieces that texts use, and to those that spell any other text. A model
    of 250,000 pieces becomes a third of its size. keep: all pieces stay."""
    vocabulary_texts: list[Source] = []
    """vocabulary texts: corpora whose pieces are kept: folders in BEIR layout, .jsonl or .parquet files with a column
    `text`. []: the training texts, queries and documents."""
    vocabulary_min_count: Positive = 1
    """vocabulary texts: a piece is kept if the texts use it at least this often."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of activations dropped in training; null: the base model's own. At 0, steps on a CPU are a third shorter, for
    attention with dropout has no fast kernel there."""
    long_documents: Literal["cut", "windows"] = "cut"
    """Documents of more than max_seq_length tokens. cut: only their beginning is read. windows (SPLADE): searches and
    exports read all of it, in overlapping windows; the weight of a word is its maximum over them. A row trains on one
    window."""
    attention: Literal["auto", "eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3"] = "auto"
    """varlen (torch's own flash attention), flash_attention_2 and 3 (the package flash-attn): texts are packed, and nothing
    is padded (CUDA, bf16 or fp16). auto: varlen where that works, otherwise what the base model comes with."""
    pooling_strategy: Literal["max", "sum"] = "max"
    """How SpladePooling combines the tokens of a text."""
    activation_function: Literal["relu", "log1p_relu"] = "relu"
    """relu: log(1 + relu(x)); log1p_relu: a second log1p, as in OpenSearch's models (arXiv 2504.14839)."""
    query_init: Literal["ones", "idf"] = "idf"
    """Start values of the query weights of inference-free-splade; idf is counted on the training documents."""
    freeze_static_embedding: bool = False
    """Keep the query weights of inference-free-splade at their start values."""
    csr_k: Positive = 256
    """csr: dimensions kept active per text."""
    csr_k_aux: Count = 512
    """csr: dead dimensions used in the auxiliary loss."""
    csr_hidden_dim: Annotated[int, Field(gt=0, le=1_000_000)] = 4096
    """csr: dimensions of the sparse code."""
    csr_k_start: Positive | None = None
    """csr: dimensions kept active at the start of training; their number falls to csr_k. null: csr_k throughout."""
    csr_k_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """csr: share of the steps over which it falls."""
    csr_revive_steps: Positive | None = 100
    """csr: every so many steps, dimensions that were in no text's code lately get new weights; null: never."""
    csr_train_base: bool = False
    """csr: train the dense model too. By default only the autoencoder is trained."""

    from_scratch: FromScratchConfig | None = None
    """Size of the model that `base_model: from-scratch` builds."""

    @property
    def has_frozen_base(self) -> bool:
        """Whether the base model is not trained, so that its vectors never change."""
        return self.architecture == "csr" and not self.csr_train_base

    @property
    def has_static_queries(self) -> bool:
        """Whether queries are looked up in a table of weights, without a network."""
        return self.architecture == "inference-free-splade"

    @property
    def depends_on_texts(self) -> bool:
        """Whether the untrained model is made from the training texts: its words, or a part of its weights."""
        counts_rows = self.vocabulary == "texts" and not self.vocabulary_texts
        return self.base_model == FROM_SCRATCH or self.head == "fit" or counts_rows

    @property
    def packs_texts(self) -> bool:
        """Whether texts are read one after the other, without padding."""
        return self.attention in PACKED_ATTENTION


class TrainingConfig(Section):
    """Names of SparseEncoderTrainingArguments, so the library's documentation holds, plus query_learning_rate,
    max_seq_length and start_share."""

    num_train_epochs: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Epochs; what ends one is said by datasets.epoch."""
    max_steps: int = -1
    """Optimizer steps; -1 means: as num_train_epochs says."""
    per_device_train_batch_size: Positive = 16
    """Rows per step and device. In-batch negatives grow with it."""
    per_device_eval_batch_size: Positive = 16
    """Texts per batch in evaluation."""
    gradient_accumulation_steps: Positive = 1
    """Batches per optimizer step."""
    learning_rate: Rate = 2e-5
    """Peak learning rate of everything but the query weights."""
    query_learning_rate: Rate | None = None
    """Peak learning rate of the static query weights of inference-free-splade, and of nothing else."""
    max_seq_length: Positive = 256
    """Tokens of a text that are read; the rest is cut off. model.long_documents says what else becomes of documents."""
    warmup_steps: Weight = 0.1
    """Steps of learning-rate warm-up; below 1 a share of all steps."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Shape of the learning rate after the warm-up."""
    weight_decay: Weight = 0.01
    """AdamW's weight decay."""
    max_grad_norm: Weight = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    bf16: bool = False
    """Train under bfloat16 autocast."""
    fp16: bool = False
    """Train under float16 autocast (CUDA only)."""
    torch_compile: bool = False
    """Compile the networks' layers, for packed texts or for each of a few lengths that texts are then padded to (a minute
    of start-up, faster steps on CUDA)."""
    dataloader_num_workers: Count = 0
    """Processes that tokenise ahead of the model."""
    dataloader_pin_memory: bool = False
    """Page-locked memory for faster copies to a CUDA device."""
    dataloader_prefetch_factor: Positive | None = None
    """Batches each worker prepares ahead."""
    eval_steps: Positive = 500
    """Steps between two evaluations."""
    save_steps: Positive = 500
    """Steps between two checkpoints; a multiple of eval_steps when load_best_model_at_end is on."""
    save_total_limit: Positive = 2
    """Checkpoints kept; the best one is always among them."""
    load_best_model_at_end: bool = True
    """End with the best checkpoint, not the last."""
    start_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the weights from before training in the final ones (arXiv 2109.01903). The scores during training are those
    of the trained weights alone. null: none."""

    @property
    def mixture(self) -> str | None:
        """What the final weights are a mixture of, in words; None where they are the trained ones."""
        share = self.start_share
        return f"{100 * (1 - share):.3g}% trained, {100 * share:.3g}% from before training" if share else None

    logging_steps: Positive = 50
    """Steps between two lines in TensorBoard."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything random: weights, order of rows, dropout."""


class TeacherModel(Section):
    """Where a teacher's scores come from."""

    kind: Literal["cross-encoder", "dense", "sparse", "bm25", "data"] | None = None
    """cross-encoder: reads query and passage together; dense: a sentence encoder; sparse: a sparse one, as those trained
    here; bm25: the words of the training passages; data: the scores that the rows have (columns.scores)."""
    model: Source | None = None
    """cross-encoder, dense, sparse: a hub repository, or a local folder."""
    revision: Revision | None = None
    """Commit, tag or branch of the repository. Scores are kept for the commit it stands for."""
    cache: str | None = None
    """Folder for the scores. By default HF_HOME/nordsparse/scores."""
    prompts: PromptsConfig | None = None
    """dense: what it reads in front of every query and document. null: what it was saved with."""
    batch_size: Positive = 32
    """Texts, or pairs of them, that the teacher reads at once."""


class OneOfTeachers(TeacherModel):
    """One of several teachers."""

    weight: Rate = 1.0
    """Weight of its scores in the mean of all teachers' scores."""


class TeacherModels(BaseModel):
    """Several teachers, each under a name of your own (`e5: {kind: dense, model: …}`)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, OneOfTeachers]


class TeacherConfig(TeacherModel):
    """Stronger models whose scores are imitated."""

    models: TeacherModels | None = None
    """Several teachers, instead of kind and model."""
    passages: Literal["row", "batch"] = "row"
    """What a query's scores are compared on. row: the passages of its row, which needs negatives; batch: all passages of
    the batch that a process reads, with teachers that give each text a vector (dense, sparse, bm25) and objective kl."""
    normalize: bool | None = None
    """Bring the scores of each query's passages into 0..1, the least to 0 and the largest to 1, each teacher's apart
    (arXiv 2411.04403). null: where there are several teachers."""
    objective: Literal["margin-mse", "kl"] = "margin-mse"
    """margin-mse: the same differences between the positive and each negative (arXiv 2010.02666); kl: the same
    probabilities of all passages (arXiv 2010.11386)."""
    weight: Rate = 1.0
    """Weight of this loss beside the contrastive loss, whose weight is 1."""
    score_scale: Rate = 1.0
    """The teacher's scores are multiplied by this. Cosines differ by 0.1 where cross-encoders' logits differ by 5, and
    normalized scores by 1."""
    temperature: Rate = 1.0
    """kl: both models' scores are divided by this before the softmax."""

    @property
    def teachers(self) -> dict[str, OneOfTeachers]:
        """Every teacher by the key of the config that names it."""
        if self.models is None:
            own = {key: getattr(self, key) for key in TeacherModel.model_fields}
            return {"loss.teacher": OneOfTeachers(**own)}
        return {f"loss.teacher.models.{name}": each for name, each in (self.models.__pydantic_extra__ or {}).items()}

    @property
    def normalizes(self) -> bool:
        """Whether each teacher's scores of a query's passages are brought into 0..1."""
        return len(self.teachers) > 1 if self.normalize is None else self.normalize


class LossConfig(Section):
    """The training objective: a contrastive loss with in-batch negatives, and what keeps the vectors sparse."""

    type: Literal["splade", "csr"]
    """splade for both SPLADE architectures, csr for csr."""
    document_regularizer_weight: Weight | None = None
    """SPLADE: weight of the regularizer on documents. Larger is sparser. Or say the sparsity: target_document_dims."""
    query_regularizer_weight: Weight | None = None
    """SPLADE: the same on queries; more than 0 for `splade`, usually 0 for `inference-free-splade`."""
    target_document_dims: Positive | None = None
    """SPLADE: active dims that documents shall have on average; the weight is found during training, instead of
    document_regularizer_weight."""
    target_query_dims: Positive | None = None
    """splade: the same for queries, instead of query_regularizer_weight."""
    regularizer: Literal["flops", "l1", "idf-flops", "df-flops"] = "flops"
    """SPLADE: what the weight multiplies. flops: Σ m² of the mean activation (arXiv 2004.05665); l1: Σ m; idf-flops:
    FLOPS where common words cost more, for inference-free-splade (arXiv 2411.04403); df-flops: FLOPS where words that many
    vectors hold cost more (arXiv 2505.15070)."""
    document_dims_cap: Positive | None = None
    """SPLADE: documents of no more active dims than this are not penalised (arXiv 2504.14839, where documents are also
    encoded with model.activation_function log1p_relu)."""
    teacher: TeacherConfig | None = None
    """Imitate the scores of stronger models too."""
    scale: Rate | None = None
    """Similarities are multiplied by this before the softmax; 1 for dot products (SPLADE), 20 for cosine (csr)."""
    cached: bool = False
    """SPLADE: GradCache: large batches in the memory of mini_batch_size, for about 1.5 times the time."""
    mini_batch_size: Positive = 32
    """Texts per pass when cached."""
    beta: Weight = 0.1
    """csr: weight of the auxiliary reconstruction loss."""
    gamma: Weight = 1.0
    """csr: weight of the contrastive loss."""
    similarity_weight: Weight = 0.0
    """csr: weight of a loss that teaches codes to rank the passages of a batch as the dense vectors do."""
    similarity_temperature: Rate = 0.02
    """csr: cosines of dense vectors are divided by this before the softmax; those of codes are multiplied by scale."""

    @property
    def has_regularizers(self) -> bool:
        """Whether regularizers keep the vectors sparse; CSR keeps csr_k dims instead."""
        return self.type == "splade"

    @property
    def is_contrastive(self) -> bool:
        """Whether queries are compared with the passages of other rows."""
        return self.has_regularizers or self.gamma > 0 or self.similarity_weight > 0


class MiningConfig(Section):
    """Finds negatives for the rows of a data set that have none."""

    method: Literal["bm25", "model", "self"] = "bm25"
    """bm25: passages with the query's words, in its language; model: passages that a dense model finds similar; self: bm25
    at first, and again with the model that is being trained (arXiv 2007.00808), at steps that `every` and `rounds` say."""
    model: Source | None = None
    """model: a hub repository, or a local folder."""
    revision: Revision | None = None
    """model: commit, tag or branch of the repository."""
    per_query: Positive = 1
    """Negatives that are found for each query at most."""
    range: Annotated[list[Count], Field(min_length=2, max_length=2)] = [10, 100]
    """Ranks from and to which passages are taken, the query's own left out: the first few may be answers too."""
    every: Positive | None = None
    """self: steps from one mining to the next; a multiple of training.save_steps."""
    rounds: Positive = 1
    """self: how often is mined with the model."""

    def steps_of_rounds(self, last: int) -> list[int]:
        """The steps of a run of `last` steps after which is mined with the model."""
        steps = range(1, self.rounds + 1) if self.method == "self" and self.every else ()
        return [number * self.every for number in steps if self.every and number * self.every < last]

    margin: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Only passages that score at least this share below the query's own, 0.05: 5 % (arXiv 2407.15831)."""


class HubSource(Section):
    """One data set on the Hugging Face hub, or a local copy of it."""

    enabled: bool = True
    """Use this source."""
    source: Source
    """Hub repository, or a local folder with a copy of it."""
    revision: Revision
    """Commit, tag, branch or ref. The commit it stands for is recorded in run.json."""
    max_samples: Positive | None = None
    """Use a random sample of this many rows."""


class FamilySource(HubSource):
    """A data set that trains as a set of its own."""

    eval_rows: Count = 500
    """Rows held out for the evaluation loss, where the source has no split for it; none shares a text with training."""
    mine: MiningConfig | None = None
    """Find negatives for the rows that have none."""


class ScandiQaConfig(Section):
    """Question answering in Norwegian, Danish and Swedish: five sources that train as one set."""

    enabled: bool = True
    """Use this family."""
    eval_rows: Count = 500
    """Rows held out for the evaluation loss; none shares a text with rows that are trained on."""
    mine: MiningConfig | None = None
    """Find negatives for the rows that have none."""
    norquad: HubSource | None = None
    """ltg/norquad: question, context."""
    noropenbookqa: HubSource | None = None
    """ltg/noropenbookqa: question_stem, fact; a row without a fact is left out."""
    scandiqa: HubSource | None = None
    """alexandrainst/scandi-qa (no, da, sv): question, context."""
    supervised_da: HubSource | None = None
    """jealk/supervised-da: query, pos."""
    paws_x: HubSource | None = None
    """NbAiLab/norwegian-paws-x (nb, nn): paraphrases, and near-miss sentences as negatives."""


class ColumnMapping(Section):
    """Which columns of a source are the texts. All others are left out, and named in the plan."""

    anchor: str
    """Column with the query."""
    positive: str
    """Column with a passage that answers it, or a list of them: a row becomes one for each."""
    negative: str | None = None
    """Column with a passage that does not, or a list of them; rows where it is empty become pairs. Columns of this name
    with a number (negative_1, negative_2, …) are read too."""
    scores: str | None = None
    """Column with a teacher's scores of a row: a list, the positive's first, or the margin between positive and negative.
    loss.teacher with kind data learns from them."""
    positive_scores: str | None = None
    """Instead of scores: the scores of the positives, as many as the row has."""
    negative_scores: str | None = None
    """And those of the negatives."""


class LocalSource(Section):
    """A data set of your own: a folder in BEIR layout, .jsonl or .parquet files, or any hub repository."""

    enabled: bool = True
    """Use this set."""
    source: Source
    """Folder in BEIR layout, a file, a glob (*.jsonl, *.jsonl.gz, *.parquet), or a hub repository."""
    revision: Revision | None = None
    """Commit, tag, branch or ref; needed when the source is a hub repository."""
    subset: str | None = None
    """Name of the hub repository's subset, if it has several."""
    split: str = "train"
    """Split trained on: qrels/<split>.tsv (or qrels.<split>.tsv) of a BEIR folder and its queries, or a hub split."""
    eval_split: str | None = None
    """Split for the evaluation loss and, in BEIR layout, the search score. BEIR folders with a dev split use `dev`."""
    columns: ColumnMapping | None = None
    """Needed for everything but BEIR folders whose columns are not already anchor, positive[, negative]."""
    language: str | None = None
    """Language of the texts, or the name of a column that says it, for the counts per language in the plan."""
    max_samples: Positive | None = None
    """Use a random sample of this many rows."""
    eval_rows: Count = 200
    """Rows held out for the evaluation loss, where there is no eval_split; none shares a text with training."""
    mine: MiningConfig | None = None
    """Find negatives for the rows that have none."""


class QuickstartSource(Section):
    """The data that comes with this project: three small sets in the shapes of the real ones, and sister_languages:
    questions in one of bokmål, nynorsk, Danish and Swedish, whose answers are in another."""

    enabled: bool = True
    """Use it."""
    sets: list[Literal["nli", "scandi_qa", "ddsc", "sister_languages"]] = ["nli", "scandi_qa", "ddsc"]
    """The sets to train on. Those with a search set (nli, sister_languages) are searched before and after training."""
    mine: MiningConfig | None = None
    """Find negatives for the rows that have none, in each of the sets."""


class DatasetsConfig(BaseModel):
    """What is trained on. Every other name is a data set of your own (`source: …`)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, use_attribute_docstrings=True)
    __pydantic_extra__: dict[str, LocalSource]

    sampling_strategy: Literal["round_robin", "proportional"] = "round_robin"
    """round_robin: every set equally often; proportional: by its number of rows."""
    epoch: Literal["smallest", "largest"] = "smallest"
    """round_robin: an epoch ends when the smallest set has been seen once, or when the largest has."""
    length_window: Positive = 32
    """Rows of about the same length form a batch, within so many batches of the shuffled order; 1: batches at random, as
    they are where texts are packed."""
    queries_per_passage: Positive = 1
    """Queries that a passage of a batch has at most. Those beyond its own row's come from other rows, and the passage goes
    through the network once for all of them; 1: none. For splade and inference-free-splade."""
    negatives_per_row: Positive | None = None
    """Negatives of a row at most. A row with more becomes several, each with some of them. null: a row keeps all."""
    nli: FamilySource | None = None
    """Fremtind/all-nli-norwegian: anchor, positive, negative."""
    scandi_qa: ScandiQaConfig | None = None
    """Five question-answering sources as one set."""
    ddsc: FamilySource | None = None
    """DDSC/nordic-embedding-training-data: query, positive, and a negative in about 40 % of the rows."""
    quickstart: QuickstartSource | None = None
    """The embedded data."""

    @property
    def local(self) -> dict[str, LocalSource]:
        """The user's own data sets by name."""
        return dict(self.__pydantic_extra__ or {})


class EvaluationConfig(Section):
    """What the model is measured with before, during and after training."""

    nanobeir_datasets: list[NanoBeirTask] | None = None
    """NanoBEIR tasks (null: all 13; []: none), used when the hub is reachable."""
    nanobeir_languages: list[Literal["no", "sv"]] = ["no", "sv"]
    """Languages of NanoBEIR; there is no Danish one."""
    search: list[Source] = []
    """Folders in BEIR layout with a dev split to search in, besides those among the data sets."""
    mteb_tasks: list[str] = ["scandinavian"]
    """What `make eval` scores by default: groups, mteb names, folders in BEIR layout (`folder:no` says its language)."""
    track_sparsity: bool = True
    """Log active dims, never-active dims and FLOPS, and watch for collapse."""
    log_decoded_samples: Count = 6
    """Probe sentences (at most 6: two each in Norwegian, Danish, Swedish) whose top terms go to TensorBoard."""


class ModelCardConfig(Section):
    """What the model card says of the model."""

    model_name: str | None = None
    """Display name."""
    language: list[str] = ["no", "da", "sv"]
    """Language codes."""
    license: str = "apache-2.0"
    """Licence identifier."""
    tags: list[str] = []
    """More tags."""


class HardwareConfig(Section):
    """Where training runs."""

    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    """auto: cuda if there is one, else mps, else cpu; the choice is printed."""
    tf32: bool = False
    """TensorFloat-32 matrix products (CUDA, Ampere and later)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    fused_head: bool = True
    """SPLADE: compute the vectors without a logit for every token and word, and on CPUs the linear layers through oneDNN.
    Same vectors and gradients, less time and memory; false trains with the library's own head."""


class HubConfig(Section):
    """Uploading during training. Off unless a user's own config says so."""

    push: bool = False
    """Push every checkpoint to `repo`."""
    repo: str | None = None
    """Repository to push to."""
    private: bool = True
    """Create the repository private."""


class Config(Section):
    """One training run."""

    model: ModelConfig
    training: TrainingConfig
    loss: LossConfig
    datasets: DatasetsConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    model_card: ModelCardConfig = ModelCardConfig()
    hardware: HardwareConfig = HardwareConfig()
    hub: HubConfig = HubConfig()


# Sections whose keys may be names of the user's own, and what stands under such a name.
NAMED_BY_USERS: dict[type[BaseModel], type[BaseModel]] = {DatasetsConfig: LocalSource, TeacherModels: OneOfTeachers}


def section_at(path: Sequence[str | int]) -> type[BaseModel] | None:
    """The section's class that lives at a path of the config."""
    section: type[BaseModel] = Config
    for key in path:
        field = section.model_fields.get(str(key))
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        sections = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if field is None and section in NAMED_BY_USERS:
            sections = [NAMED_BY_USERS[section]]
        if not sections:
            return None
        section = sections[0]
    return section
