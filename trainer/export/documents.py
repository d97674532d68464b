"""Writes a corpus, or a shard of it, as an engine takes it; goes on after a kill; scores what was written."""

import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import scipy.sparse as sp

from trainer.config import ConfigError
from trainer.export.check import Vectors, allowed_by, compare, embedded_queries, write_figures
from trainer.export.corpus import Passage, chunks, describe, keep_whole, read_passages
from trainer.export.lines import LineFormat
from trainer.export.query_side import require_same_queries
from trainer.export.request import Request
from trainer.export.vectors import Encoder, matrix_of, vectors_of
from trainer.files import write_atomically
from trainer.run import hash_of_model

Say = Callable[[str], None]

# Documents encoded before they are written: what a kill can lose, and the vectors that are in memory.
CHUNK = 512
# What is scored again: the first documents of the shard, and queries of which some are their first words.
CHECKED_DOCUMENTS, CHECKED_QUERIES, QUERY_WORDS = 200, 64, 8
PROGRESS_SECONDS = 10.0
# What an export folder is made with.
CLAIM = "export.json"


def export_documents(make_form: Callable[[int], LineFormat], to: str, request: Request) -> None:
    """Write the documents, what must stand beside them, and the queries if any; check the files.

    Raises ConfigError for what the user can mend, and when the files would rank documents differently from the model.
    """
    run, corpus, part, say = request.run, request.corpus, request.shard, request.say
    if corpus is None:
        raise ConfigError(f"say which documents to encode for {to}: CORPUS=file.jsonl (--corpus), or .parquet")
    form, folder = make_form(request.scale), request.folder(to)
    made_with = {"to": to, "model": hash_of_model(run.final), "corpus": describe(corpus), "shards": part.of}
    claim(folder, made_with | {"scale": request.scale})
    encoder = Encoder.open(run.final, request.device(), run.config().training.per_device_eval_batch_size)
    tokens, encoder = encoder.terms, replace(encoder, terms=form.terms(encoder.terms))
    given = list(read_passages(request.queries)) if request.queries else []
    if part.number == 1:  # for all shards; and first, so that what cannot be written is known before hours of encoding
        form.write_beside(folder, replace(encoder, terms=tokens), request)
    documents = folder / f"documents-{part.number}-of-{part.of}{form.suffix}"
    figures_file = folder / f"check-{part.number}-of-{part.of}.json"
    figures_file.unlink(missing_ok=True)
    count = write_documents(encoder, form, part.of_passages(read_passages(corpus)), documents, say)
    if given and part.number == 1:
        write_queries(encoder, form, given, folder / "queries.jsonl")
    sample = list(islice(part.of_passages(read_passages(corpus)), CHECKED_DOCUMENTS))
    figures = {"to": to, "quantisation": form.quantisation, "documents_written": count}
    try:
        figures |= check(encoder, form, documents, sample, given)
    except ConfigError as error:
        beside = (*form.beside, "queries.jsonl") if part.number == 1 else ()
        refused = set_aside(documents, beside)
        raise ConfigError(f"{error.format_message()}. The documents are set aside as {refused}") from None
    write_figures(figures_file, figures, say)
    refused_name(documents).unlink(missing_ok=True)  # of an export that was refused before
    say(f"exported  {count:,} documents to {documents}")


def refused_name(documents: Path) -> Path:
    """What no engine's tool takes for documents to index."""
    return documents.with_name(f"{documents.name}.refused")


def set_aside(documents: Path, beside: Iterable[str]) -> Path:
    """Leave nothing of a refused export under the name of a finished one: where its documents are now.

    They are kept, to see what is wrong with them; what was written beside them is removed. When no shard's documents
    are left, the folder can be exported to anew, with other settings too.
    """
    refused = refused_name(documents)
    documents.replace(refused)
    for name in beside:
        path = documents.with_name(name)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    if not list(documents.parent.glob(f"documents-*{documents.suffix}")):
        (documents.parent / CLAIM).unlink(missing_ok=True)
    return refused


def claim(folder: Path, made_with: dict[str, Any]) -> None:
    """Note what an export folder is made with. Raises ConfigError when it holds an export of something else."""
    file = folder / CLAIM
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else made_with
    for key, value in made_with.items():
        if known.get(key) != value:
            raise ConfigError(
                f"{folder} holds an export with another {key}. Remove the folder, or name another: OUTPUT=folder (--output)"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(made_with, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None


def write_documents(encoder: Encoder, form: LineFormat, passages: Iterable[Passage], file: Path, say: Say) -> int:
    """Append the passages that the file does not hold yet, whole chunks at a time; the number of all it holds."""
    done = start = keep_whole(file, form.lines_per_document)
    if done:
        say(f"resuming  {file} holds {done:,} documents")
    began = last = time.monotonic()
    for chunk in chunks(islice(passages, done, None), CHUNK):
        vectors = vectors_of(encoder.documents([passage.text for passage in chunk]), encoder.terms)
        append(file, (form.document(p.id, p.text, v) for p, v in zip(chunk, vectors, strict=True)))
        done += len(chunk)
        if (now := time.monotonic()) - last > PROGRESS_SECONDS:
            last = now
            say(f"encoded   {done:,} documents, {(done - start) / (now - began):.0f} per second")
    if not done:
        raise ConfigError(f"there are no documents to write to {file}")
    return done


def append(file: Path, documents: Iterable[str]) -> None:
    """Add whole documents to a file. Raises ConfigError when the disk is full or gone."""
    try:
        with file.open("a", encoding="utf-8") as out:
            out.write("".join(documents))
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}. To go on from there, run this again") from None


def write_queries(encoder: Encoder, form: LineFormat, queries: list[Passage], file: Path) -> None:
    """One line per query."""
    with file.open("w", encoding="utf-8") as out:
        for chunk in chunks(queries, CHUNK):
            vectors = vectors_of(encoder.queries([query.text for query in chunk]), encoder.terms, form.signed)
            out.writelines(
                form.query(query.id, query.text, vector) for query, vector in zip(chunk, vectors, strict=True)
            )


def check(
    encoder: Encoder, form: LineFormat, file: Path, sample: list[Passage], given: list[Passage]
) -> dict[str, Any]:
    """Score queries against the first documents as they stand in the file, beside the model's own scores."""
    with file.open(encoding="utf-8") as lines:
        wanted = len(sample) * form.lines_per_document
        read = list(islice(lines, wanted))
    size = form.lines_per_document
    found = [form.read_document(read[start : start + size]) for start in range(0, len(read), size)]
    if [name for name, _ in found] != [passage.id for passage in sample]:
        raise ConfigError(
            f"{file} does not hold the documents of the corpus in their order. Remove it and export again"
        )
    texts = [query.text for query in given[:CHECKED_QUERIES]] or embedded_queries()
    texts += [" ".join(p.text.split()[:QUERY_WORDS]) for p in sample[:CHECKED_QUERIES]]
    queries = [Passage(f"check-{number}", text) for number, text in enumerate(texts, 1)]
    written = file.with_name(f"check-queries-{file.stem.removeprefix('documents-')}.jsonl")
    write_queries(encoder, form, queries, written)
    with written.open(encoding="utf-8") as lines:  # not splitlines: a text may hold other line separators
        read_queries = [form.read_query(line) for line in lines]
    exact = Vectors(encoder.queries(texts), encoder.documents([passage.text for passage in sample]))
    exported = Vectors(matrix_of(read_queries, encoder.terms), matrix_of([v for _, v in found], encoder.terms))
    errors = Vectors(
        _with_data(exact.queries, form.query_errors(exact.queries.data)),
        _with_data(exact.documents, form.document_errors(exact.documents.data)),
    )
    figures = compare(exact.scores(), exported.scores(), allowed_by(exact, errors), remedy=form.remedy)
    if not form.signed:
        figures["query_weights_below_0_left_out"] = int((exact.queries.data < 0).sum())
    # of the first shard, which writes it
    if (beside := file.parent / "query").is_dir() and file.name.startswith("documents-1-"):
        figures["query_files_largest_difference"] = require_same_queries(beside, texts, exact.queries, encoder.terms)
    return figures


def _with_data(rows: sp.csr_matrix, data: Any) -> sp.csr_matrix:
    return sp.csr_matrix((data, rows.indices, rows.indptr), shape=rows.shape)
