"""What training reads: rows by their number of negatives, held-out rows, searches, token ids, and the batch order."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict

from trainer.config import Config, ConfigError
from trainer.data.batches import Mixture, NoDuplicateBatches, batch_sizes, text_ids
from trainer.data.beir import SearchSet
from trainer.data.best_windows import BestWindows
from trainer.data.choosing import divide
from trainer.data.forward_passes import forward_passes_of, padding
from trainer.data.further_queries import FurtherQueries, answers_of
from trainer.data.negatives import by_count, with_at_most
from trainer.data.roles import ANCHOR, LABEL, negatives_of, passages_of, roles_of
from trainer.data.rows import text_numbers
from trainer.data.self_mining import ToMine
from trainer.data.teacher_scores import BatchScores
from trainer.data.tokens import Tokeniser, TokenRows
from trainer.system.distributed import processes
from trainer.system.files import written_whole

# Batches of a subset that its padding is counted on: a loop over all of those of a million rows takes seconds.
COUNTED_BATCHES = 1000
# Batches that queries per passage are counted on.
COUNTED_QUERIES = 100


@dataclass
class SetSummary:
    """What is known of one data set before training: the plan prints it, the manifest keeps it."""

    name: str
    rows: int
    triplets: int
    pairs: int
    eval_rows: int
    languages: dict[str, int]
    left_out: dict[str, int]
    eval_left_out: dict[str, int]
    revisions: dict[str, str | None]
    fingerprint: str
    several: dict[str, int] = field(default_factory=dict)  # the other rows by their number of negatives, most first
    mined: dict[str, int | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was not read, and what of the texts is not as it came
    rows_seen: int = 0
    rows_drawn: int = 0


@dataclass
class TrainingData:
    """Everything training reads.

    `train` and `eval` map `<name>` to rows, or, where they differ in their number of negatives, `<name>-7-negatives`,
    `<name>-triplets` and `<name>-pairs`.
    """

    train: DatasetDict
    eval: DatasetDict
    subsets: dict[str, list[str]]
    summaries: dict[str, SetSummary]
    search: list[SearchSet] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)  # sets that are left out, for they need the hub
    tokens: dict[str, TokenRows] = field(default_factory=dict)  # of the rows in `train` and `eval`, by `tokenise`
    eval_tokens: dict[str, TokenRows] = field(default_factory=dict)
    languages: dict[str, list[str]] = field(default_factory=dict)  # of each row in `train`
    batch_scores: dict[str, BatchScores] = field(default_factory=dict)  # of teachers that compare all of a batch
    to_mine: dict[str, ToMine] = field(default_factory=dict)  # sets that are mined again with the model
    first_mined: dict[str, Dataset] = field(default_factory=dict)  # rows of `train` as they were before a later mining
    _first_lengths: dict[str, np.ndarray] = field(default_factory=dict)
    _text_ids: dict[str, np.ndarray] = field(default_factory=dict)
    _batches: dict[str, NoDuplicateBatches] = field(default_factory=dict)

    def add_search(self, found: SearchSet, validation: SearchSet | None, config: Config) -> None:
        """Add a search set; where a checkpoint is chosen, with the queries that choose it apart from those reported."""
        if any(found.name == other.name for other in self.search):
            raise ConfigError(f"evaluation.search: two search sets are called '{found.name}'. Rename one folder")
        self.search.append(divide(found, validation) if config.training.load_best_model_at_end else found)

    @property
    def columns(self) -> int:
        """Texts of a row at most: query, positive, and perhaps negatives; 3 where no rows are known."""
        return max((len(roles_of(rows.column_names)) for rows in self.train.values()), default=3)

    @property
    def roles(self) -> list[str]:
        """The columns of texts that the rows have."""
        return roles_of(dict.fromkeys(name for rows in self.train.values() for name in rows.column_names))

    def mixture(self, config: Config) -> Mixture:
        """The order in which batches of the sets are drawn."""
        groups = [[len(self._sizes(subset, config)) for subset in subsets] for subsets in self.subsets.values()]
        datasets = config.datasets
        return Mixture(groups, datasets.sampling_strategy, datasets.epoch, config.training.seed)

    def _sizes(self, subset: str, config: Config) -> list[int]:
        """Rows of each batch of one pass over a subset; a batch is shared by all processes."""
        together = config.training.per_device_train_batch_size * processes()
        return batch_sizes(len(self.train[subset]), together, processes())

    def rows_left_over(self, config: Config, name: str) -> int:
        """Rows of a set that sit out each pass, because what is left cannot be shared equally by all processes."""
        return sum(len(self.train[subset]) - sum(self._sizes(subset, config)) for subset in self.subsets[name])

    def tokenise(
        self, tokeniser: Tokeniser, windows: BestWindows | None = None, queries: int = 1, seed: int = 0
    ) -> None:
        """Make the token ids of all rows. Raises ConfigError.

        windows: gives the part of a long passage that a row reads; None: its beginning. The rows themselves keep their
        passages, so no batch holds two parts of one. queries: that a passage of a batch has at most; where there are more
        than one, the seed draws them.
        """
        self._batches.clear()
        # these lengths part the rows into batches, whatever is mined later
        for subset, rows in self.first_mined.items():
            self._first_lengths[subset] = self._tokenise(subset, rows, tokeniser, windows).longest_passages()
        for subsets in self.subsets.values():
            for subset in subsets:
                self.tokens[subset] = self._tokenise(subset, self.train[subset], tokeniser, windows)
                if subset in self.batch_scores:
                    self.tokens[subset] = replace(self.tokens[subset], batch_scores=self.batch_scores[subset])
            if queries > 1 or any(subset in self.first_mined for subset in subsets):
                self._add_further_queries(subsets, queries, seed)
        for subset, rows in self.eval.items():
            self.eval_tokens[subset] = self._tokenise(subset, rows, tokeniser, windows)

    def _tokenise(self, subset: str, rows: Dataset, tokeniser: Tokeniser, windows: BestWindows | None) -> TokenRows:
        if windows:
            rows = windows.rows(rows)
        is_whole = rows is self.train.get(subset)
        return tokeniser.rows(subset, rows, self.text_ids(subset) if is_whole else text_ids(rows))

    def _add_further_queries(self, subsets: list[str], most: int, seed: int) -> None:
        numbered = text_numbers([self.train[subset].with_format("arrow")[:] for subset in subsets])
        answers = answers_of(numbered)
        for subset, ids in zip(subsets, numbered, strict=True):
            tokens = self.tokens[subset]
            further = FurtherQueries(ids, tokens.passage_numbers(), answers, most, seed)
            self.tokens[subset] = replace(tokens, further=further)

    def text_ids(self, subset: str) -> np.ndarray:
        """[rows, columns] numbers of the texts of a subset, the same for equal texts."""
        if subset not in self._text_ids:
            self._text_ids[subset] = text_ids(self.train[subset])
        return self._text_ids[subset]

    def batches(self, subset: str, config: Config) -> NoDuplicateBatches:
        """The batches of a subset; rows of about the same length together, where the lengths are known."""
        if subset not in self._batches:
            self._batches[subset] = NoDuplicateBatches(
                self.train[subset],
                config.training.per_device_train_batch_size,
                seed=config.training.seed,
                processes=processes(),
                ids=text_ids(self.first_mined[subset]) if subset in self.first_mined else self.text_ids(subset),
                lengths=self._lengths(subset),
                window=1 if config.model.packs_texts else config.datasets.length_window,
            )
        return self._batches[subset]

    def _lengths(self, subset: str) -> np.ndarray | None:
        if subset in self._first_lengths:
            return self._first_lengths[subset]
        return self.tokens[subset].longest_passages() if subset in self.tokens else None

    def replace_mined(self, name: str, table: pa.Table, config: Config) -> None:
        """Give a set's rows the negatives of a later mining. Their batches stay those of the first one."""
        for subset, part in by_count(name, with_at_most(table, config.datasets.negatives_per_row)).items():
            self.first_mined[subset] = self.train[subset]
            self.train[subset] = Dataset(part.drop_columns("language"))
            self._text_ids.pop(subset, None)

    def rows_without_a_batch(self, config: Config, name: str) -> int:
        """Rows of a set that sit out its first pass, because every batch already holds one of their texts."""
        samplers = [self.batches(subset, config) for subset in self.subsets[name]]
        return sum(int(sampler.sizes.sum()) - sum(map(len, sampler.batches(0))) for sampler in samplers)

    def batches_of_one(self, subset: str, config: Config, *, held_out: bool = False) -> tuple[int, int]:
        """Of a first pass: batches whose one query has no other passage to choose from, and all batches."""
        training, rows = config.training, (self.eval if held_out else self.train)[subset]
        if held_out:
            batches = NoDuplicateBatches(rows, training.per_device_eval_batch_size, training.seed, processes())
        else:
            batches = self.batches(subset, config)
        sizes = [len(batch) for batch in batches.batches(0)]
        return 0 if negatives_of(rows.column_names) else sizes.count(1), len(sizes)

    def queries_per_passage(self, config: Config, name: str) -> float:
        """Queries for each passage of a set's batches, negatives too, on average over some batches of a first pass.

        Where the rows are not tokenised, passages count as they are, and not by their windows.
        """
        queries = passages = 0
        for subset in self.subsets[name]:
            every = self.batches(subset, config).batches(0)
            further = self.tokens[subset].further if subset in self.tokens else self._further_of_whole(subset, config)
            assert further is not None, subset
            for batch in every[:: -(-len(every) // COUNTED_QUERIES)]:
                for rows in np.split(batch, processes()):
                    queries += len(rows) + len(further.rows_for(rows)[0])
                    passages += further.read[rows].size
        return queries / passages

    def _further_of_whole(self, subset: str, config: Config) -> FurtherQueries:
        ids = self.text_ids(subset)
        return FurtherQueries(
            ids, ids[:, 1:], answers_of([ids]), config.datasets.queries_per_passage, config.training.seed
        )

    def padding(self, config: Config, device: str) -> float:
        """The share of padding in what the network will compute.

        Counted on the first pass of each subset, which counts as often as its set is drawn.
        """
        passes = forward_passes_of(config, device)
        tokens, positions = 0.0, 0.0
        for name, subsets in self.subsets.items():
            times = self.summaries[name].rows_drawn / self.summaries[name].rows
            for subset in subsets:
                every, rows = self.batches(subset, config).batches(0), self.tokens[subset]
                batches = every[:: -(-len(every) // COUNTED_BATCHES)]
                counts = padding(batches, rows.lengths(), rows.passages, passes, processes())
                share = times * len(every) / len(batches)
                tokens, positions = tokens + share * counts[0], positions + share * counts[1]
        return 1 - tokens / max(positions, 1)

    def sample(self, rows: int, seed: int) -> "TrainingData":
        """The same with at most so many rows of each subset to train on, and none held out."""
        rng = np.random.default_rng(seed)
        picked = {name: each.select(np.sort(rng.permutation(len(each))[:rows])) for name, each in self.train.items()}
        return TrainingData(DatasetDict(picked), DatasetDict(), self.subsets, self.summaries, self.search)

    def rows_of(self, config: Config, mixture: Mixture, first: int, last: int) -> dict[str, tuple[int, int]]:
        """How many rows of each set the batches of a run from number `first` up to `last` hold, and in how many different
        batches' worth of rows."""
        found = {}
        for (name, subsets), before, after in zip(
            self.subsets.items(), mixture.drawn(first), mixture.drawn(last), strict=True
        ):
            sizes = {
                (number, batch): size
                for number, subset in enumerate(subsets)
                for batch, size in enumerate(self._sizes(subset, config))
            }
            times = {batch: after[batch] - before[batch] for batch in sizes}
            found[name] = (
                sum(size * times[batch] for batch, size in sizes.items()),
                sum(size for batch, size in sizes.items() if times[batch]),
            )
        return found

    def manifest(self) -> dict[str, dict]:
        """What the manifest keeps of every set."""
        return {name: asdict(summary) for name, summary in self.summaries.items()}

    def forget_scores(self) -> None:
        """Leave the scores that the data brought unused."""
        for name, rows in self.train.items():
            if LABEL in rows.column_names:
                self.train[name] = rows.remove_columns(LABEL)

    def write_texts(self, file: Path) -> None:
        """Store every different training text per data set, to measure its overlap with evaluation data later."""
        schema = pa.schema([("dataset", pa.string()), ("text", pa.string())])
        with written_whole(file) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            for name, subsets in self.subsets.items():
                texts = self._texts(subsets, roles_of)
                writer.write_table(pa.table({"dataset": pa.repeat(name, len(texts)), "text": texts}, schema))

    def queries(self) -> list[str]:
        """Every different training query, in a fixed order."""
        return self._texts(self.train, lambda columns: [ANCHOR]).to_pylist()

    def passages(self) -> list[str]:
        """Every different training passage, positive or negative, in a fixed order."""
        return self._texts(self.train, passages_of).to_pylist()

    def documents(self, name: str) -> pa.Array:
        """Every different passage that a set trains on."""
        return self._texts(self.subsets[name], passages_of)

    def _texts(self, subsets: Iterable[str], roles: Callable[[list[str]], list[str]]) -> pa.Array:
        """roles: which of a subset's columns are taken."""
        chunks: list[pa.Array] = []
        for subset in subsets:
            table = self.train[subset].with_format("arrow")[:]
            chunks += (chunk for role in roles(table.column_names) for chunk in table[role].chunks)
        return pc.unique(pa.chunked_array(chunks, pa.string()))
