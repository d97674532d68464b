"""The course of a run: read, choose, ask, check, search, divide, write; and what is said of it."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trainer.config import ConfigError
from trainer.data.mining import load_dense
from trainer.hub.download import Snapshot, fetch
from trainer.models.prompts import prompts_of
from trainer.queries import passages as corpora
from trainer.queries.ask import Asked, ask_all, unanswered
from trainer.queries.check import LOST, Query, Refused, candidates
from trainer.queries.endpoint import Endpoint
from trainer.queries.found import found_by_bm25, found_by_model
from trainer.queries.journal import NAME as JOURNAL
from trainer.queries.journal import Journal
from trainer.queries.passages import Chosen, Corpus, Passage, language_words
from trainer.queries.prompt import Prompt
from trainer.queries.request import Request
from trainer.queries.write import MANIFEST, REFUSED, divide, write_folder
from trainer.runs.lock import only_one_in
from trainer.system.progress_bar import going_on, in_columns

# Reasons in a line; an endpoint may word each of its own differently.
MOST_REASONS = 10


@dataclass(frozen=True)
class Work:
    """What a run has in hand once its corpus is read."""

    request: Request
    corpus: Corpus
    chosen: Chosen
    prompt: Prompt
    endpoint: Endpoint

    def say(self, label: str, text: str) -> None:
        """A line of the output."""
        self.request.echo(in_columns(label, text))

    def key_of(self, passage: Passage) -> str:
        """The journal's key of the question about a passage."""
        return self.prompt.key(passage, self.request.model)


def make_queries(request: Request) -> None:
    """Have queries written for the passages of a corpus, keep those that pass the checks, write a folder in BEIR layout.

    Raises ConfigError for a mistake that the user can fix. Run again, it asks about no passage twice.
    """
    folder = request.folder
    prompt = Prompt.read(request.prompt, request.questions, request.keywords)
    endpoint = Endpoint(request.llm, request.model, request.patience)
    dense = _fetch_dense(request)
    corpus = corpora.read_corpus(request.corpus)
    chosen = corpora.choose(corpus, request.passages, request.seed, request.shortest, request.language)
    work = Work(request, corpus, chosen, prompt, endpoint)
    _say_what_is_asked(work)
    with only_one_in(folder, request.echo, "worked in"):
        journal = Journal(folder, request.model)
        try:
            asked = _ask(work, journal)
            kept, refused = _check(work, journal, dense)
            splits = divide(kept, request.dev_share, request.seed)
            write_folder(folder, corpus, splits, refused, _manifest(work, journal, asked, splits, refused, dense))
        finally:
            journal.close()
    _say_what_came_out(work, splits, refused)


def _fetch_dense(request: Request) -> Snapshot | None:
    if request.dense is None:
        return None
    why = "to search for the passages again"
    return fetch(request.dense, request.dense_revision, kind="model", why=why, key="--dense")


# ------------------------------------------------------------------------------------------- asking
def _say_what_is_asked(work: Work) -> None:
    chosen, request = work.chosen, work.request
    is_sample = request.passages is not None and len(chosen.passages) == request.passages < len(work.corpus.records)
    sample = f", a random sample (seed {request.seed})" if is_sample else ""
    count = f"{len(work.corpus.records):,} passages in {work.corpus.source}; asking about {len(chosen.passages):,}"
    work.say("corpus", f"{count}{sample}")
    for line in work.corpus.reading.lines():
        work.say("", line)
    if chosen.passed_over:
        work.say("", "passed over: " + counted(chosen.passed_over))
    if not chosen.passages:
        raise ConfigError(f"{work.corpus.source}: no passage can be asked about ({counted(chosen.passed_over)})")
    languages, sources = language_words(chosen)
    work.say("language", f"{languages} ({sources})")
    asks = f"{request.questions} questions and {request.keywords} keyword queries for each passage"
    work.say("model", f"{request.model} at {work.endpoint.host}; {asks}; prompt: {work.prompt.name}")
    if len(work.corpus.records) <= request.found_in:
        fewer = f"all {len(work.corpus.records)} passages are among the first {request.found_in}"
        request.echo(f"Warning: {fewer} of every search: --found-in refuses only queries that share no word")


def _ask(work: Work, journal: Journal) -> Asked:
    request, passages = work.request, work.chosen.passages
    todo = unanswered(passages, work.key_of, journal)
    if len(todo) < len(passages):
        work.say(
            "resumed", f"{len(passages) - len(todo):,} passages are answered in {request.folder / JOURNAL} already"
        )
    if others := len(journal.answers.keys() - set(map(work.key_of, passages))):
        work.say("", f"{others:,} answers there are to another prompt, model or passage, and are left out")
    try:
        with going_on(in_columns("asking", request.model), len(todo), "passages") as progress:
            asked = ask_all(todo, work.prompt, work.endpoint, journal, request.limits, request.concurrency, progress)
    except KeyboardInterrupt:
        work.say("stopped", f"{tokens_and_cost(work, journal)}. The same command goes on where it was")
        raise
    failed = f"; {sum(asked.failed.values()):,} failed ({counted(asked.failed)})" if asked.failed else ""
    work.say("asked", f"{asked.answered:,} passages answered now{failed}")
    if asked.failed:
        work.say("", "the same command asks about the failed ones again")
    work.say("tokens", tokens_and_cost(work, journal))
    if asked.stopped_by:
        left = len(unanswered(passages, work.key_of, journal))
        request.echo(f"Warning: {asked.stopped_by}: {left:,} passages were not asked about. A higher limit goes on")
    return asked


def tokens_and_cost(work: Work, journal: Journal) -> str:
    """Of all answers of this model in the folder, from earlier runs too."""
    tokens = journal.tokens
    words = f"{tokens.read:,} read and {tokens.written:,} written by {work.request.model} in all runs"
    if tokens.uncounted:
        words += f"; the endpoint did not count those of {tokens.uncounted:,} answers"
    cost = work.request.limits.cost(tokens)
    return words if cost is None else f"{words}; cost {cost:,.4f} at the given prices"


# ------------------------------------------------------------------------------------------- checking
def _check(work: Work, journal: Journal, dense: Snapshot | None) -> tuple[list[Query], list[Refused]]:
    request = work.request
    wanted = {"question": request.questions, "keywords": request.keywords}
    queries: list[Query] = []
    refused: list[Refused] = []
    for candidate in candidates(work.chosen.passages, work.key_of, journal, wanted):
        if isinstance(candidate, Query):
            queries.append(candidate)
        else:
            refused.append(candidate)
    texts = [record.passage for record in work.corpus.records]
    found = found_by_bm25(queries, texts, request.found_in)
    missed = [query for query in queries if query.id not in found]
    if dense and missed:
        model = load_dense(dense, "--dense", prompts_of(dense.source, dense.folder, None))
        found |= found_by_model(missed, texts, request.found_in, model)
    refused += [Refused(q.passage, q.kind, q.text, LOST) for q in queries if q.id not in found]
    return [query for query in queries if query.id in found], refused


def _manifest(
    work: Work,
    journal: Journal,
    asked: Asked,
    splits: dict[str, list[Query]],
    refused: list[Refused],
    dense: Snapshot | None,
) -> dict[str, Any]:
    request, limits, tokens = work.request, work.request.limits, journal.tokens
    return {
        "made_by": "nordsparse, python -m trainer queries",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": request.model,
        "endpoint": work.endpoint.host,
        "prompt": {"name": work.prompt.name, "sha256": work.prompt.sha256, "text": work.prompt.text},
        "corpus": {"file": work.corpus.source.name, "passages": len(work.corpus.records)},
        "settings": {
            "passages": request.passages,
            "seed": request.seed,
            "questions": request.questions,
            "keywords": request.keywords,
            "shortest": request.shortest,
            "language": request.language,
            "found_in": request.found_in,
            "dense": dense and f"{dense.source}@{dense.commit or 'local'}",
            "dev_share": request.dev_share,
        },
        "passages": {
            "asked_about": len(work.chosen.passages),
            "answered": len(work.chosen.passages) - len(unanswered(work.chosen.passages, work.key_of, journal)),
            "failed": dict(asked.failed),
            "passed_over": dict(work.chosen.passed_over),
            "languages": dict(Counter(passage.language for passage in work.chosen.passages)),
            "stopped_by": asked.stopped_by,
        },
        "queries": {
            split: {"queries": len(those), "passages": len({query.passage.id for query in those})}
            for split, those in splits.items()
        },
        "refused": dict(Counter(one.reason for one in refused)),
        "tokens": {"read": tokens.read, "written": tokens.written, "answers_not_counted": tokens.uncounted},
        "cost": limits.cost(tokens),
        "prices_per_million": limits.price_in is not None and {"read": limits.price_in, "written": limits.price_out},
    }


# ------------------------------------------------------------------------------------------- what came out
def _say_what_came_out(work: Work, splits: dict[str, list[Query]], refused: list[Refused]) -> None:
    folder = work.request.folder
    if refused:
        reasons = Counter(one.reason for one in refused)
        work.say("refused", f"{len(refused):,}: {counted(reasons)}; see {folder / REFUSED}")
    kept = sum(map(len, splits.values()))
    if not kept:
        raise ConfigError(f"no query passed the checks. {folder / REFUSED} has each with its reason")
    parts = (
        f"{len(those):,} {split} (of {len({query.passage.id for query in those}):,} passages)"
        for split, those in splits.items()
    )
    work.say("kept", f"{kept:,} queries: {', '.join(parts)}")
    work.say("wrote", f"{folder}; how it came to be: {folder / MANIFEST}")
    work.say("next", "put this into your config, then make train:")
    for line in next_step(work):
        work.request.echo(line)


def next_step(work: Work) -> Iterator[str]:
    """The lines of a config that train on the folder."""
    languages = {passage.language for passage in work.chosen.passages}
    languages = {"no"} if languages == {"nb", "nn"} else languages
    language = f", language: {languages.pop()}" if len(languages) == 1 else ""
    yield "datasets:"
    yield f"  {work.request.name}: {{source: {quoted(str(work.request.folder))}{language}}}"


def quoted(path: str) -> str:
    """A path as YAML reads it back within braces."""
    return path if path.replace("/", "").replace("_", "").replace("-", "").isalnum() else json.dumps(path)


def counted(reasons: Counter[str]) -> str:
    """Each reason with its number, the most frequent first."""
    words = [f"{number:,} {reason}" for reason, number in reasons.most_common()]
    more = f" and {len(words) - MOST_REASONS:,} other reasons" if len(words) > MOST_REASONS else ""
    return ", ".join(words[:MOST_REASONS]) + more
