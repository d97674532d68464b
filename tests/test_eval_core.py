"""What all evaluations stand on: tasks, exact search, scores through mteb, results on disk, and what is evaluated."""

import json
import math
import random
import shutil
from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import pytrec_eval
import scipy.sparse as sp
from datasets import Dataset
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers.util import semantic_search

from evaluate import scores as scores_module
from evaluate.bm25 import BM25
from evaluate.passage_vectors import PassageVectors
from evaluate.scores import best, ndcg_per_query, score_system
from evaluate.search import SparseSearch
from evaluate.subject import open_subject
from evaluate.tasks import GROUPS, LANGUAGES, load, local_task, select_tasks, task_names
from tests.checkpoints import DOCUMENTS, QUERIES, write_bert, write_dense
from tests.test_models import build
from trainer.config import ConfigError
from trainer.encoding.encode import encode
from trainer.encoding.inverted_index import InvertedIndex
from trainer.runs.results import EvalFolder, Ranking, read_score, read_system

LINES = []


# ---------------------------------------------------------------------------------- tasks
def test_the_default_group_is_the_seven_scandinavian_retrieval_tasks_of_mteb():
    tasks = select_tasks(["scandinavian"])
    assert [task.metadata.name for task in tasks] == [
        "NorQuadRetrieval",
        "SNLRetrieval",
        "DanFeverRetrieval",
        "TV2Nordretrieval",
        "TwitterHjerneRetrieval",
        "SweFaqRetrieval",
        "SwednRetrieval",
    ]
    assert {task.metadata.main_score for task in tasks} == {"ndcg_at_10"}
    parts = [name for group in ("norwegian", "danish", "swedish") for name in GROUPS[group]]
    assert parts == list(GROUPS["scandinavian"])


def test_multilingual_tasks_are_restricted_to_scandinavian_languages():
    tasks = select_tasks(["nano", "BelebeleRetrieval"])
    assert len(tasks) == 14
    for task in tasks:
        codes = {code.partition("-")[0] for subset in task.hf_subsets for code in task.metadata.eval_langs[subset]}
        assert codes <= set(LANGUAGES)
        assert codes
    assert tasks[0].hf_subsets == ["no", "sv"]
    assert "dan_Latn-eng_Latn" not in tasks[-1].hf_subsets


@pytest.mark.parametrize(
    "name,line",
    [
        ("NorQuadRetrival", "there is no retrieval task 'NorQuadRetrival'. Did you mean 'NorQuadRetrieval'?"),
        ("norwegan", "there is no retrieval task 'norwegan'. Did you mean 'norwegian'?"),
        ("xyz", "there is no retrieval task 'xyz'. Groups: scandinavian, norwegian, danish, swedish, nano."),
        ("./nothing", "nothing is no folder in BEIR layout: there is no corpus.jsonl"),
        ("./nothing:fi", "the language of a folder is one of no, nb, nn, da, sv, not 'fi'"),
        ("ArguAna", "the task ArguAna has no part in Norwegian, Danish or Swedish"),
    ],
)
def test_an_unknown_task_is_one_line_with_the_nearest_name(name, line):
    with pytest.raises(ConfigError) as caught:
        select_tasks([name])
    assert line in caught.value.format_message()
    assert "\n" not in caught.value.format_message()


def test_a_folder_in_beir_layout_is_an_offline_task_of_its_language(folder):
    (task,) = select_tasks([f"{folder}:da", f"{folder}:da"])
    data = load(task)["default"]["dev"]
    assert task.metadata.eval_langs == ["dan-Latn"]
    assert data["corpus"]["id"] == ["d0", "d1", "d2", "d3"]
    assert data["queries"]["text"] == QUERIES
    assert data["relevant_docs"]["q2"] == {"d2": 1}


def test_graded_judgements_of_a_task_are_graded(folder):
    (folder / "qrels.dev.tsv").write_text("q0\td0\t1\nq0\td1\t3\n")
    task = local_task(folder, None)
    assert load(task)["default"]["dev"]["relevant_docs"] == {"q0": {"d0": 1, "d1": 3}}


def test_changed_data_is_another_revision(folder):
    before = local_task(folder, None).metadata.dataset["revision"]
    assert local_task(folder, None).metadata.dataset["revision"] == before
    (folder / "qrels.dev.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\n")
    assert local_task(folder, None).metadata.dataset["revision"] != before


def test_the_revision_of_a_folder_is_that_of_the_files_that_are_read(folder):
    def revision():
        return local_task(folder, None).metadata.dataset["revision"]

    before = revision()
    (folder / "qrels").mkdir()
    (folder / "qrels.dev.tsv").rename(folder / "qrels/dev.tsv")
    (folder / "queries.dev.jsonl").rename(folder / "queries.jsonl")
    assert revision() == before
    (folder / "queries.test.jsonl").write_text("not read")
    assert revision() == before
    (folder / "queries.jsonl").write_text((folder / "queries.jsonl").read_text() + "\n")
    assert revision() != before


class Loaded:
    """Stands in for a task of mteb whose data is there."""

    metadata = SimpleNamespace(name="loaded")

    def __init__(self, dataset):
        self.dataset = dataset

    def load_data(self):
        pass

    def convert_v1_dataset_format_to_v2(self, num_proc):
        pass


def test_texts_of_mteb_are_searched_in_nfc_and_counted_and_their_ids_stay():
    apart = "pa\u030a ga\u030arden"
    queries = Dataset.from_dict({"id": ["a\u030a"], "text": [apart]})
    corpus = Dataset.from_dict({"id": ["1", "2"], "title": ["", apart], "text": ["Mjøsa", "x"]})
    task = Loaded({"default": {"test": {"queries": queries, "corpus": corpus, "relevant_docs": {}}}})
    for _ in range(2):
        data = load(task)["default"]["test"]
        assert data["queries"][:] == {"id": ["a\u030a"], "text": ["på gården"]}
        assert data["corpus"][:] == {"id": ["1", "2"], "title": ["", "på gården"], "text": ["Mjøsa", "x"]}
        assert list(task.reading.lines()) == ["2 texts were not in Unicode's form NFC, and are now"]


@pytest.mark.parametrize(
    "file,text,line",
    [
        ("queries.dev.jsonl", "", "query 'q0' is not in queries.dev.jsonl"),
        ("qrels.dev.tsv", "query-id\tcorpus-id\tscore\nq0\tnowhere\t1\n", "passage 'nowhere' is not in corpus.jsonl"),
        ("qrels.dev.tsv", "query-id\tcorpus-id\tscore\n", "no relevant passage for any query"),
        ("corpus.jsonl", "", "no passages"),
    ],
)
def test_a_spoilt_folder_fails_alone_with_its_line_and_the_other_tasks_go_on(tmp_path, folder, file, text, line):
    shutil.copytree(folder, tmp_path / "good")
    (folder / file).write_text(text)
    said = []
    tasks = select_tasks([str(folder), str(tmp_path / "good")])
    failed = score_system("bm25", BM25, "bm25", tasks, EvalFolder(tmp_path / "eval"), said.append)
    assert list(failed) == ["four"]
    assert line in failed["four"]
    assert f"four: FAILED ({failed['four']})" in said[0]
    assert "good: nDCG@10 " in said[1]


# ---------------------------------------------------------------------------------- exact search
def random_vectors(rows, columns, density, seed):
    return sp.random(rows, columns, density, "csr", np.float32, np.random.default_rng(seed))


def test_the_inverted_index_finds_what_dense_search_finds():
    passages, queries = random_vectors(300, 500, 0.05, 1), random_vectors(70, 500, 0.02, 2)
    expected = semantic_search(queries.toarray(), passages.toarray(), top_k=20, score_function=lambda a, b: a @ b.T)
    for (numbers, values), hits in zip(InvertedIndex(passages).search(queries, 20), expected, strict=True):
        assert values == pytest.approx([hit["score"] for hit in hits], abs=1e-5)
        clear = [hit["corpus_id"] for hit in hits if hit["score"] > hits[-1]["score"] + 1e-6]
        assert set(clear) <= set(numbers.tolist())


def test_more_results_than_passages_are_all_passages():
    ((numbers, values),) = InvertedIndex(random_vectors(5, 10, 0.5, 3)).search(random_vectors(1, 10, 0.9, 4), 100)
    assert sorted(numbers) == [0, 1, 2, 3, 4]
    assert list(values) == sorted(values, reverse=True)


@pytest.mark.parametrize("architecture", ["inference-free-splade", "csr"])
def test_search_with_a_model_ranks_by_the_models_own_similarity(tmp_path, architecture):
    base = write_dense(tmp_path) if architecture == "csr" else write_bert(tmp_path / "base")
    model = build(tmp_path, base, architecture)
    system = SparseSearch(PassageVectors(model, 32), "model")
    system.index_texts(DOCUMENTS, None)
    similarity = model.similarity(model.encode_query(QUERIES), model.encode_document(DOCUMENTS)).numpy()
    for row, (numbers, values) in zip(similarity, system.search_texts(QUERIES, 4), strict=True):
        assert values == pytest.approx(row[numbers], abs=1e-5)
        assert list(values) == pytest.approx(sorted(row, reverse=True), abs=1e-5)


def test_encoding_in_batches_gives_the_vectors_of_encoding_at_once(tmp_path):
    model = build(tmp_path, write_bert(tmp_path / "base"), "splade")
    whole = model.encode_document(DOCUMENTS * 3, convert_to_sparse_tensor=False).numpy()
    found = encode(model, DOCUMENTS * 3, "document", 4)
    np.testing.assert_allclose(found.toarray(), whole, atol=1e-5)
    assert found.nnz == (whole > 0).sum()


# ---------------------------------------------------------------------------------- scores
def random_ranking(seed, queries=30, passages=60):
    chance = random.Random(seed)
    found = {
        f"q{q}": {f"d{d}": round(chance.random(), 2) for d in chance.sample(range(passages), 40)}
        for q in range(queries)
    }
    relevant = {
        f"q{q}": {f"d{d}": 1 for d in chance.sample(range(passages), chance.randint(1, 4))} for q in range(queries)
    }
    return found, relevant


class Replay:
    """A search system that returns a ranking made beforehand."""

    def __init__(self, found):
        self.found = found
        self.mteb_model_meta = BM25().mteb_model_meta

    def index(self, corpus, **options):
        pass

    def search(self, queries, **options):
        return {query: self.found[query] for query in queries["id"]}


def write_random_task(target, relevant, passages=60):
    target.mkdir()
    lines = {
        "corpus.jsonl": [json.dumps({"_id": f"d{d}", "text": f"d{d}"}) for d in range(passages)],
        "queries.test.jsonl": [json.dumps({"_id": query, "text": query}) for query in relevant],
        "qrels.test.tsv": ["q\td\ts", *(f"{query}\t{d}\t1" for query, judged in relevant.items() for d in judged)],
    }
    for name, rows in lines.items():
        (target / name).write_text("\n".join(rows) + "\n")
    return local_task(target, None)


@pytest.mark.parametrize("seed", range(3))
def test_scores_on_disk_equal_trec_evals_on_random_rankings(tmp_path, seed):
    found, relevant = random_ranking(seed)
    task = write_random_task(tmp_path / "random", relevant)
    folder = EvalFolder(tmp_path / "eval")
    assert score_system("replay", lambda: Replay(found), str(seed), [task], folder, LINES.append) == {}
    score = folder.systems()["replay"]["random"]
    (written,) = json.loads(folder.score_file("replay", "random").read_text())["scores"]["test"]
    measures = {"ndcg_cut.10", "recall.10,100"}
    expected = pytrec_eval.RelevanceEvaluator(relevant, measures).evaluate(found)

    def mean(name):
        return sum(values[name] for values in expected.values()) / len(relevant)

    assert score.main == written["ndcg_at_10"] == pytest.approx(mean("ndcg_cut_10"), abs=1e-5)
    assert written["recall_at_10"] == pytest.approx(mean("recall_10"), abs=1e-5)
    assert written["recall_at_100"] == pytest.approx(mean("recall_100"), abs=1e-5)
    top = best(found)
    reciprocal = [
        next((1 / place for place, d in enumerate(list(top[q])[:10], 1) if d in relevant[q]), 0.0) for q in relevant
    ]
    assert written["mrr_at_10"] == pytest.approx(sum(reciprocal) / len(relevant), abs=1e-5)
    assert score.per_query == pytest.approx(
        {f"test/default/{query}": values["ndcg_cut_10"] for query, values in expected.items()}
    )


def test_ndcg_per_query_equals_a_hand_worked_case():
    ranking = Ranking(
        {"q1": {"x": 3.0, "a": 2.0, "y": 1.0}, "q2": {"b": 3.0, "x": 2.0, "a": 1.0}},
        {"q1": {"a": 1}, "q2": {"a": 1, "b": 1}, "q3": {"a": 1}},
    )
    expected = {"q1": 1 / math.log2(3), "q2": (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3)), "q3": 0.0}
    assert ndcg_per_query(ranking) == pytest.approx(expected)


def test_finished_tasks_are_kept_until_system_data_or_mteb_change(tmp_path, folder, monkeypatch):
    results, runs = EvalFolder(tmp_path / "eval"), []
    original = scores_module._run
    monkeypatch.setattr(scores_module, "_run", lambda *arguments: (runs.append(1), original(*arguments))[1])

    def score(fingerprint):
        score_system("bm25", BM25, fingerprint, select_tasks([str(folder)]), results, LINES.append)
        return len(runs)

    assert [score("one"), score("one"), score("two"), score("two")] == [1, 1, 2, 2]
    (folder / "qrels.dev.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\n")
    assert score("two") == 3
    monkeypatch.setattr(mteb, "__version__", "99.0")
    assert score("two") == 4


def test_two_models_of_one_name_never_share_a_result(tmp_path, folder):
    """mteb would give the second the first one's score: both are called no_model_name."""
    tasks = [str(folder)]
    good = {f"q{n}": {f"d{n}": 1.0} for n in range(4)}
    bad = {f"q{n}": {f"d{(n + 1) % 4}": 1.0} for n in range(4)}
    for name, found, expected in (("a", good, 1.0), ("b", bad, 0.0)):
        results = EvalFolder(tmp_path / name)
        score_system("model", lambda found=found: Replay(found), name, select_tasks(tasks), results, LINES.append)
        assert results.systems()["model"]["four"].main == expected


def test_a_language_said_later_is_another_measurement(tmp_path, folder):
    results = EvalFolder(tmp_path / "eval")
    for name, stems in ((str(folder), "words as they are"), (f"{folder}:no", "norwegian stems")):
        said = []
        score_system("bm25", BM25, "bm25", select_tasks([name]), results, said.append)
        assert stems in said[0]
        assert results.systems()["bm25"]["four"].note in said[0]


def test_scores_of_an_earlier_model_do_not_stay_beside_those_of_the_present(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "other")
    results = EvalFolder(tmp_path / "eval")
    score_system("m", BM25, "old", select_tasks([str(folder), str(tmp_path / "other")]), results, LINES.append)
    assert results.systems()["m"].keys() == {"four", "other"}
    score_system("m", BM25, "new", select_tasks([str(folder)]), results, LINES.append)
    assert results.systems()["m"].keys() == {"four"}
    (folder / "corpus.jsonl").write_text("")
    score_system("m", BM25, "new", select_tasks([str(folder)]), results, LINES.append)
    assert results.systems() == {}


@pytest.mark.parametrize("text", ["{}", "[]"])
def test_a_spoilt_result_is_measured_again(tmp_path, folder, text):
    results = EvalFolder(tmp_path / "eval")
    for _ in range(2):
        assert score_system("bm25", BM25, "bm25", select_tasks([str(folder)]), results, LINES.append) == {}
        assert len(results.systems()["bm25"]["four"].per_query) == 4
        results.query_file("bm25", "four").write_text(text)
    with pytest.raises(ConfigError, match=r"holds no scores per query. Remove it"):
        results.systems()


def test_damaged_rankings_are_one_line(tmp_path, folder):
    results = EvalFolder(tmp_path / "eval")
    score_system("bm25", BM25, "bm25", select_tasks([str(folder)]), results, LINES.append)
    results.ranking_file("bm25", "four").write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match=r"four.json.gz cannot be read: .* Remove it"):
        results.rankings("bm25", "four")


def test_two_folders_of_one_name_are_refused_and_one_given_twice_is_one_task(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "deeper/four")
    assert len(select_tasks([str(folder), f"{folder}/"])) == 1
    with pytest.raises(ConfigError, match=r"two tasks are called 'four'. Rename one of the folders"):
        select_tasks([str(folder), str(tmp_path / "deeper/four")])


def test_titles_of_a_folder_stay_apart_from_their_texts_and_are_searched_with_them(folder):
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row | {"title": "Overskrift"}) + "\n" for row in rows))
    (task,) = select_tasks([str(folder)])
    corpus = load(task)["default"]["dev"]["corpus"]
    assert corpus["title"] == ["Overskrift"] * 4
    assert corpus["text"] == DOCUMENTS
    system = BM25()
    system.index(corpus, task_metadata=task.metadata, hf_split="dev", hf_subset="default", encode_kwargs={})
    ((numbers, _),) = system.search_texts(["overskrift"], 10)
    assert sorted(numbers) == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------- results on disk
def test_results_of_mteb_itself_are_read(tmp_path):
    """As `mteb.evaluate` leaves them below its cache."""
    file = tmp_path / "results/org__model/0123abc/NorQuadRetrieval.json"
    file.parent.mkdir(parents=True)
    row = {
        "ndcg_at_10": 0.2192,
        "mrr_at_10": 0.3,
        "main_score": 0.2192,
        "hf_subset": "default",
        "languages": ["nob-Latn"],
    }
    values = {
        "dataset_revision": "x",
        "task_name": "NorQuadRetrieval",
        "mteb_version": "2.1.0",
        "scores": {"test": [row]},
    }
    file.write_text(json.dumps(values))
    (file.parent / "model_meta.json").write_text("{}")
    for path in (file, tmp_path / "results/org__model"):
        score = read_system(path)["NorQuadRetrieval"]
        assert (score.main, score.languages, score.per_query) == (0.2192, ("nob-Latn",), {})


@pytest.mark.parametrize("text", ["[]", "{}", '{"mteb_version": "1.0.0", "test": {"ndcg_at_10": 0.5}}', "no json"])
def test_results_of_another_format_are_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_score(tmp_path / "x.json")
    message = caught.value.format_message()
    assert message.startswith(str(tmp_path / "x.json"))
    assert "\n" not in message


def test_two_different_results_of_a_task_are_not_silently_merged(tmp_path):
    for name, value in (("a", 0.1), ("b", 0.2)):
        row = {"main_score": value, "languages": ["nob-Latn"]}
        (tmp_path / f"{name}.json").write_text(json.dumps({"task_name": "T", "scores": {"test": [row]}}))
    with pytest.raises(ConfigError, match="holds two different results of T"):
        read_system(tmp_path)


# ---------------------------------------------------------------------------------- what is evaluated
def test_a_run_is_found_by_its_folder_and_by_its_model(trained):
    for path in ("models/tiny", "models/tiny/final"):
        subject = open_subject(None, path)
        assert (subject.name, subject.model) == ("tiny", "models/tiny/final")
        assert subject.manifest["status"] == "finished"
    assert subject.load().model_card_data.model_name == "tiny"


def test_results_beside_a_model_do_not_change_its_fingerprint(trained):
    shutil.copytree("models/tiny/final", "plain")
    before = open_subject(None, "./plain").fingerprint
    for name in ("eval/scores/x.json", "report/page.json"):
        file = trained / "plain" / name
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    assert open_subject(None, "./plain").fingerprint == before


def test_another_model_has_another_fingerprint(tmp_path, trained):
    before = open_subject(None, "models/tiny").fingerprint
    assert open_subject(None, "models/tiny").fingerprint == before
    (trained / "models/tiny/final/router_config.json").write_text("{}")
    assert open_subject(None, "models/tiny").fingerprint != before


@pytest.mark.parametrize(
    "options,line",
    [
        ((None, None), "say what to evaluate"),
        (("splade", "x"), "not both"),
        (("splade", None), "models/splade holds no trained model. Train it first: make train CONFIG=splade"),
        ((None, "./nothing"), "there is no model at ./nothing"),
        ((None, "org/model", "main", True), "--revision must be a full commit"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(tmp_path, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        open_subject(*options)
    assert line in caught.value.format_message()


def test_a_folder_with_blanks_and_commas_in_its_name_is_one_task(tmp_path):
    folder = tmp_path / "our search, new"
    folder.mkdir()
    assert task_names(f"norwegian {folder}:no,SweFaqRetrieval {folder}") == [
        "norwegian", f"{folder}:no", "SweFaqRetrieval", str(folder),
    ]  # fmt: skip


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"is not a sparse encoder but a SentenceTransformer. To compare with it: --dense"
    ):
        open_subject(None, str(write_dense(tmp_path))).load()
    with pytest.raises(ConfigError, match=r"is no saved sparse encoder: there is no config_sentence_transformers.json"):
        open_subject(None, str(write_bert(tmp_path / "plain"))).load()


def test_local_tasks_carry_metadata_that_mteb_accepts(folder):
    assert isinstance(local_task(folder, "no").metadata, TaskMetadata)
