import ast

import pytest

from tests.conftest import ROOT

# Lowest first: a module imports only from rows above its own, never from a neighbour.
ROWS = [
    {"trainer.config"},
    {"trainer.distributed", "trainer.files", "trainer.local_paths", "trainer.own_code", "trainer.texts"},
    {"trainer.progress_bar"},
    {
        "trainer.hub",
        "trainer.beir",
        "trainer.device",
        "trainer.run",
        "trainer.checkpoints",
        "trainer.sparsity",
        "trainer.penalties",
        "trainer.fused",
        "trainer.stock",
        "trainer.upload",
    },
    {"trainer.cache", "trainer.chosen", "trainer.prompts", "trainer.weights"},
    {"trainer.data"},
    {
        "trainer.models",
        "trainer.losses",
        "trainer.arguments",
        "trainer.callbacks",
        "trainer.control",
        "trainer.csr",
        "trainer.evaluators",
        "trainer.measured",
        "trainer.lock",
        "trainer.progress",
    },
    {"trainer.teachers", "trainer.memory"},
    {"trainer.loop", "trainer.plan", "trainer.card", "trainer.resume"},
    {"trainer.train", "trainer.launch", "trainer.publish", "trainer.export"},
    {"trainer.cli"},
    {"trainer.__main__"},
]
# What evaluate may import of the trainer: nothing that trains.
SHARED = {
    "trainer.config",
    "trainer.run",
    "trainer.beir",
    "trainer.chosen",
    "trainer.texts",
    "trainer.fused",
    "trainer.prompts",
    "trainer.own_code",
    "trainer.weights",
    "trainer.progress_bar",
}
EVALUATE_ROWS = [
    {"evaluate.results", "evaluate.trust"},
    {"evaluate.tasks", "evaluate.search", "evaluate.subject", "evaluate.terms"},
    {"evaluate.bm25", "evaluate.scores", "evaluate.sample"},
    {"evaluate.sparsity", "evaluate.latency", "evaluate.leakage", "evaluate.hybrid", "evaluate.compare"},
    {"evaluate.report"},
    {"evaluate.session"},
    {"evaluate.cli"},
    {"evaluate.__main__"},
]


def part_of(module):
    """trainer.data.rows -> trainer.data."""
    return ".".join(module.split(".")[:2])


def imports(package):
    """(importing part, imported module) for every import within the project."""
    for file in (ROOT / package).rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.split(".")[0] in ("trainer", "evaluate")
            ):
                yield part_of(module), node.module
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in ("trainer", "evaluate"):
                        yield part_of(module), alias.name


@pytest.mark.parametrize("package,rows", [("trainer", ROWS), ("evaluate", EVALUATE_ROWS)])
def test_every_module_has_a_row_and_imports_only_from_lower_ones(package, rows):
    row = {module: number for number, modules in enumerate(rows) for module in modules}
    found = [(importer, part_of(imported)) for importer, imported in imports(package)]
    assert {importer for importer, _ in found} - {package} <= row.keys()
    assert len(found) > 25
    upward = [(a, b) for a, b in found if a != b and b.startswith(package) and row[b] >= row[a]]
    assert upward == []


def test_the_trainer_never_imports_evaluate():
    assert not [imported for _, imported in imports("trainer") if imported.startswith("evaluate")]


def test_evaluate_imports_no_training_code():
    found = {part_of(imported) for _, imported in imports("evaluate") if imported.startswith("trainer")}
    assert found
    assert found <= SHARED
