"""Every locked package can be installed on Linux on arm64: by a wheel with a locked hash, or compiled, which one is."""

import os
import re
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from tests.conftest import ROOT

FOLDER = ROOT / "docker/requirements"
MACHINE = {
    "platform_machine": "aarch64",
    "sys_platform": "linux",
    "python_version": "3.11",
    "python_full_version": "3.11.7",
}
COMPILED = "pytrec-eval-terrier"
GLIBC_OF_DEBIAN_12 = 36


def locked(name):
    """Name to (version, hashes) of what arm64 installs from a lock."""
    found = {}
    for line, hashes in re.findall(
        r"^(\S+==.*?) *\\\n((?: +--hash=\S+.*\n?)+)", (FOLDER / name).read_text(), re.MULTILINE
    ):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(MACHINE):
            version = str(requirement.specifier).removeprefix("==")
            found[canonicalize_name(requirement.name)] = version, set(re.findall(r"sha256:(\w{64})", hashes))
    return found


def runs_on_arm64(tag):
    python = tag.interpreter in ("cp311", "py3", "py311") or (tag.abi == "abi3" and int(tag.interpreter[3:]) <= 11)
    c_library = re.fullmatch(r"manylinux_2_(\d+)_aarch64|manylinux2014_aarch64|linux_aarch64", tag.platform)
    return python and (
        tag.platform == "any" or (c_library is not None and int(c_library[1] or 0) <= GLIBC_OF_DEBIAN_12)
    )


def wheels():
    """(package, version) to the hash of its wheel for arm64."""
    found = {}
    for line in (FOLDER / "arm64.sha256").read_text().splitlines()[1:]:
        digest, file = line.split("  ")
        name, version, _, tags = parse_wheel_filename(file)
        assert any(runs_on_arm64(tag) for tag in tags), file
        found[name, str(version)] = digest
    return found


@pytest.mark.parametrize("lock,at_least", [("base.txt", 75), ("torch-cuda.txt", 19), ("dev.txt", 30)])
def test_every_locked_package_has_a_wheel_for_arm64_with_a_locked_hash_or_is_the_one_that_is_compiled(lock, at_least):
    there, packages = wheels(), locked(lock)
    assert len(packages) > at_least
    missing = {name for name, (version, hashes) in packages.items() if there.get((name, version)) not in hashes}
    assert missing == ({COMPILED} if lock == "base.txt" else set())


def test_torch_for_the_cpu_has_a_hash_for_each_of_its_two_machines():
    ((version, hashes),) = locked("torch-cpu.txt").values()
    assert (version, len(hashes)) == ("2.13.0+cpu", 2)


def test_a_wheel_of_another_machine_or_a_newer_system_does_not_count():
    for file, counts in {
        "a-1-cp311-cp311-manylinux_2_28_x86_64.whl": False,
        "a-1-cp312-cp312-manylinux_2_28_aarch64.whl": False,
        "a-1-cp312-abi3-manylinux_2_28_aarch64.whl": False,
        "a-1-cp311-cp311-manylinux_2_39_aarch64.whl": False,
        "a-1-cp39-abi3-manylinux_2_28_aarch64.whl": True,
        "a-1-py2.py3-none-any.whl": True,
    }.items():
        assert any(map(runs_on_arm64, parse_wheel_filename(file)[3])) is counts, file


def set_up_on(tmp_path, machine, *arguments, python="python3"):
    """What make would do for a virtual environment where `uname -m` says so."""
    uname = tmp_path / "uname"
    uname.write_text(f'#!/bin/sh\n[ "$1" = -m ] && echo {machine} || echo Linux\n')
    uname.chmod(0o755)
    return subprocess.run(
        ["make", *arguments, f"VENV={tmp_path}/venv", "TORCH=cuda", f"PYTHON={python}"],
        cwd=ROOT, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("machine,exception", [("aarch64", f" --no-binary={COMPILED}"), ("x86_64", "")])
def test_make_compiles_that_one_on_arm64_and_nothing_elsewhere(tmp_path, machine, exception):
    printed = set_up_on(tmp_path, machine, "--dry-run", f"{tmp_path}/venv/.ok").stdout
    (line,) = [line for line in printed.splitlines() if line.endswith("base.txt")]
    assert "--require-hashes --only-binary=:all:" in line
    assert re.findall(r" --no-binary=\S+", line) == ([exception] if exception else [])
    assert (".compiler" in printed or "Python.h" in printed) is bool(exception)


def test_a_machine_that_cannot_compile_is_told_so_in_one_line(tmp_path):
    without_headers = tmp_path / "python"
    without_headers.write_text("#!/bin/sh\nexit 1\n")
    without_headers.chmod(0o755)
    result = set_up_on(tmp_path, "aarch64", ".compiler", python=str(without_headers))
    assert result.returncode == 2
    assert result.stdout.splitlines() == [
        f"Error: Linux on arm64 compiles {COMPILED}, and gcc, g++ or Python.h is missing. "
        "Install them (Debian: apt install gcc g++ python3.11-dev), then run make again"
    ]


def test_both_images_compile_that_one_on_arm64():
    text = (ROOT / "docker/Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"(?m)^RUN .*-r /build/base\.txt.*$", text)
    assert len(installs) == 2
    for install in installs:
        assert '"$(uname -m)" = aarch64' in install
        assert f"compiled={COMPILED};" in install
        assert "${compiled:+--no-binary $compiled}" in install
