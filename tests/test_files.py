"""Files that are there whole or not at all, whoever else writes them."""

import os

from trainer.system.files import write_atomically, written_whole


def test_two_writers_with_equal_pids_do_not_write_into_one_temporary_file(tmp_path, monkeypatch):
    """Processes in two containers, or on two machines, that share a cache: every container's first process is number 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    file = tmp_path / "scores.parquet"
    with written_whole(file) as first, written_whole(file) as second:
        first.write_text("one " * 1000)
        second.write_text("two")
        assert first.read_text() == "one " * 1000
    assert file.read_text() == "one " * 1000  # the first one's block ends last
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_has_the_permissions_that_the_umask_gives(tmp_path):
    """Other users of a shared cache read it."""
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "a.json"
    write_atomically(file, "old")
    try:
        with written_whole(file) as aside:
            aside.write_text("ne")
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
