import numpy as np
import pytest

from tests.soak import __main__ as soak
from tests.soak.compare import data_order, differences
from tests.soak.long_run import growth
from tests.soak.report import Kill, Report


@pytest.mark.slow
@pytest.mark.parametrize("architecture", soak.ARCHITECTURES)
def test_a_run_killed_anywhere_and_resumed_ends_bit_equal_to_one_left_alone(architecture, tmp_path):
    from tests.conftest import run_trainer

    result = run_trainer(
        tmp_path, "--kills", "4", "--architectures", architecture, "--processes", "--seed", "3", module="tests.soak"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1].split()
    assert last[:3] == [architecture, "all", "4"]
    assert result.stdout.rstrip().endswith("values each: 0 differ")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_runs_of_several_processes_killed_anywhere_and_resumed_end_bit_equal_too(processes, tmp_path):
    from tests.conftest import run_trainer

    options = ("--kills", "3", "--architectures", "--processes", str(processes), "--seed", "3")
    result = run_trainer(tmp_path, *options, module="tests.soak")
    assert result.returncode == 0, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1].split()
    assert last[:4] == [str(processes), "processes", "all", "3"]
    assert result.stdout.rstrip().endswith("values each: 0 differ")


def test_the_soak_notices_what_differs():
    import torch

    same = {"weights": torch.ones(3), "step": 4, "rate": 0.1}
    assert differences(same, {"weights": torch.ones(3), "step": 4, "rate": 0.1}) == []
    nearly = torch.ones(3)
    nearly[1] = torch.nextafter(nearly[1], torch.tensor(2.0))
    assert differences(same, same | {"weights": nearly}) == ["weights"]
    assert differences(same, same | {"step": 5}) == ["step"]
    assert differences(same, {"weights": torch.ones(3), "step": 4}) == ["rate"]
    assert differences(same, same | {"step": 4.0}) == ["step"]


def test_a_step_repeated_with_other_rows_is_noticed(tmp_path):
    (tmp_path / "order").write_text("0 aa\n1 bb\n1 bb\n2 cc\n")
    assert data_order(tmp_path / "order") == {"0": "aa", "1": "bb", "2": "cc"}
    (tmp_path / "order").write_text("0 aa\n1 bb\n1 b2\n")
    assert data_order(tmp_path / "order") == {"0": "aa", "1": "b2 and bb"}


def test_a_soak_with_a_difference_exits_with_1(monkeypatch, capsys):
    monkeypatch.setattr(soak, "soak", lambda name, *_: Report(name, [Kill("save", 2)], 1, 9, ["killed0 final/weights"]))
    assert soak.main(["--kills", "1", "--architectures", "csr", "--processes"]) == 1
    printed = capsys.readouterr().out
    assert "differs: killed0 final/weights" in printed
    assert "1 differ" in printed
    monkeypatch.setattr(soak, "soak", lambda name, *_: Report(name))
    assert soak.main(["--kills", "1", "--architectures", "csr", "--processes"]) == 0


def test_what_leaks_is_told_from_what_the_allocator_takes_once():
    steps = np.arange(500, 2000, 50)
    leaking = 500 + 0.132 * np.floor(1.5 * steps / 132)  # 1.5 MB per 1,000 steps, in the steps of a heap
    assert growth(steps, leaking) > 1
    assert growth(steps, leaking + 2.0 * (steps > 1000)) > 1
    assert growth(steps, 500 + 0.8 * (steps > 1000) + 1.6 * (steps > 1500)) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_memory_and_open_files_do_not_grow_over_2000_steps(tmp_path):
    from tests.conftest import run_trainer

    # in a process of its own: it forks, and a test runner's threads may hold a lock that the child would wait for
    result = run_trainer(tmp_path, "--long", module="tests.soak", seconds=1200)  # 200 on two idle cores
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2000 steps" in result.stdout
