"""The report of a made-up run with three tasks and three systems, also in a headless browser."""

import base64
import json
import math
import os
import re
import select
import shutil
import subprocess
import tempfile
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from evaluate.report import FILTERS, read_curves, training_plots, write_report
from evaluate.report.plots import Axis, bars, histogram, intervals, line_chart, linear, pareto
from evaluate.subject import Subject
from trainer.runs.results import EvalFolder
from trainer.system.files import write_json

HOSTILE = """<script>alert('x')</script> "quoted" & 'single' | bar 🐟 ]]> \x07"""
MODEL = "splade_large"

# ------------------------------------------------------------------------------------------------- a made-up run
LANGUAGE_OF = {"NorQuadRetrieval": "nob-Latn", "TwitterHjerneRetrieval": "dan-Latn", "SwednRetrieval": "swe-Latn"}
SCORES = {
    MODEL: {"NorQuadRetrieval": 0.7312, "TwitterHjerneRetrieval": 0.5904, "SwednRetrieval": 0.6449},
    "bm25": {"NorQuadRetrieval": 0.7021, "TwitterHjerneRetrieval": 0.4127, "SwednRetrieval": 0.6581},
    "intfloat__multilingual-e5-base": {"NorQuadRetrieval": 0.7188, "TwitterHjerneRetrieval": 0.6732},
}
COMMON_MEAN = {MODEL: (0.7312 + 0.5904) / 2, "bm25": (0.7021 + 0.4127) / 2}
COMPARE = {
    "main": MODEL,
    "systems": list(SCORES),
    "tasks": {
        task: {system: scores[task] for system, scores in SCORES.items() if task in scores} for task in LANGUAGE_OF
    },
    "languages": {task: [code] for task, code in LANGUAGE_OF.items()},
    "against": {
        "bm25": {
            "tasks": {
                "NorQuadRetrieval": {"delta": 0.0291, "low": 0.0113, "high": 0.0474, "queries": 1024},
                "TwitterHjerneRetrieval": {"delta": 0.1777, "low": 0.1021, "high": 0.2548, "queries": 78},
                "SwednRetrieval": {"delta": -0.0132, "low": -0.0271, "high": 0.0009, "queries": 1024},
            },
            "mean_delta": 0.0645,
            "wins": 2,
            "losses": 0,
            "ties": 1,
            "missing": [],
        },
        "intfloat__multilingual-e5-base": {
            "tasks": {"NorQuadRetrieval": {"delta": 0.0124}, "TwitterHjerneRetrieval": {"delta": -0.0828}},
            "mean_delta": -0.0352,
            "wins": 1,
            "losses": 1,
            "ties": 0,
            "missing": ["SwednRetrieval (intfloat__multilingual-e5-base)"],
        },
    },
}
PRUNED = [(16, 11.9, 16, 0.4871), (32, 12, 32, 0.5634), (64, 12, 64, 0.6117), (128, 12, 126.4, 0.6494)]


def route(texts, mean, counts):
    """One route's statistics."""
    width = 2 * mean / len(counts)
    return {
        "texts": texts,
        "active_dims": {"mean": mean, "p50": mean * 0.96, "p95": mean * 1.7, "max": round(mean * 2)},
        "never_active_share": 0.312,
        "most_frequent": [
            {"dimension": 31 + 7 * number, "term": term, "share": 0.81 - 0.07 * number}
            for number, term in enumerate(["norge", "##en", "år", "kommune", "sverige", "hvor", "ligger", "i"])
        ],
        "histogram": {"edges": [number * width for number in range(len(counts) + 1)], "counts": counts},
        "index_bytes": 3_412_944,
    }


SPARSITY = {
    "dimensions": 50_000,
    "routes": {
        "query": route(1000, 12.0, [3, 41, 160, 290, 251, 140, 70, 30, 11, 4]),
        "document": route(2000, 214.6, [2, 9, 40, 122, 240, 331, 352, 301, 228, 160, 95, 60, 31, 17, 8, 4]),
    },
    "flops": 1.83,
    "pruned": [
        {
            "max_active_dims": limit,
            "query_active_dims": query,
            "document_active_dims": document,
            "index_bytes": int(document * 2000 * 8),
            "flops": 0.004 * document,
            "ndcg_at_10": ndcg,
        }
        for limit, query, document, ndcg in [*PRUNED, (None, 12, 214.6, COMMON_MEAN[MODEL])]
    ],
}
LATENCY = {
    "passages": 2000,
    "queries": 1000,
    "threads": 2,
    "machine": "x86_64, 2 cores, 7.7 GiB",
    "model": {
        "query_encoding_ms": {"p50": 0.412, "p95": 0.803, "p99": 1.21},
        "documents_per_second": 38.2,
        "search_ms": {"p50": 0.94, "p95": 1.74, "p99": 2.55},
        "index_bytes": 3_412_944,
        "peak_memory_gib": 1.912,
    },
    "bm25": {"index_documents_per_second": 10_412.6, "search_ms": {"p50": 0.61, "p95": 1.02, "p99": 1.48}},
}
LEAKAGE = {
    "training_texts": 81_234,
    "method": "Exact after normalisation; near: at least 0.8 of the 5-grams of words are shared.",
    "tasks": {
        "NorQuadRetrieval": {
            "queries": 1024,
            "passages": 1048,
            "exact_queries": 12,
            "near_queries": 3,
            "exact_passages": 87,
            "near_passages": 41,
            "examples": [
                {
                    "kind": "exact",
                    "side": "passage",
                    "dataset": "scandi_qa",
                    "training": "Galdhøpiggen er Norges høyeste fjell. " * 9,
                    "evaluation": "Galdhøpiggen er Norges høyeste fjell. " * 9,
                    "overlap": 1.0,
                }
            ],
        },
        "SwednRetrieval": dict.fromkeys(("exact_queries", "near_queries", "exact_passages", "near_passages"), 0)
        | {"queries": 1024, "passages": 2048, "examples": []},
    },
    "leaks": 143,
}
HYBRID = [
    {
        "first": MODEL,
        "second": "bm25",
        "tasks": {
            task: {
                "dev_queries": 500,
                "test_queries": 524,
                "test": {MODEL: scores[0], "bm25": scores[1], "rrf": scores[2], "weighted": scores[3]},
                "weight": 0.65,
                "all": {},
            }
            for task, scores in {
                "NorQuadRetrieval": (0.734, 0.701, 0.742, 0.7521),
                "SwednRetrieval": (0.641, 0.655, 0.672, 0.671),
            }.items()
        },
        "mean_test": {MODEL: 0.6875, "bm25": 0.678, "rrf": 0.707, "weighted": 0.7116},
    }
]
TERMS = [
    {
        "text": "hvor høyt er Galdhøpiggen",
        "route": "query",
        "terms": [["galdhøpiggen", 2.91], ["høyt", 1.74], ["hvor", 0.61], ["er", 0.08]],
    },
    {
        "text": "Vänern är Sveriges största sjö och ligger i Västergötland.",
        "route": "document",
        "terms": [
            ["vänern", 2.44],
            ["sjö", 1.97],
            ["innsjø", 1.32],
            ["størst", 0.88],
            [" sveriges", 0.71],
            ["vann", 0.4],
        ],
    },
]
MANIFEST = {
    "name": MODEL,
    "status": "finished",
    "started": "2026-11-22T17:14:41+0000",
    "command": "python -m trainer train splade_large",
    "git_commit": "9261964ee6a63ccb7a5206fc76892d54a97e38d1",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "sentence-transformers": "6.2.0"},
    "device": "cuda:0, NVIDIA H100",
    "seed": 42,
    "base_model": {"source": "ltg/norbert4-base", "commit": "386ba2dc5ae5f95fec86d580c5fc4af34d380126", "code": {}},
    "datasets": {
        "nli": {
            "rows": 100_000,
            "languages": {"nb": 60_000, "da": 40_000},
            "revisions": {"Fremtind/all-nli-norwegian": "81d1b3a3a4cf2a5d9d1b7a7f4b9b6a0a1f0c2d3e"},
            "rows_drawn": 200_000,
        },
        "clicks": {"rows": 540, "languages": {"no": 540}, "revisions": {}},
    },
    "steps": 400,
    "steps_done": 400,
    "train_seconds": 3723.4,
    "samples_per_second": 812.4,
    "peak_memory_gib": 41.7,
    "warnings": [{"sign": "x", "step": 110, "last_step": 190, "message": "dimension 60 ('.') is active in 100%"}],
}


def write_scores(folder, scores, language_of):
    """Score files as mteb writes them."""
    for system, tasks in scores.items():
        for task, value in tasks.items():
            file = EvalFolder(folder).score_file(system, task)
            file.parent.mkdir(parents=True, exist_ok=True)
            row = {"ndcg_at_10": value, "main_score": value, "hf_subset": "default", "languages": [language_of[task]]}
            file.write_text(json.dumps({"task_name": task, "mteb_version": "2.26.24", "scores": {"test": [row]}}))


def write_logs(folder):
    """Event files with the tags of trainer/training/callbacks/throughput.py."""
    with SummaryWriter(str(folder)) as writer:
        for step in range(10, 401, 10):
            writer.add_scalar("loss/total", 0.6 + 2 * math.exp(-step / 60) + 0.05 * math.sin(step), step)
            writer.add_scalar("loss/base_loss", 0.5 + 2 * math.exp(-step / 60), step)
            writer.add_scalar("optimizer/learning_rate_model", 1e-4, step)
            for name, dims in (("query", 12.0), ("document", 214.0)):
                writer.add_scalar(f"sparsity/{name}/active_dims_mean", dims * (1 + math.exp(-step / 80)), step)
                writer.add_scalar(f"sparsity/{name}/active_dims_p95", 1.7 * dims * (1 + math.exp(-step / 80)), step)
            if step % 50 == 0:
                for search, lift in (("search", 0), ("norquad", 0.02), ("swequad", -0.02)):
                    writer.add_scalar(f"eval/{search}_ndcg@10", 0.62 + lift + 0.0002 * step, step)
                writer.add_scalar("eval/norquad_document_active_dims", 260 - 0.1 * step, step)


@pytest.fixture
def full(tmp_path):
    """A run of which everything was measured."""
    folder = tmp_path / MODEL
    write_scores(folder / "eval", SCORES, LANGUAGE_OF)
    write_logs(folder / "logs")
    results = EvalFolder(folder / "eval")
    parts = {"sparsity": SPARSITY, "latency": LATENCY, "leakage": LEAKAGE, "hybrid": HYBRID, "terms": TERMS}
    for part, values in parts.items():
        results.write_part(part, values)
    failure = {"SwednRetrieval": "ConnectionError: the hub cannot be reached"}
    results.write_part("failed", {"intfloat__multilingual-e5-base": failure})
    return Subject(MODEL, str(folder / "final"), None, False, folder, None, MANIFEST)


@pytest.fixture
def bare(tmp_path):
    """A model of the hub of which nothing was measured."""
    return Subject("some-splade", "someone/some-splade", "abc123", False, tmp_path / "someone__some-splade")


@pytest.fixture
def hostile(tmp_path):
    """A run whose names and texts are what a browser or Markdown could take for their own."""
    folder = tmp_path / "hostile"
    results = EvalFolder(folder / "eval")
    row = {"main_score": 0.5, "ndcg_at_10": 0.5, "languages": ["nob-Latn"]}
    for number, task in enumerate((HOSTILE, "x" * 200)):
        write_json(results.score_file("hostile", str(number)), {"task_name": task, "scores": {"test": [row]}})
    sparsity = json.loads(json.dumps(SPARSITY))
    sparsity["routes"]["document"]["most_frequent"] = [{"dimension": 1, "term": HOSTILE, "share": 0.5}]
    example = LEAKAGE["tasks"]["NorQuadRetrieval"]["examples"][0]
    counts = LEAKAGE["tasks"]["NorQuadRetrieval"] | {
        "examples": [example | {"training": HOSTILE, "evaluation": HOSTILE, "dataset": HOSTILE}]
    }
    results.write_part("sparsity", sparsity)
    results.write_part("terms", [{"text": HOSTILE, "route": "document", "terms": [[HOSTILE, 1.5], ["x" * 300, 1.0]]}])
    results.write_part("leakage", LEAKAGE | {"tasks": {HOSTILE: counts}})
    results.write_part("failed", {HOSTILE: {HOSTILE: HOSTILE + "x" * 300}})
    results.write_part(
        "compare",
        {
            "main": "hostile",
            "systems": ["hostile", HOSTILE],
            "tasks": {HOSTILE: {"hostile": 0.5, HOSTILE: 0.25}, "x" * 200: {"hostile": 0.5}},
            "languages": {HOSTILE: ["nob-Latn"]},
            "against": {
                HOSTILE: {
                    "tasks": {HOSTILE: {"delta": 0.25, "low": 0.1, "high": 0.3}},
                    "mean_delta": 0.25,
                    "wins": 1,
                    "losses": 0,
                    "ties": 0,
                    "missing": [HOSTILE],
                }
            },
        },
    )
    manifest = MANIFEST | {"datasets": {HOSTILE: {"rows": 1, "revisions": {HOSTILE: None}}}, "command": HOSTILE}
    return Subject("hostile", str(folder / "final"), None, False, folder, None, manifest)


# ------------------------------------------------------------------------------------------------- the page
def report_with(subject, compare):
    """The page with a comparison that is stored first."""
    subject.results.write_part("compare", compare)
    return write_report(subject)


class Page(HTMLParser):
    """What a browser would make of a page: its tags with attributes, its text, and its tables by caption."""

    def __init__(self, file):
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.tags, self.tables, self.cell = [], {}, None
        self.feed(self.source)
        self.text = " ".join(re.sub(r"<style>.*?</style>", "", self.source, flags=re.S).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th", "caption"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
        elif tag == "caption":
            self.tables[self.cell] = self.rows
        if tag in ("td", "th", "caption"):
            self.cell = None

    def plots(self):
        """The drawings as XML, legends' swatches included. Fails where one is not well-formed."""
        return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.source, flags=re.S)]


def numbers_in(root):
    """Every number among the coordinates and sizes of a drawing."""
    for element in root.iter():
        for name, value in element.attrib.items():
            if name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "points", "viewBox"):
                yield from ((name, float(number)) for number in re.split(r"[ ,]+", value))


def marks(plot, tag, kind):
    """A drawing's elements of one kind, in the order in which they were drawn."""
    return [element for element in ET.fromstring(plot.svg).iter(tag) if kind in element.get("class", "").split()]


def test_the_headline_table_holds_the_scores_of_the_files_and_the_mean_of_tasks_that_all_have(full):
    header, *rows = Page(report_with(full, COMPARE)).tables["nDCG@10"]
    assert header == ["Task", MODEL, "bm25", "intfloat__multilingual-e5-base"]
    assert rows == [
        ["NorQuadRetrieval", "0.731", "0.702", "0.719"],
        ["SwednRetrieval", "0.645", "0.658", "failed"],
        ["TwitterHjerneRetrieval", "0.590", "0.413", "0.673"],
        ["Mean of 2 common", "0.661", "0.557", "0.696"],
    ]


def test_the_best_score_of_a_task_is_bold_and_equal_ones_both(full):
    write_scores(full.results.folder, {MODEL: {"Tie": 0.50004}, "bm25": {"Tie": 0.49996}}, {"Tie": "dan-Latn"})
    source = write_report(full).read_text()
    row = {task: re.search(rf'<tr><th scope="row">{task}</th>(.*)</tr>', source)[1] for task in (*LANGUAGE_OF, "Tie")}
    assert "<strong>0.731</strong>" in row["NorQuadRetrieval"] and row["NorQuadRetrieval"].count("<strong>") == 1
    assert "<strong>0.658</strong>" in row["SwednRetrieval"]
    assert row["Tie"].count("<strong>0.500</strong>") == 2
    assert "<td>–</td>" in row["Tie"]  # the third system has not run it


def test_tables_hold_the_numbers_of_their_parts(full):
    tables = Page(report_with(full, COMPARE)).tables
    assert tables[f"{MODEL} minus the other, nDCG@10"][1:] == [
        ["NorQuadRetrieval", "+0.029+0.011 to +0.047", "+0.012"],
        ["SwednRetrieval", "−0.013−0.027 to +0.001", "–"],
        ["TwitterHjerneRetrieval", "+0.178+0.102 to +0.255", "−0.083"],
        ["Mean", "+0.065", "−0.035"],
        ["Wins, losses, not told apart", "2, 0, 1", "1, 1, 0"],
    ]
    assert tables["Active dims, of 50,000"][2] == ["Documents", "2,000", "215", "206", "365", "429", "31.2%", "3.3 MiB"]
    assert tables["Pruned to max_active_dims"][4] == ["128", "12.0", "126", "1.9 MiB", "0.506", "0.649"]
    assert tables["Most frequent dims of queries"][2] == ["38", "##en", "74.0%"]
    latency = tables["1,000 queries, 2,000 passages, 2 threads; times in milliseconds"]
    assert latency[1] == ["Query encoding, p50", "0.412", "–"]
    assert latency[4] == ["Search, p50", "0.940", "0.610"]
    assert latency[7] == ["Documents per second: encoded, and indexed by bm25", "38.2", "10,413"]
    assert tables[f"{MODEL} with bm25, nDCG@10 on test queries"][1] == [
        *("NorQuadRetrieval", "0.734", "0.701", "0.742", "0.752", "0.65", "500, 524")
    ]
    assert tables["Queries and passages that are in the training data"][1] == [
        *("NorQuadRetrieval", "1,024", "12", "3", "1,048", "87", "41")
    ]
    assert tables["Training data"][1][:3] == ["nli", "100,000", "200,000"]


def test_the_manifest_says_how_the_model_came_about(full):
    text = Page(write_report(full)).text
    for value in ("ltg/norbert4-base", MANIFEST["base_model"]["commit"], MANIFEST["git_commit"], "NVIDIA H100"):
        assert value in text
    assert "torch 2.13.0" in text
    assert MANIFEST["datasets"]["nli"]["revisions"]["Fremtind/all-nli-norwegian"] in text


def test_terms_that_the_text_does_not_have_are_marked_as_added(full):
    source = write_report(full).read_text()
    chips = re.findall(r'<li( class="added")? style="--weight: ([\d.]+)%">(?:\+ )?(\S+) <small>', source)
    assert {term for added, _, term in chips if added} == {"innsjø", "størst", "vann"}
    assert {term for added, _, term in chips if not added} >= {"galdhøpiggen", "sveriges"}
    assert dict((term, weight) for _, weight, term in chips)["innsjø"] == f"{100 * 1.32 / 2.44:.1f}"


def test_a_part_that_was_not_measured_is_one_line_with_its_command(bare, full):
    text = Page(write_report(bare)).text
    for command in ("run", "compare", "sparsity", "latency", "hybrid"):
        assert f"<code>python -m evaluate {command} --model someone/some-splade --revision abc123</code>" in text
    assert "its training texts are not known" in text
    assert "There are no TensorBoard logs" in text
    assert "<table" not in text and "<svg" not in text
    assert "python -m evaluate" not in Page(report_with(full, COMPARE)).text


def test_a_kept_comparison_is_shown_only_while_it_fits_the_scores(full):
    full.results.write_part("compare", COMPARE)
    assert f"{MODEL} minus the other, nDCG@10" in Page(write_report(full)).tables
    write_scores(full.results.folder, {MODEL: {"NorQuadRetrieval": 0.9}}, LANGUAGE_OF)
    page = Page(write_report(full))
    assert f"{MODEL} minus the other, nDCG@10" not in page.tables
    assert "The systems have not been compared" in page.text
    assert page.tables["nDCG@10"][1][1] == "0.900"
    write_scores(full.results.folder, {MODEL: {"NorQuadRetrieval": 0.7312}}, LANGUAGE_OF)
    assert f"{MODEL} minus the other, nDCG@10" in Page(write_report(full)).tables
    full.results.score_file(MODEL, "SwednRetrieval").unlink()
    assert f"{MODEL} minus the other, nDCG@10" not in Page(write_report(full)).tables


def test_a_difference_says_how_many_queries_it_leaves_out(full):
    compare = json.loads(json.dumps(COMPARE))
    compare["against"]["bm25"]["tasks"]["SwednRetrieval"]["left_out"] = 1_234
    page = Page(report_with(full, compare))
    assert page.text.count("1,234 left out") == 1
    assert (full.report / "summary.md").read_text().count("1,234 left out") == 1


def test_scores_of_other_languages_stand_in_no_row(full):
    compare = json.loads(json.dumps(COMPARE))
    del compare["against"]["bm25"]["tasks"]["SwednRetrieval"]
    compare["against"]["bm25"]["missing"] = [f"SwednRetrieval ({MODEL} in swe; bm25 in dan, swe)"]
    page = Page(report_with(full, compare))
    assert page.tables["nDCG@10"][2] == ["SwednRetrieval", "0.645", "–", "failed"]
    assert f"Not compared with bm25: SwednRetrieval ({MODEL} in swe; bm25 in dan, swe)." in page.text


def test_tasks_that_only_a_baseline_from_elsewhere_has_make_no_rows(full):
    compare = json.loads(json.dumps(COMPARE))
    elsewhere = compare["against"]["e5"] = json.loads(json.dumps(COMPARE["against"]["bm25"]))
    elsewhere["missing"] = [f"Task{number} ({MODEL})" for number in range(90)]
    compare["tasks"] |= {f"Task{number}": {"e5": 0.5} for number in range(90)}
    for task in elsewhere["tasks"]:
        compare["tasks"][task]["e5"] = 0.5
    page = Page(report_with(full, compare))
    header, *rows = page.tables["nDCG@10"]
    assert header[2:4] == ["bm25", "e5"] and [row[0] for row in rows] == [*sorted(LANGUAGE_OF), "Mean of 2 common"]
    assert "Task7 (splade_large) and 82 more." in page.text and "Task8" not in page.text


def test_a_task_without_data_has_failed_for_all(full):
    full.results.write_part("failed", {"data": {"Gone": "the hub cannot be reached"}})
    page = Page(write_report(full))
    assert page.tables["nDCG@10"][0][1:] == list(SCORES)
    assert page.tables["nDCG@10"][1] == ["Gone", "failed", "failed", "failed"]
    assert "the hub cannot be reached" in page.text


def test_names_and_texts_stay_text(hostile):
    page = Page(write_report(hostile))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "img", "object"})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    header, *rows = page.tables["nDCG@10"]
    assert header == ["Task", "hostile", HOSTILE]
    assert rows[0] == [HOSTILE, "0.500", "0.250"]
    assert page.tables["Most frequent dims of documents"][1] == ["1", HOSTILE, "50.0%"]
    assert any(text.startswith("<script>") for plot in page.plots() for text in plot.itertext())


def test_the_page_loads_nothing(full, hostile):
    for page in (Page(report_with(full, COMPARE)), Page(write_report(hostile))):
        loads = [a[name] for _, a in page.tags for name in ("src", "href", "srcset", "data", "action") if name in a]
        assert loads and all(value.startswith(("#", "data:")) for value in loads)
        assert not re.search(r"https?://|@import|url\(", page.source)
        assert ("script" not in {tag for tag, _ in page.tags}) and (
            "link",
            {"rel": "icon", "href": "data:,"},
        ) in page.tags


def test_table_headers_have_a_scope_and_drawings_a_title(full):
    page = Page(report_with(full, COMPARE))
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    plots = [plot for plot in page.plots() if "plot" in plot.get("class")]
    assert len(plots) == 2 + 1 + 3 + 2 + 4  # differences, Pareto, languages, histograms, training
    assert all(plot.get("role") == "img" and plot.findtext("title") and plot.findtext("desc") for plot in plots)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_a_contrast_of_at_least_four_and_a_half(full, scheme):
    blocks = re.findall(r":root \{(.*?)\}", write_report(full).read_text(), flags=re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[scheme == "dark"]))

    def luminance(colour):
        """WCAG's relative luminance of #rrggbb."""
        channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(first, second):
        low, high = sorted(luminance(colours[name]) for name in (first, second))
        return (high + 0.05) / (low + 0.05)

    assert min(contrast(name, "page") for name in ("text", "muted", "accent", "neutral", "bad")) >= 4.5
    assert min(contrast(name, "bad-panel") for name in ("text", "bad")) >= 4.5
    assert contrast("rule", "page") < 4.5  # the opposite: a line need not be read


# ------------------------------------------------------------------------------------------------- the summary
def markdown_tables(text):
    """Tables of a Markdown text as rows of cells."""
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.M):
        yield [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]


@pytest.mark.parametrize("which", ["full", "hostile"])
def test_every_table_of_the_summary_is_valid_markdown(which, request):
    subject = request.getfixturevalue(which)
    text = write_report(subject).with_name("summary.md").read_text()
    tables = list(markdown_tables(text))
    assert sum(map(len, tables)) == sum(line.startswith("|") for line in text.splitlines())
    assert len(tables) >= 4
    for header, rule, *rows in tables:
        assert all(re.fullmatch("-+:?", cell) for cell in rule)
        assert rows and {len(row) for row in rows} == {len(header)} == {len(rule)}
    assert "<script" not in text


def test_the_summary_has_the_numbers_of_the_page(full):
    text = report_with(full, COMPARE).with_name("summary.md").read_text()
    scores, differences, *_ = markdown_tables(text)
    assert scores[2:] == [
        ["NorQuadRetrieval", "**0.731**", "0.702", "0.719"],
        ["SwednRetrieval", "0.645", "**0.658**", "failed"],
        ["TwitterHjerneRetrieval", "0.590", "0.413", "**0.673**"],
        ["mean of 2 common", "0.661", "0.557", "**0.696**"],
    ]
    assert differences[2] == ["NorQuadRetrieval", "+0.029 (+0.011 to +0.047)", "+0.012"]
    assert "**FAILED**: intfloat__multilingual-e5-base on SwednRetrieval: ConnectionError" in text


def test_the_summary_of_nothing_names_the_commands(bare):
    text = write_report(bare).with_name("summary.md").read_text()
    assert "No task has been scored. `python -m evaluate run --model someone/some-splade --revision abc123`" in text
    assert "`python -m evaluate latency" in text and "leakage" not in text  # what a stranger trained on is not known


# ------------------------------------------------------------------------------------------------- plots
def test_drawings_are_well_formed_and_finite(full, hostile):
    for subject in (full, hostile):
        plots = Page(write_report(subject)).plots()
        assert plots
        assert all(math.isfinite(number) for plot in plots for _, number in numbers_in(plot))


NAN, INF = math.nan, math.inf
EDGES = {
    "one point": line_chart("t", {"a": [(7, 0.5)]}),
    "zeros": line_chart("t", {"a": [(0, 0.0), (1, 0.0)]}),
    "one step twice": line_chart("t", {"a": [(3, 1.0), (3, 2.0)]}),
    "negative": line_chart("t", {"a": [(0, -2e-9), (1, -1e-9)]}),
    "large": line_chart("t", {"a": [(0, 1e12), (10**9, 3e12)]}),
    "one model": pareto("t", [(200.0, 0.5, "full")], {}),
    "zero dims and zero quality": pareto("t", [(0.0, 0.0, "1"), (64, 0.0, "64")], {"bm25": 0.0, "x": NAN}),
    "dims below one": pareto("t", [(0.01, 0.1, "1"), (3e6, 0.2, "full")], {"bm25": 0.2}),
    "empty bin": histogram("t", [0, 1], [0]),
    "one value": histogram("t", [5, 5], [12]),
    "zero bar": bars("t", {"a": 0.0, "c": 1.0}, "a"),
    "no difference": intervals("t", [("a", 0.0, 0.0, 0.0), ("b", 0.0, None, None)]),
}


@pytest.mark.parametrize("plot", EDGES.values(), ids=EDGES)
def test_a_drawing_of_little_or_odd_data_is_finite(plot):
    numbers = list(numbers_in(ET.fromstring(plot.svg)))
    assert numbers and all(math.isfinite(number) for _, number in numbers)
    assert all(number >= 0 for name, number in numbers if name in ("width", "height", "r"))
    _, _, width, height = (number for name, number in numbers if name == "viewBox")
    assert all(-1 <= number <= width + 1 for name, number in numbers if name in ("x", "x1", "x2", "cx"))
    assert all(-1 <= number <= height + 1 for name, number in numbers if name in ("y", "y1", "y2", "cy"))


def test_nothing_finite_gives_no_drawing():
    assert pareto("t", [(0.0, 0.4, "full")], {"bm25": 0.3}).svg == ""


def test_equal_ratios_of_active_dims_are_equal_distances():
    small, middle, large = [
        float(dot.get("cx"))
        for dot in reversed(
            marks(
                pareto("t", [(10, 0.1, "10"), (1000, 0.3, "1000"), (100, 0.2, "100")], {"bm25": 0.2}), "circle", "dot"
            )
        )
    ]
    assert middle - small == pytest.approx(large - middle, abs=0.11) and middle > small


def test_a_baseline_is_drawn_at_the_height_of_an_equal_point():
    plot = pareto("t", [(10, 0.1, "10"), (100, 0.25, "100")], {"bm25": 0.25})
    dot, line = marks(plot, "circle", "dot")[0], marks(plot, "line", "baseline")[0]
    assert dot.get("cy") == line.get("y1") == line.get("y2")


def test_labels_of_baselines_that_are_close_do_not_overlap():
    plot = pareto("t", [(10, 0.1, "10")], {"a": 0.500, "b": 0.501, "c": 0.502})
    heights = [float(text.get("y")) for text in marks(plot, "text", "label") if text.get("text-anchor") is None]
    assert len(heights) == 3 and min(low - high for high, low in pairwise(heights)) > 19


def test_bars_are_as_long_as_their_values_and_the_main_one_has_the_accent():
    plot = bars("t", {"ours": 0.8, "other": 0.4}, "ours")
    ours, other = marks(plot, "rect", "bar")
    assert float(ours.get("width")) == pytest.approx(2 * float(other.get("width")), abs=0.11)
    assert "main" in ours.get("class") and "main" not in other.get("class")


def test_bars_of_a_histogram_are_as_high_as_their_counts():
    heights = [float(bar.get("height")) for bar in marks(histogram("t", [0, 10, 20, 30], [1, 4, 0]), "rect", "bar")]
    assert heights == [pytest.approx(heights[1] / 4, abs=0.11), heights[1], 0]


def test_an_interval_lies_around_its_difference_and_zero_between_opposites():
    plot = intervals("t", [("a", 0.1, 0.05, 0.15), ("b", -0.1, None, None)])
    first, second = (float(dot.get("cx")) for dot in marks(plot, "circle", "dot"))
    (line,) = marks(plot, "line", "interval")
    (zero,) = marks(plot, "line", "zero")
    assert float(line.get("x1")) < first < float(line.get("x2"))
    assert float(zero.get("x1")) == pytest.approx((first + second) / 2, abs=0.11)


@pytest.mark.parametrize(
    "axis,labels",
    [
        (Axis(0, 1, 0, 100), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (Axis(-0.06, 0.13, 0, 100), ["−0.05", "0.00", "0.05", "0.10"]),
        (Axis(0, 21_000, 0, 100), ["0", "5k", "10k", "15k", "20k"]),
        (Axis(0.43, 0.47, 0, 100), ["0.43", "0.44", "0.45", "0.46", "0.47"]),
        (Axis(15, 300, 0, 100, logarithmic=True), ["20", "50", "100", "200"]),
        (Axis(5, 200_000, 0, 100, logarithmic=True), ["10", "100", "1k", "10k", "100k"]),
        (Axis(310, 390, 0, 100, logarithmic=True), ["320", "340", "360", "380"]),
    ],
)
def test_ticks_are_round_numbers(axis, labels):
    assert list(axis.ticks().values()) == labels


def test_an_axis_of_positive_values_does_not_go_below_zero():
    assert linear([0.01, 1.0], 0, 1).low == 0
    assert linear([-0.01, 1.0], 0, 1).low < -0.01


def test_an_axis_of_nearly_equal_scores_spans_more_than_their_noise():
    axis = linear([0.6212, 0.6218], 0, 1, least=0.05)
    assert axis.high - axis.low == pytest.approx(0.05)
    assert linear([0.2, 0.8], 0, 1, least=0.05) == linear([0.2, 0.8], 0, 1)


def test_pruned_model_and_baselines_share_a_plot_only_when_measured_on_the_same_passages(full):
    def drawn():
        plots = [plot for plot in Page(write_report(full)).plots() if "wide" in plot.get("class")]
        return [
            (len(list(plot.iter("circle"))), sum(line.get("class") == "baseline" for line in plot.iter("line")))
            for plot in plots
        ]

    assert drawn() == [(5, 2)]
    sparsity = json.loads(json.dumps(SPARSITY))
    for row in sparsity["pruned"]:
        row["ndcg_at_10"] += 0.1
    full.results.write_part("sparsity", sparsity)
    assert drawn() == [(1, 2), (5, 0)]


def test_a_language_is_the_mean_over_tasks_that_its_systems_share(tmp_path):
    scores = {
        "a": {"One": 0.5, "Two": 0.7, "Three": 0.9, "Both": 0.3},
        "b": {"One": 0.4, "Two": 0.2, "Both": 0.1},
        "c": {"Three": 0.8},
    }
    folder = tmp_path / "a"
    write_scores(folder / "eval", scores, {"One": "nob-Latn", "Two": "nob-Latn", "Three": "dan-Latn", "Both": "x-Latn"})
    page = Page(write_report(Subject("a", "a", None, False, folder)))
    found = {plot.findtext("title"): plot.findtext("desc") for plot in page.plots()}
    assert found == {
        "Danish, 1 task": "nDCG@10: a 0.900, c 0.800",
        "Norwegian Bokmål, 2 tasks": "nDCG@10: a 0.600, b 0.300",
        "Other, 1 task": "nDCG@10: a 0.300, b 0.100",
    }
    assert page.tables["nDCG@10"][-1] == ["Mean of 0 common", "–", "–", "–"]


def test_curves_are_what_was_logged(full):
    curves = read_curves(full.folder / "logs")
    assert [step for step, _ in curves["loss/total"]] == list(range(10, 401, 10))
    assert dict(curves["eval/search_ndcg@10"])[400] == pytest.approx(0.7)
    assert [plot.title for plot in training_plots(curves)] == [
        *("Training loss", "Evaluation nDCG@10", "Active dims per query", "Active dims per document")
    ]
    assert training_plots(curves)[1].legend == ("eval/search_ndcg@10", "eval/norquad_ndcg@10", "eval/swequad_ndcg@10")
    assert read_curves(full.folder / "nowhere") == {}


def test_steps_that_a_resumed_run_repeats_are_drawn_once(tmp_path, monkeypatch):
    # files of one process and second are read in the order of the numbers in their names: 10 would be read before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for purge, values in ((None, {1: 9.0, 2: 8.0, 3: 7.0}), (3, {3: 6.0, 4: 5.0})):
        with SummaryWriter(str(tmp_path), purge_step=purge, filename_suffix=f".{purge}") as writer:
            for step, value in values.items():
                writer.add_scalar("loss/total", value, step)
    assert list(read_curves(tmp_path)["loss/total"]) == [(1, 9.0), (2, 8.0), (3, 6.0), (4, 5.0)]


def test_of_a_loss_that_went_astray_what_is_finite_is_drawn(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in enumerate((2.0, NAN, INF, 1.0)):
            writer.add_scalar("loss/total", value, step)
        writer.add_scalar("loss/base_loss", NAN, 0)
    assert read_curves(tmp_path) == {"loss/total": [(0, 2.0), (3, 1.0)]}


def test_the_mean_over_one_search_is_not_drawn_twice():
    points = [(1, 0.5), (2, 0.6)]
    (plot,) = training_plots({"eval/norquad_ndcg@10": points, "eval/search_ndcg@10": list(points)})
    assert plot.legend == ("eval/search_ndcg@10",)


@pytest.mark.parametrize(
    "kind,value,text",
    [
        ("score", 0.94449, "0.944"),
        ("score", None, "–"),
        ("score", NAN, "–"),
        ("signed", -0.0123, "−0.012"),
        ("signed", 0.0301, "+0.030"),
        ("signed", -0.0001, "0.000"),
        ("dims", 59.82, "59.8"),
        ("dims", 1297.4, "1,297"),
        ("share", 0.8925, "89.2%"),
        ("size", 999, "999 bytes"),
        ("size", 1024**2, "1.0 MiB"),
        ("size", 3 * 1024**3, "3.0 GiB"),
        ("size", 0, "0 bytes"),
        ("number", 0.4126, "0.413"),
        ("number", 5.002, "5.00"),
        ("number", 812.4, "812"),
        ("duration", 0.412, "0.4 s"),
        ("duration", 0.0, "0 min 0 s"),
        ("duration", 34.39, "0 min 34 s"),
        ("duration", 3723.4, "1 h 2 min"),
        ("number", 10_412.6, "10,413"),
    ],
)
def test_numbers_are_written_with_sensible_precision(kind, value, text):
    assert FILTERS[kind](value) == text


# ------------------------------------------------------------------------------------------------- in a browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium or google-chrome to render the page")


class Browser:
    """Headless Chromium, spoken to over DevTools' pipe: it reads commands from descriptor 3 and answers on 4."""

    def __init__(self, profile):
        commands, self.to = os.pipe()
        self.answers, replies = os.pipe()
        self.process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(commands, 3), os.dup2(replies, 4)),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(replies)
        self.buffer, self.number, self.events, self.session = b"", 0, [], None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        """A command's result; events that arrive meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self):
        """The next message."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], 60)
            chunk = os.read(self.answers, 1 << 16) if ready else b""
            assert chunk, "the browser has ended, or says nothing"
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, page, width, scheme="light"):
        """Load a page in a window of this width; `events` is what it caused."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events = []
        self("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def value(self, expression):
        """What JavaScript says in the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def seen(self, *methods):
        return [event["params"] for event in self.events if event.get("method") in methods]

    def close(self):
        os.close(self.to)
        os.close(self.answers)
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser():
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        yield browser
        browser.close()


OVERFLOW = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
COMPLAINTS = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


@needs_browser
@pytest.mark.parametrize("which", ["full", "bare", "hostile"])
def test_the_page_renders_without_overflow_errors_or_requests(which, request, browser):
    subject = request.getfixturevalue(which)
    page = report_with(subject, COMPARE) if which == "full" else write_report(subject)
    for width in (1280, 390):
        browser.open(page, width)
        assert browser.value("innerWidth") == width
        assert browser.value(OVERFLOW) is False
        assert browser.value("document.querySelectorAll('h2').length") == 11
        assert browser.seen(*COMPLAINTS) == []
        assert [sent["request"]["url"] for sent in browser.seen("Network.requestWillBeSent")] == [page.as_uri()]
        png = base64.b64decode(browser("Page.captureScreenshot")["data"])
        assert png.startswith(b"\x89PNG") and len(png) > 10_000  # an empty page has 3,000 bytes


@needs_browser
def test_the_browser_would_see_overflow_errors_and_requests(full, browser):
    browser.open(write_report(full), 390)
    browser.value("document.body.style.minWidth = '391px'")
    assert browser.value(OVERFLOW) is True
    browser.value(
        "console.error('x'); document.body.append(Object.assign(new Image(), {src: 'https://example.org/x'}))"
    )
    browser.value("new Promise(done => setTimeout(done, 100))")
    kinds = {event["method"] for event in browser.events}
    assert {"Runtime.consoleAPICalled", "Log.entryAdded"} <= kinds  # the page's policy refuses the request, and says so


@needs_browser
def test_wide_tables_scroll_in_their_own_box_on_a_phone(full, browser):
    browser.open(report_with(full, COMPARE), 390)
    wider = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length"
    assert browser.value(wider) > 3
    assert browser.value("[...document.querySelectorAll('svg.plot')].every(svg => svg.clientWidth <= innerWidth)")


@needs_browser
def test_type_in_drawings_is_readable_on_a_phone(full, browser):
    browser.open(report_with(full, COMPARE), 390)
    smallest = (
        "Math.min(...[...document.querySelectorAll('svg.plot text')].map(text => text.getBoundingClientRect().height))"
    )
    assert browser.value(smallest) >= 10


@needs_browser
def test_the_page_is_dark_where_the_reader_prefers_it(full, browser):
    page = write_report(full)
    colours = []
    for scheme in ("light", "dark"):
        browser.open(page, 1280, scheme)
        colours.append(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]
