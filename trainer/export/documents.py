"""Writes a corpus, or a shard of it, as an engine takes it; goes on after a kill; scores what was written."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.config import ConfigError
from trainer.export.check import write_figures
from trainer.export.corpus import Passage, Shard, chunks, describe, read_passages, survey
from trainer.export.formats import Format, Store
from trainer.export.query_side import require_same_queries
from trainer.export.request import Request
from trainer.export.sample import CHUNK, Sample, choose_scale
from trainer.export.vectors import Encoder, vectors_of
from trainer.runs.run import hash_of_model
from trainer.system.device import find_device
from trainer.system.files import write_once
from trainer.system.progress_bar import ProgressReport, in_columns

# What an export folder is made with.
CLAIM = "export.json"


def export_documents(make_engine: Callable[[int | None], Format], to: str, request: Request) -> None:
    """Write the documents, the files beside them and any queries, and check them. ConfigError if they rank differently."""
    run, corpus, shard, echo = request.run, request.corpus, request.shard, request.echo
    if corpus is None:
        raise ConfigError(f"say which documents to encode for {to}: CORPUS=file.jsonl (--corpus), or .parquet")
    engine, folder = make_engine(request.scale), request.folder(to)
    if request.scale and not engine.scales:
        raise ConfigError(f"--scale is for whole numbers; {to} takes weights as they are. Leave it out")
    made_with = {"to": to, "model": hash_of_model(run.final), "corpus": describe(corpus), "shards": shard.of}
    made_with["long_documents"] = "windows" if request.in_windows else "cut"
    for file in filter(None, (corpus, request.queries)):
        for line in survey(file).lines():
            echo(f"{file.name}: {line}")
    queries = list(read_passages(request.queries)) if request.queries else []
    device, reason = find_device("auto")
    echo(f"device    {device} ({reason})")
    batch_size = run.config().training.per_device_eval_batch_size
    by_token = Encoder.open(run.final, device, batch_size, in_windows=request.in_windows)
    encoder = replace(by_token, terms=engine.terms(by_token.terms))

    def scale_for_all_shards() -> int | None:
        if request.scale or not engine.scales:
            return request.scale
        shards = (Shard(number, shard.of) for number in range(1, shard.of + 1))
        return choose_scale(make_engine, encoder, [Sample.of(encoder, corpus, each, queries) for each in shards], echo)

    engine = make_engine(claim(folder, made_with, request.scale, scale_for_all_shards))
    if shard.number == 1:  # for all shards, and before hours of encoding: it may fail
        engine.write_beside(folder, by_token, request)
    write_shard(encoder, engine, folder, request, queries)


def write_shard(encoder: Encoder, engine: Format, folder: Path, request: Request, queries: list[Passage]) -> None:
    """One shard's documents, and with the first one the queries; then the check. Raises ConfigError when it fails."""
    corpus, shard, echo = request.corpus, request.shard, request.echo
    assert corpus is not None  # export_documents has asked for it
    name = f"{shard.number}-of-{shard.of}"
    documents, figures_file = engine.documents_at(folder / f"documents-{name}"), folder / f"check-{name}.json"
    figures_file.unlink(missing_ok=True)
    count = write_documents(encoder, engine, shard.of_passages(read_passages(corpus)), documents, echo)
    first, all_queries = shard.number == 1, engine.queries_at(folder / "queries")
    if queries and first:
        write_queries(encoder, engine, queries, all_queries)
    sample = Sample.of(encoder, corpus, shard, queries)
    try:
        read = [engine.read_document(record) for record in documents.first(len(sample.passages))]
        if [name for name, _ in read] != [passage.id for passage in sample.passages]:
            raise ConfigError(f"{documents} does not hold the documents of the corpus in their order")
        figures = sample.compare(engine, encoder.terms, [vector for _, vector in read])
        if first and (folder / "query").is_dir():
            require_same_queries(folder / "query", sample.texts, sample.queries, encoder.terms)
    except ConfigError as error:
        beside = [*(folder / each for each in engine.beside), *all_queries.paths()] if first else []
        set_aside(folder, documents.paths(), beside)
        refused = refused_name(Path(str(documents)))
        raise ConfigError(f"{error.format_message()}. The documents are set aside as {refused}") from None
    write_figures(figures_file, {"quantisation": engine.quantisation, "documents_written": count} | figures, echo)
    for file in documents.paths():
        refused_name(file).unlink(missing_ok=True)  # of an export that was refused before
    echo(f"exported  {count:,} documents to {documents}")


def refused_name(documents: Path) -> Path:
    """What no engine's tool takes for documents to index."""
    return documents.with_name(f"{documents.name}.refused")


def set_aside(folder: Path, documents: Iterable[Path], beside: Iterable[Path]) -> None:
    """Leave nothing of a refused export under the name of a finished one; its documents are kept, to look into.

    When no shard's documents are left, the folder can be exported to anew, with other settings too.
    """
    for file in documents:
        file.replace(refused_name(file))
    for path in beside:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    if all(file.name.endswith(".refused") for file in folder.glob("documents-*")):
        (folder / CLAIM).unlink(missing_ok=True)


def claim(
    folder: Path, made_with: dict[str, Any], scale: int | None, choose_scale: Callable[[], int | None]
) -> int | None:
    """Record what an export folder is made with, and its scale: the user's, or else the one recorded first.

    It is chosen before the first document of any shard and recorded once: shards that start together take the same. Raises
    ConfigError when the folder holds an export of something else.
    """
    file = folder / CLAIM
    try:
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            chosen = choose_scale()
            write_once(file, json.dumps(made_with | ({"scale": chosen} if chosen else {}), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    # folders of before there were windows do not say it
    recorded = {"long_documents": "cut"} | json.loads(file.read_text(encoding="utf-8"))
    for key, value in (made_with | {"scale": scale or recorded.get("scale")}).items():
        if recorded.get(key) != value:
            raise ConfigError(f"{folder} holds an export with another {key}. Remove the folder or name another OUTPUT")
    return recorded.get("scale")


def write_documents(
    encoder: Encoder, engine: Format, passages: Iterable[Passage], store: Store, echo: Callable[[str], None]
) -> int:
    """Append the passages that the store does not hold yet, whole chunks at a time; the number of all it holds."""
    done = store.recover()
    if done:
        echo(f"resuming  {store} holds {done:,} documents")
    with ProgressReport(desc=in_columns("encoding", "the corpus"), initial=done, unit="documents") as progress:
        for chunk in chunks(islice(passages, done, None), CHUNK):
            vectors = vectors_of(encoder.documents([passage.text for passage in chunk], progress), encoder.terms)
            store.append(engine.document(p.id, p.text, v) for p, v in zip(chunk, vectors, strict=True))
            done += len(chunk)
    store.close()
    if not done:
        raise ConfigError(f"there are no documents to write to {store}")
    return done


def write_queries(encoder: Encoder, engine: Format, queries: list[Passage], store: Store) -> None:
    """One record per query, in the place of what the store held before."""
    for file in store.paths():
        file.unlink()
    for chunk in chunks(queries, CHUNK):
        vectors = vectors_of(encoder.queries([query.text for query in chunk]), encoder.terms, engine.signed)
        store.append(engine.query(query.id, query.text, vector) for query, vector in zip(chunk, vectors, strict=True))
    store.close()
