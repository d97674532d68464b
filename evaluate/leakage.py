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
from trainer.data.beir import passage_text
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
# No dev query is near one of the 3342 train queries or 529 contexts by word 3-grams. By character 5-grams, which would
# see through misspellings, 3 are, and all ask something else: 'hvem er leder i SD' and '… leder i Greenpeace Norge'.
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
# Training texts in memory at a time, and pairs of texts whose n-grams are.
BATCH, PAIRS = 2000, 10_000
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
        hashes: dict[Rule, dict[int, np.ndarray]] = {LONG: {}, SHORT: {}}
        for words, number in self.numbers.items():
            hashed = hash_words(words.split())
            if len(hashed) >= SHORT.words:
                hashes[LONG if len(hashed) >= LONG.words else SHORT][number] = hashed
        return [Index(rule, texts) for rule, texts in hashes.items() if texts]


class Index:
    """Evaluation texts by their n-grams. Takes the words of each, as hashes, by its number."""

    def __init__(self, rule: Rule, texts: dict[int, np.ndarray]) -> None:
        self.n = rule.n
        self.numbers = np.array(list(texts))
        rows = [np.unique(ngrams(words, rule.n)) for words in texts.values()]
        self.sizes = np.array([len(row) for row in rows])
        self.needed = np.ceil(self.sizes * rule.share - 1e-9).astype(int)
        self.grams, columns = np.unique(np.concatenate(rows), return_inverse=True)
        ends = np.append(0, self.sizes.cumsum())
        shape = (len(rows), len(self.grams))
        self.held = csr_array((np.ones(len(columns), np.int32), columns, ends), shape=shape)
        # A text that holds `needed` n-grams of a row holds one of any `size - needed + 1` of them. The rarest are looked
        # up, so n-grams that every text has cost nothing, and no near text is missed.
        row = np.repeat(np.arange(len(rows)), self.sizes)
        by_rarity = np.lexsort((np.bincount(columns)[columns], row))
        rank = np.arange(len(row)) - ends[row]
        rarest = by_rarity[rank <= (self.sizes - self.needed)[row]]
        self.rare = csr_array((np.ones(len(rarest), np.int32), (columns[rarest], row[rarest])), shape=shape[::-1])

    def find(self, words: np.ndarray, owner: np.ndarray, count: int) -> Iterator[tuple[int, int, float]]:
        """Near pairs: which of `count` training texts, the number of the evaluation text, and the overlap.

        `words` are the words of all of them as hashes, and `owner` says which text each belongs to.
        """
        grams = ngrams(words, self.n)
        first, last = owner[: len(grams)], owner[len(owner) - len(grams) :]
        column = np.searchsorted(self.grams, grams).clip(max=len(self.grams) - 1)
        known = (self.grams[column] == grams) & (first == last)
        place = (first[known], column[known])
        texts = csr_array((np.ones(known.sum(), np.int32), place), shape=(count, len(self.grams)))
        texts.data[:] = 1  # an n-gram counts once, however often it occurs
        text, row = (texts @ self.rare).nonzero()
        enough = texts.sum(axis=1)[text] >= self.needed[row]
        text, row = text[enough], row[enough]
        for start in range(0, len(text), PAIRS):
            part = slice(start, start + PAIRS)
            shared = texts[text[part]].multiply(self.held[row[part]]).sum(axis=1)
            near = shared >= self.needed[row[part]]
            overlap = shared / self.sizes[row[part]]
            yield from zip(
                text[part][near].tolist(), self.numbers[row[part][near]].tolist(), overlap[near].tolist(), strict=True
            )


def find_leaks(training_texts: Path, tasks: list[AbsTaskRetrieval]) -> dict[str, Any]:
    """Compare every training text (columns `text` and `dataset` of a parquet file) with every query and passage.

    Returns counts and the worst examples by task; what is exact is not among the near ones. Takes about 5 s per 100,000
    training texts of 60 words; memory grows with the evaluation texts alone. Raises ConfigError without training texts.
    """
    file = open_training_texts(training_texts)
    forms = Forms()
    items = {task.metadata.name: list(read_items(task, forms)) for task in tasks}
    best = best_matches(file, forms)
    values = {name: summarize(texts, forms, best) for name, texts in items.items()}
    leaks = sum(task[f"{kind}_{side}"] for task in values.values() for kind in KINDS for side in PLURAL.values())
    return {"training_texts": file.metadata.num_rows, "method": METHOD, "tasks": values, "leaks": leaks}


def open_training_texts(file: Path) -> pq.ParquetFile:
    """The file of a run's training texts. Raises ConfigError when there is none, or it holds no texts."""
    if not file.is_file():
        if (file.parent / "run.json").is_file():
            raise ConfigError(f"there is no {file}: the run was trained before its texts were recorded. Train it again")
        raise ConfigError(f"{file.parent} is no run of this project, so what its model was trained on is not known")
    try:
        opened = pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())} Train the run again") from None
    if missing := {"text", "dataset"} - set(opened.schema_arrow.names):
        raise ConfigError(f"{file} has no column '{min(missing)}': it holds no training texts. Train the run again")
    return opened


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
        owner = np.repeat(np.arange(len(words)), [len(text) for text in words])
        hashes = hash_words([word for text in words for word in text])
        same = ((number, forms.numbers.get(" ".join(text)), 1.0, True) for number, text in enumerate(words))
        near = ((*match, False) for index in indexes for match in index.find(hashes, owner, len(words)))
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


def hash_words(words: list[str]) -> np.ndarray:
    """A 64-bit number per word. Python's own hash differs from one process to the next, so it must not be stored."""
    return np.fromiter(map(hash, words), np.int64, len(words))


def ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit number per n consecutive words: len(words) - n + 1 of them, or none."""
    if len(words) < n:
        return words[:0]
    return np.lib.stride_tricks.sliding_window_view(words, n) @ FACTORS[:n]


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
