"""Which room (a folder of trainer/, a module of evaluate/) may import from which, lowest first."""

import ast
import re

import pytest

from tests.conftest import ROOT

# A room imports from those above its own in this list, and from itself.
TRAINER = [
    "config",  # YAML files, their schema, one line for every mistake
    "system",  # device, processes, files, progress on the terminal
    "hub",  # downloads, uploads, the cache, code that a model names
    "runs",  # the run folder: manifest, lock, checkpoints, results
    "encoding",  # the fused head, sparse rows
    "models",  # three architectures from a base model, NorBERT's code
    "data",  # rows, search sets, hard negatives, token ids, batches
    "losses",  # contrastive loss, regularizers, dims controller, teachers
    "training",  # prepare, train, evaluate, resume, callbacks
    "publish",  # the card, the upload
    "export",  # files for search engines
    "queries",  # written by a language model for a corpus that has none
    "cli",
    "__main__",
]
EVALUATE = [
    {"trust", "passage_vectors"},
    {"tasks", "search", "subject", "terms", "dense"},
    {"bm25", "scores", "sample"},
    {"sparsity", "latency", "leakage", "hybrid", "compare"},
    {"report"},
    {"session"},
    {"prove"},  # steps that call the commands
    {"cli"},
    {"__main__"},
]
# What evaluate may import of the trainer: nothing that trains.
SHARED = {"config", "system", "hub", "runs", "encoding", "models", "data"}


def imports(package):
    """(importing module, imported module) for every import within the project."""
    for file in (ROOT / package).rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("trainer", "evaluate"):
                yield module, node.module
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in ("trainer", "evaluate"):
                        yield module, alias.name


def room_of(module):
    """trainer.data.rows -> data."""
    return module.split(".")[1]


@pytest.mark.parametrize("package,rows", [("trainer", [{room} for room in TRAINER]), ("evaluate", EVALUATE)])
def test_every_room_imports_only_from_lower_ones(package, rows):
    row = {room: number for number, rooms in enumerate(rows) for room in rooms}
    found = [(room_of(a), room_of(b)) for a, b in imports(package) if b.startswith(f"{package}.")]
    assert {importer for importer, _ in found} <= row.keys()
    assert len(found) > 25
    assert [(a, b) for a, b in found if a != b and row[b] >= row[a]] == []


def test_every_folder_of_the_trainer_is_a_room_that_only_says_what_it_offers():
    folders = [file.parent for file in (ROOT / "trainer").glob("*/__init__.py")]
    assert {folder.name for folder in folders} == set(TRAINER) - {"cli", "__main__"}
    for folder in folders:
        docstring, *rest = ast.parse((folder / "__init__.py").read_text()).body
        assert isinstance(docstring.value, ast.Constant)
        assert all(isinstance(node, (ast.ImportFrom, ast.Assign)) for node in rest)


def test_no_modules_import_each_other_in_a_circle():
    found = {}
    for package in ("trainer", "evaluate"):
        for importer, imported in imports(package):
            found.setdefault(importer, set()).add(imported)
    done, path = set(), []

    def visit(module):
        assert module not in path, f"{' → '.join([*path, module])}"
        if module not in done:
            path.append(module)
            for imported in sorted(found.get(module, ())):
                visit(imported)
            done.add(path.pop())

    for module in sorted(found):
        visit(module)
    assert len(done) > 100


def test_the_trainer_never_imports_evaluate():
    assert not [imported for _, imported in imports("trainer") if imported.startswith("evaluate")]


def test_evaluate_imports_no_training_code():
    found = {room_of(imported) for _, imported in imports("evaluate") if imported.startswith("trainer.")}
    assert found
    assert found <= SHARED


def test_only_those_that_build_know_the_names_of_the_architectures():
    builders = {"trainer/models/build.py", "trainer/losses/build.py", "trainer/publish/card.py"}
    asks = re.compile(r"(?<!self)\.architecture\b|\bloss\.type\b|\"inference-free-splade\"")
    asking = {
        str(file.relative_to(ROOT))
        for package in ("trainer", "evaluate")
        for file in (ROOT / package).rglob("*.py")
        if asks.search(file.read_text())
    }
    named = {
        "trainer/training/describe.py",
        "trainer/models/card.py",
    }  # print or store the name, and ask nothing of it
    assert builders <= asking
    assert {file for file in asking if not file.startswith("trainer/config/")} <= builders | named
