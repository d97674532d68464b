"""What a command says while it works: nothing for five seconds, then a bar on a terminal, and lines elsewhere."""

import io
import sys
import time
from weakref import WeakSet

import pytest
import torch

from trainer.hub.download import bytes_of
from trainer.system import progress_bar as module
from trainer.system.progress_bar import ProgressReport, encoding, going_on, in_columns


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """tqdm's clock, which a test sets. A bar that another test left open would move this one down by a row."""
    now = [1000.0]
    monkeypatch.setattr(ProgressReport, "_instances", WeakSet())
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def work(clock, seconds, steps=10, **options):
    with ProgressReport(**({"desc": "reading   mine", "total": steps, "unit": "texts"} | options)) as progress:
        for _ in range(steps):
            clock[0] += seconds / steps
            progress.update()


def test_what_takes_less_than_five_seconds_is_done_in_silence(clock, capfd, monkeypatch):
    work(clock, 4.9)
    monkeypatch.setattr(sys, "stderr", seen := Terminal())
    work(clock, 4.9)
    assert seen.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_elsewhere_than_on_a_terminal_there_is_a_line_after_five_seconds_and_every_ten(clock, capfd):
    work(clock, 40, steps=40)
    out, err = capfd.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "reading   mine: 5 of 40 texts, 35 s left",
        "reading   mine: 15 of 40 texts, 25 s left",
        "reading   mine: 25 of 40 texts, 15 s left",
        "reading   mine: 35 of 40 texts, 5 s left",
    ]


def test_without_a_total_a_line_says_how_fast_it_is(clock, capfd):
    work(clock, 6, steps=3, total=None, unit="documents", initial=100)
    assert capfd.readouterr().out == "reading   mine: 103 documents, 0.5 per second\n"


def test_on_a_terminal_a_bar_comes_after_five_seconds_and_goes(clock, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stderr", seen := Terminal())
    work(clock, 20, steps=20)
    assert "reading   mine:  25%|" in seen.getvalue()
    assert "15/20" in seen.getvalue()
    assert seen.getvalue().split("\r")[-2].strip() == ""  # nothing of the bar stays
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_speaks(clock, capfd, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    work(clock, 6)
    assert bool(capfd.readouterr().out) == (rank == "0")


def test_what_cannot_be_counted_is_said_to_go_on(capfd, monkeypatch):
    monkeypatch.setattr(module, "SILENT", 0.05)
    monkeypatch.setattr(module, "LOOK_EVERY", 0.05)
    with going_on(in_columns("model", "building")):
        until = time.monotonic() + 10
        while not (out := capfd.readouterr().out) and time.monotonic() < until:
            time.sleep(0.02)
    assert out == "model     building: 0 s so far\n"


def test_texts_are_counted_as_they_go_through_a_network():
    network = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    with encoding(network[0], "a model", total=10, share=2) as progress:
        network({"input_ids": torch.zeros(3, 5)})
        network({"input_ids": torch.zeros(1, 9), "cu_seq_lens_q": torch.tensor([0, 4, 9])})
    network({"input_ids": torch.zeros(3, 5)})
    assert progress.n == 2 * (3 + 2)


def test_a_download_is_one_line_of_bytes_though_the_library_has_three_bars(clock, capfd):
    bar = bytes_of("org/name")
    network, disk = (bar(desc=desc, total=0, unit="B", unit_scale=True) for desc in ("Downloading", "Reconstructing"))
    files = bar(desc="Fetching 2 files", total=2)
    for _ in range(10):
        network.total = disk.total = 5_000_000_000
        clock[0] += 1
        for each, moved in ((network, 100_000_000), (disk, 100_000_000), (files, 1)):
            each.update(moved)
            each.set_description("another", refresh=True)
    network.set_description_str("Download complete")
    assert capfd.readouterr().out == "fetching   org/name: 500 of 5,000 MB, 45 s left\n"


@pytest.mark.parametrize("label", ["a", "before", "12345678", "123456789", "checkpoint-80", "x" * 60])
@pytest.mark.parametrize("width", [10, 12])
def test_columns_never_run_together_and_short_labels_stand_below_each_other(label, width):
    line = in_columns(label, "swefaq: 0.5", width)
    assert line.removeprefix(label).startswith("  ")
    assert line.endswith("swefaq: 0.5")
    if len(label) <= width - 2:
        assert line.index("swefaq") == width
