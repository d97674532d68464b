"""The model card says what the run folder holds, in words and in metadata that the hub's own classes read back."""

import hashlib
import json
import re
import runpy
import shutil

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from tests.conftest import ROOT
from trainer.config import ConfigError
from trainer.encoding.windows import read_in_windows
from trainer.publish.card import build_model_card
from trainer.runs.run import Run, hash_of_model


def card_of(name="tiny", repo="org/model"):
    return build_model_card(Run.finished(name), repo, 800)


def write_scores(run, system, task, rows, note=""):
    """As mteb writes them, with the twin that says which model they are of."""
    scores = run / "eval/scores" / system / f"{task}.json"
    twin = run / "eval/per_query" / system / f"{task}.json"
    for file in (scores, twin):
        file.parent.mkdir(parents=True, exist_ok=True)
    found = [{"hf_subset": subset, "ndcg_at_10": value, "languages": ["nob-Latn"]} for subset, value in rows.items()]
    scores.write_text(json.dumps({"task_name": task, "mteb_version": "2.26.24", "scores": {"test": found}}))
    made_with = {"system": hash_of_model(run / "final")}
    twin.write_text(json.dumps({"made_with": made_with, "note": note, "ndcg_at_10": {}}))


@pytest.fixture
def evaluated(trained):
    run = trained / "models/tiny"
    write_scores(run, "tiny", "NorQuadRetrieval", {"default": 0.25})
    write_scores(run, "tiny", "SweFaqRetrieval", {"a": 0.5, "b": 0.75})
    write_scores(run, "bm25", "NorQuadRetrieval", {"default": 0.125}, note="words as they are")
    write_scores(run, "bm25", "SweFaqRetrieval", {"a": 0.25, "b": 0.5})
    write_scores(run, "intfloat__e5", "NorQuadRetrieval", {"default": 0.3125})
    parts = {
        "leakage": {
            "training_texts": 1200,
            "method": "Texts are compared exactly.",
            "tasks": {"NorQuadRetrieval": {"queries": 9, "passages": 8, "exact_queries": 1, "near_queries": 2,
                                           "exact_passages": 3, "near_passages": 4}},
        },
        "sparsity": {"routes": {side: {"texts": 7, "active_dims": {"mean": mean, "p95": 2 * mean}}
                                for side, mean in (("query", 11), ("document", 60))}},
        "compare": {
            "main": "tiny",
            "tasks": {
                "NorQuadRetrieval": {"tiny": 0.25, "bm25": 0.125, "intfloat__e5": 0.3125, "published": 0.2},
                "SweFaqRetrieval": {"tiny": 0.625, "bm25": 0.375},
            },
            "against": {
                "bm25": {"tasks": {"NorQuadRetrieval": {"delta": 0.125, "low": 0.1, "high": 0.15},
                                   "SweFaqRetrieval": {"delta": 0.25}}},
                "intfloat__e5": {"tasks": {"NorQuadRetrieval": {"delta": -0.0625}}},
                "published": {"tasks": {"NorQuadRetrieval": {"delta": 0.05}}},
            },
        },
    }  # fmt: skip
    for name, values in parts.items():
        (run / "eval" / f"{name}.json").write_text(json.dumps(values))
    return run


def test_the_table_holds_every_system_the_baselines_and_the_means_of_those_with_every_task(evaluated):
    lines = card_of().text.splitlines()
    assert "| task | this model | bm25 | intfloat__e5 | published |" in lines
    assert "| NorQuadRetrieval | 0.2500 | 0.1250 | 0.3125 | 0.2000 |" in lines
    assert "| SweFaqRetrieval | 0.6250 | 0.3750 | – | – |" in lines
    assert "| mean | 0.4375 | 0.2500 | – | – |" in lines
    assert "bm25: words as they are (NorQuadRetrieval)." in lines
    assert "Against bm25, with 95 % bootstrap intervals: NorQuadRetrieval +0.125 [+0.100, +0.150]." in lines


def test_the_card_says_which_prompts_stand_in_front(trained):
    assert "prompts" not in card_of().text
    Run.finished("tiny").update(prompts={"query": "Instruct: a|b\nQuery: ", "document": "passage: "})
    prompts = r'query "Instruct: a&#124;b\nQuery: ", document "passage: "'
    assert f"| prompts | {prompts} |" in card_of().text
    assert f"They put the model's prompts in front of a text: {prompts}." in card_of().text


def test_the_results_in_the_metadata_are_read_back_by_the_hubs_own_classes(evaluated, tmp_path):
    card_of().save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False).data
    found = {(r.dataset_name, r.dataset_config, r.dataset_split): r.metric_value for r in data.eval_results}
    assert found == {
        ("NorQuadRetrieval", "default", "test"): 0.25,
        ("SweFaqRetrieval", "a", "test"): 0.5,
        ("SweFaqRetrieval", "b", "test"): 0.75,
    }
    assert {r.metric_type for r in data.eval_results} == {"ndcg_at_10"}
    assert model_index_to_eval_results(data.to_dict()["model-index"])[0] == "model"
    assert data.language == ["no", "da", "sv"]  # not `false`, as YAML 1.1 reads `no`
    assert (data.license, data.library_name) == ("apache-2.0", "sentence-transformers")
    assert "sparse-encoder" in data.tags
    assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()


def test_overlap_and_active_dims_are_those_that_were_measured(evaluated):
    text = card_of().text
    assert "| NorQuadRetrieval | 9 | 1 | 2 | 8 | 3 | 4 |" in text
    assert "Part of NorQuadRetrieval was trained on, so its scores there are too good." in text
    assert "| active dims per document | 60 (p95 120) in 7 texts of the evaluation |" in text


def test_scores_of_a_model_that_was_trained_on_since_are_left_out(evaluated):
    with (evaluated / "final/modules.json").open("a") as file:
        file.write("\n")
    card = card_of()
    assert "are those of another model, so they are left out. `make eval CONFIG=tiny` measures it." in card.text
    assert "0.2500" not in card.text
    assert card.data.eval_results is None


def test_a_comparison_with_earlier_scores_is_left_out(evaluated):
    write_scores(evaluated, "tiny", "NorQuadRetrieval", {"default": 0.375})
    text = card_of().text
    assert "published" not in text
    assert "bootstrap" not in text


def test_a_score_file_that_holds_no_scores_is_named(evaluated):
    file = evaluated / "eval/scores/bm25/NorQuadRetrieval.json"
    file.write_text("{}")
    with pytest.raises(
        ConfigError, match=r"bm25/NorQuadRetrieval\.json is not a result of mteb 2 .*: KeyError 'scores'"
    ):
        card_of()


def test_what_was_not_measured_is_said_to_be_missing(trained):
    card = card_of()
    assert "Not measured yet. `make eval CONFIG=tiny` measures it." in card.text
    assert "## Overlap with evaluation data\n\nNot measured." in card.text
    assert "How well it searches has not been measured on any benchmark." in card.text
    assert card.data.eval_results is None
    assert "model-index" not in str(card)


def test_a_card_says_how_the_model_came_about(trained):
    manifest = json.loads((trained / "models/tiny/run.json").read_text())
    nli = manifest["datasets"]["quickstart_nli"]
    text = card_of().text
    assert f"Trained at commit `{manifest['git_commit']}` of nordsparse" in text
    locked = [ROOT / "docker/requirements" / name for name in ("base.txt", "torch-cpu.txt", "torch-cuda.txt")]
    cpu, cuda = (hashlib.sha256(locked[0].read_bytes() + file.read_bytes()).hexdigest() for file in locked[1:])
    assert f"one after the other, is `{cpu}`" in text or f"one after the other, is `{cuda}`" in text
    assert (
        "| quickstart_nli | embedded in nordsparse | Apache-2.0 | 162 (nb 41, da 41, nn 40, sv 40) "
        f"| {nli['rows_seen']} ({nli['rows_drawn']} drawn) |" in text
    )
    for line in ("| steps | 6, 48 rows |", "| seed | 42 |", "| learning rate | 0.001, query weights 0.01; linear, "):
        assert line in text
    assert f"| peak memory | {manifest['peak_memory_gib']:.1f} GiB |" in text
    assert "none: built from scratch" in text
    assert "The checkpoint was chosen by its nDCG@10 on 31 queries of quickstart (half of dev)." in text
    assert card_of().data.base_model is None


def test_sources_of_the_hub_are_named_with_commit_and_licence_and_local_ones_without_their_place(trained):
    run = Run.finished("tiny")
    manifest = run.manifest
    manifest["base_model"] = {
        "source": "ltg/norbert4-base",
        "commit": "386ba2dc",
        "code": {"modeling_gptbert.py": ["soft cap"]},
    }
    manifest["datasets"]["quickstart_nli"] |= {"name": "scandi_qa", "revisions": {"ltg/norquad": "a" * 40}}
    manifest["datasets"]["quickstart_ddsc"] |= {"name": "mine", "revisions": {"/home/kari/secret/rows.jsonl": None}}
    manifest["git_commit"] += "+changes"
    card = build_model_card(run, "org/model", 800, ["datasets.mine.source"])
    assert "| scandi_qa | `ltg/norquad` at `aaaaaaaaaaaa` | CC0-1.0 |" in card.text
    assert "| mine | local files | not known here: see its page |" in card.text
    assert "/home/kari" not in str(card)
    assert (
        "made with local files, which are not here: `config.yaml` says `<local>` at datasets.mine.source." in card.text
    )
    assert "[ltg/norbert4-base](https://huggingface.co/ltg/norbert4-base) at `386ba2dc`" in card.text
    assert "| licence of the base model | Apache-2.0 |" in card.text
    assert 'SparseEncoder("org/model", trust_remote_code=True)' in card.text
    assert "`modeling_gptbert.py` (soft cap)" in card.text
    assert "Files differed from that commit" in card.text
    assert (card.data.base_model, card.data.datasets) == ("ltg/norbert4-base", ["ltg/norquad"])


def test_the_code_of_the_card_runs(trained, capsys):
    shutil.move("models/tiny/final", "local_model")
    shutil.copytree("local_model", "models/tiny/final")
    code = re.search(r"```python\n(.+?)```", card_of(repo="local_model").text, re.DOTALL)[1]
    (trained / "usage.py").write_text(code)
    runpy.run_path("usage.py")
    score, terms = capsys.readouterr().out.splitlines()[-2:]
    assert "tensor([[" in score
    assert terms.startswith("[('")


def test_leakage_is_told_without_scores_as_long_as_it_is_of_this_model(evaluated):
    shutil.rmtree(evaluated / "eval/scores")
    file = evaluated / "eval/leakage.json"
    values = json.loads(file.read_text())
    row = "| NorQuadRetrieval | 9 | 1 | 2 | 8 | 3 | 4 |"
    for model, is_told in ((hash_of_model(evaluated / "final"), True), ("another", False)):
        file.write_text(json.dumps(values | {"made_with": {"system": model}}))
        assert (row in card_of().text) is is_told
    file.write_text(json.dumps(values))  # of an earlier version, which does not say of which model
    assert row not in card_of().text


def test_the_code_for_long_documents_gives_nearly_the_vector_that_was_measured(trained):
    assert "encode_long_document" not in card_of().text
    file = trained / "models/tiny/config.yaml"
    file.write_text(file.read_text().replace("long_documents: cut", "long_documents: windows"))
    card = card_of(repo="models/tiny/final").text
    found = {"print": lambda *words: None}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block, found)  # noqa: S102
    model = found["model"]
    words = [word for sentences in (ROOT / "README.md").read_text().splitlines() for word in sentences.split()]
    text = " ".join(word for word in words if word.isalpha())[:2000]
    vector, cut = found["encode_long_document"](text), model.encode_document(text).to_dense()
    read_in_windows(model)
    measured = model.encode_document(text).to_dense()
    similarity = torch.nn.functional.cosine_similarity
    assert similarity(vector, measured, dim=0) > 0.98 > 0.8 > similarity(cut, measured, dim=0)
    for short in ("en kort tekst", ""):
        torch.testing.assert_close(found["encode_long_document"](short), model.encode_document(short).to_dense())
