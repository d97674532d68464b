"""Which evaluation texts a run was trained on: exactly after normalisation, or nearly, by shared word n-grams."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mteb.abstasks import AbsTaskRetrieval
from scipy.sparse import csr_array

from evaluate.tasks import load
from trainer.config import ConfigError
from trainer.data.texts import passage_text
from trainer.system.progress_bar import ProgressReport, in_columns


@dataclass(frozen=True)
class Rule:
    """Evaluation texts of `words` words or more are near a training text that holds `share` of their n-grams."""

    words: int
    n: int
    share: float


# Measured on NorQuAD. With a tenth of their words replaced, 95 % of the passages still hold half of their 5-grams
# (17 % of their 8-grams), and 20 words cut from a dev passage share at most a quarter of theirs with a train passage.
LONG = Rule(words=20, n=5, share=0.5)
# No dev query is near one of the 3342 train queries or 529 contexts by word 3-grams; by character 5-grams 3 are, wrongly.
# Of all 4 words in a row in dev passages 1.8 % stand in a train passage, of all 5 words 0.4 %.
SHORT = Rule(words=5, n=3, share=0.8)

METHOD = (
    "Texts are compared after Unicode NFKC and case folding, with all but letters and digits as spaces, and passages "
    "with and without their title: exactly, and nearly, when one training text holds at least "
    f"{LONG.share:.0%} of the different word {LONG.n}-grams of an evaluation text of {LONG.words} words or more, or "
    f"{SHORT.share:.0%} of the word {SHORT.n}-grams of one of {SHORT.words} to {LONG.words - 1} words; "
    "shorter ones are compared exactly only."
)
KINDS = ("exact", "near")
PLURAL = {"query": "queries", "passage": "passages"}
EXAMPLES, EXCERPT = 5, 160
# Training texts in memory at a time.
BATCH = 2000
WORD = re.compile(r"[^\W_]+")
# What the hashes of an n-gram's words are multiplied by, so that their order counts.
FACTORS = np.random.default_rng(0).integers(2**63, size=LONG.n) | 1


class Match(NamedTuple):
    """The training text nearest to an evaluation text; the greater, the nearer."""

    exact: bool
    overlap: float
    dataset: str
    training: str


@dataclass(frozen=True)
class Item:
    """A query, or a passage. `forms` are numbers of the texts it is compared as: with and without its title."""

    side: str
    forms: list[int]


class Forms:
    """Evaluation texts, each once, numbered, by their words."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.texts: list[str] = []

    def add(self, *texts: str) -> list[int]:
        """The numbers of those texts that hold a word."""
        numbers = []
        for text in texts:
            if words := " ".join(words_of(text)):
                if words not in self.numbers:
                    self.numbers[words] = len(self.texts)
                    self.texts.append(text)
                numbers.append(self.numbers[words])
        return numbers

    def indexes(self) -> list["Index"]:
        """An index of the long texts and one of the short ones, where there are any."""
        by_rule: dict[Rule, dict[int, list[str]]] = {LONG: {}, SHORT: {}}
        for text, number in self.numbers.items():
            words = text.split()
            if len(words) >= SHORT.words:
                by_rule[LONG if len(words) >= LONG.words else SHORT][number] = words
        return [Index(rule, texts) for rule, texts in by_rule.items() if texts]


class Index:
    """Evaluation texts by their n-grams. Takes the words of each by its number."""

    def __init__(self, rule: Rule, texts: dict[int, list[str]]) -> None:
        self.n = rule.n
        self.numbers = np.array(list(texts))
        grams, row = ngrams_of(list(texts.values()), rule.n)
        self.grams, columns = np.unique(grams, return_inverse=True)
        self.held_by = zeros_and_ones(columns, row, (len(self.grams), len(texts)))
        self.sizes = self.held_by.sum(axis=0)
        self.needed = np.ceil(self.sizes * rule.share - 1e-9).astype(int)

    def find(self, training: list[list[str]]) -> Iterator[tuple[int, int, float]]:
        """Near pairs: the place of a training text, the number of an evaluation text, and the overlap."""
        grams, row = ngrams_of(training, self.n)
        columns = np.searchsorted(self.grams, grams).clip(max=len(self.grams) - 1)
        known = self.grams[columns] == grams
        texts = zeros_and_ones(row[known], columns[known], (len(training), len(self.grams)))
        shared = (texts @ self.held_by).tocoo()
        near = shared.data >= self.needed[shared.col]
        text, row = shared.row[near], shared.col[near]
        overlap = shared.data[near] / self.sizes[row]
        return zip(text.tolist(), self.numbers[row].tolist(), overlap.tolist(), strict=True)


def find_leaks(training_texts: Path, tasks: list[AbsTaskRetrieval]) -> dict[str, Any]:
    """Compare every training text (columns `text` and `dataset` of a parquet file) with every query and passage.

    Returns counts and the worst examples by task; what is exact is not among the near ones. Takes about 5 s per 100,000
    training texts of 60 words. Raises ConfigError without training texts.
    """
    file = open_training_texts(training_texts)
    forms = Forms()
    items = {task.metadata.name: list(read_items(task, forms)) for task in tasks}
    best = best_matches(file, forms)
    values = {name: summarize(texts, forms, best) for name, texts in items.items()}
    leaks = sum(task[f"{kind}_{side}"] for task in values.values() for kind in KINDS for side in PLURAL.values())
    return {"training_texts": file.metadata.num_rows, "method": METHOD, "tasks": values, "leaks": leaks}


def open_training_texts(file: Path) -> pq.ParquetFile:
    """The file of a run's training texts. Raises ConfigError when there is none, or it cannot be read."""
    if not file.is_file():
        raise ConfigError(f"there is no {file}: the run was trained before its texts were recorded. Train it again")
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())} Train the run again") from None


def read_items(task: AbsTaskRetrieval, forms: Forms) -> Iterator[Item]:
    """The queries and passages that a task is evaluated on; a row that stands in several splits once."""
    dataset = load(task)
    queries: dict[tuple[str, str, str], None] = {}
    passages: dict[tuple[str, str, str, str], None] = {}
    for subset in task.hf_subsets:
        for split in task.eval_splits:
            data = dataset[subset][split]
            queries.update({(subset, row["id"], row["text"]): None for row in data["queries"]})
            passages.update({(subset, row["id"], row.get("title") or "", row["text"]): None for row in data["corpus"]})
    for *_, text in queries:
        yield Item("query", forms.add(text))
    for *_, title, text in passages:
        yield Item("passage", forms.add(passage_text(title, text), text))


def best_matches(file: pq.ParquetFile, forms: Forms) -> dict[int, Match]:
    """The nearest training text of every evaluation text that has one, by number; the first of several."""
    best: dict[int, Match] = {}
    indexes = forms.indexes()
    progress = ProgressReport(desc=in_columns("leakage", "comparing", 12), total=file.metadata.num_rows, unit="texts")
    for batch in file.iter_batches(BATCH, columns=["text", "dataset"]):
        texts, datasets = batch["text"].to_pylist(), batch["dataset"].to_pylist()
        words = [words_of(text) for text in texts]
        same = ((number, forms.numbers.get(" ".join(text)), 1.0, True) for number, text in enumerate(words))
        near = ((*match, False) for index in indexes for match in index.find(words))
        for number, form, overlap, exact in chain(same, near):
            if form is not None and (form not in best or (exact, overlap) > best[form][:2]):
                best[form] = Match(exact, overlap, datasets[number], texts[number])
        progress.update(len(texts))
    progress.close()
    return best


def summarize(items: list[Item], forms: Forms, best: dict[int, Match]) -> dict[str, Any]:
    """Counts and the worst examples of one task: exact ones first, then by overlap, queries before passages."""
    counts = Counter(item.side for item in items)
    leaks = []
    for item in items:
        if near := [(best[form], form) for form in item.forms if form in best]:
            match, form = max(near)
            leaks.append((item.side, match, forms.texts[form]))
    kinds = Counter(("exact" if match.exact else "near", side) for side, match, _ in leaks)
    leaks.sort(key=lambda leak: (leak[1].exact, leak[1].overlap, leak[0] == "query"), reverse=True)
    return {
        **{PLURAL[side]: counts[side] for side in PLURAL},
        **{f"{kind}_{PLURAL[side]}": kinds[kind, side] for side in PLURAL for kind in KINDS},
        "examples": [
            {
                "kind": "exact" if match.exact else "near",
                "side": side,
                "dataset": match.dataset,
                "training": excerpt(match.training),
                "evaluation": excerpt(text),
                "overlap": round(match.overlap, 3),
            }
            for side, match, text in leaks[:EXAMPLES]
        ],
    }


def words_of(text: str) -> list[str]:
    """The words of a text as they are compared: runs of letters and digits, in Unicode NFKC, case folded."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams_of(texts: list[list[str]], n: int) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit number for each run of n words of a text, and the text's place.

    Python's hash of a word differs from one process to the next, so the numbers must not be stored.
    """
    place = np.repeat(np.arange(len(texts)), list(map(len, texts)))
    hashes = np.fromiter(map(hash, chain.from_iterable(texts)), np.int64, len(place))
    if len(hashes) < n:
        return hashes[:0], place[:0]
    first, last = place[: len(place) - n + 1], place[n - 1 :]
    within = first == last
    return (np.lib.stride_tricks.sliding_window_view(hashes, n) @ FACTORS[:n])[within], first[within]


def zeros_and_ones(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> csr_array:
    """A matrix with 1 at these places, however often they are named."""
    matrix = csr_array((np.ones(len(rows), np.int32), (rows, columns)), shape=shape)
    matrix.data[:] = 1
    return matrix


def excerpt(text: str) -> str:
    """A text's beginning, on one line."""
    return " ".join(text.split())[:EXCERPT]


def leakage_lines(values: dict[str, Any]) -> Iterator[str]:
    """What to print: a line per task, and its worst example."""
    for name, task in values["tasks"].items():
        exact = " and ".join(f"{task[f'exact_{side}']} of {task[side]} {side}" for side in PLURAL.values())
        more = {side: task[f"near_{plural}"] for side, plural in PLURAL.items() if task[f"near_{plural}"]}
        near = " and ".join(f"{count} more {side if count == 1 else PLURAL[side]}" for side, count in more.items())
        yield f"{name}: {exact} were trained on (exactly)" + (f", {near} nearly" if near else "")
        for worst in task["examples"][:1]:
            how = "exactly" if worst["kind"] == "exact" else f"{worst['overlap']:.0%} of it"
            yield f'  worst: a {worst["side"]}, {how} in {worst["dataset"]}: "{worst["evaluation"][:80]}"'
