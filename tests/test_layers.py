import ast

from tests.conftest import ROOT

# Lowest first: a module imports only from rows above its own, never from a neighbour.
ROWS = [
    {"trainer.config"},
    {"trainer.hub", "trainer.beir", "trainer.device", "trainer.run", "trainer.checkpoints", "trainer.sparsity"},
    {
        "trainer.data",
        "trainer.models",
        "trainer.losses",
        "trainer.arguments",
        "trainer.callbacks",
        "trainer.evaluators",
    },
    {"trainer.loop", "trainer.plan"},
    {"trainer.train"},
    {"trainer.cli"},
    {"trainer.__main__"},
]
# What evaluate may import of the trainer: nothing that trains.
SHARED = {"trainer.config", "trainer.run", "trainer.beir"}


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


def test_every_module_of_the_trainer_has_a_row():
    modules = {part_of(module) for module, _ in imports("trainer")}
    assert modules - {"trainer"} <= set().union(*ROWS)


def test_a_module_imports_only_from_lower_rows():
    row = {module: number for number, modules in enumerate(ROWS) for module in modules}
    found = [(importer, part_of(imported)) for importer, imported in imports("trainer")]
    assert len(found) > 40
    upward = [(a, b) for a, b in found if a != b and (b.startswith("evaluate") or row[b] >= row[a])]
    assert upward == []


def test_evaluate_imports_no_training_code():
    found = {part_of(imported) for _, imported in imports("evaluate") if imported.startswith("trainer")}
    assert found
    assert found <= SHARED
