"""Writes arm64.sha256: for every locked package, the wheel that Linux on arm64 installs, as pip chooses it.

python arm64.py            asks the package index; lock.sh calls it, and a test compares what it wrote with the locks
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

HERE = Path(__file__).parent
RECORD = HERE / "arm64.sha256"
LOCKS = ("base.txt", "torch-cuda.txt", "dev.txt")  # not torch-cpu.txt: made by hand from an index of its own
# No wheel, so its source is compiled there: Makefile and Dockerfile allow that for this one alone.
COMPILED = "pytrec-eval-terrier"
ARM64 = {"platform_machine": "aarch64", "sys_platform": "linux", "os_name": "posix", "platform_system": "Linux"}
ARM64 |= {"python_version": "3.11", "python_full_version": "3.11.0", "implementation_name": "cpython"}
# Up to the C library of Debian 12, whose image the containers are made from.
PLATFORMS = ["linux_aarch64", "manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 37))]


def blocks_of(lock: Path) -> Iterator[tuple[Requirement, str]]:
    """Every package that Linux on arm64 needs, with its lines of a lock file."""
    for block in re.findall(r"^[A-Za-z0-9].*(?:\n[ \t].*)*\n?", lock.read_text(encoding="utf-8"), re.MULTILINE):
        requirement = Requirement(block.splitlines()[0].rstrip(" \\"))
        if requirement.marker is None or requirement.marker.evaluate(ARM64):
            yield requirement, block


def wheels_of(lock: Path, folder: Path) -> dict[str, str]:
    """The file names and hashes that pip chooses for a lock file's packages; it fails where there is none."""
    # without markers: pip would ask them of the machine that it runs on
    blocks = [re.sub(r" ;[^\\\n]*", " ", block) for found, block in blocks_of(lock) if found.name != COMPILED]
    wanted, report = folder / "wanted.txt", folder / "report.json"
    wanted.write_text("".join(blocks), encoding="utf-8")
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps",
         "--require-hashes", "--only-binary=:all:", "--report", str(report), "--target", str(folder / "nothing"),
         "--implementation", "cp", "--python-version", "3.11", "--abi", "cp311", "--abi", "abi3", "--abi", "none",
         *platforms, "--requirement", str(wanted)],
        check=True,
    )  # fmt: skip
    found = [install["download_info"] for install in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {info["url"].rpartition("/")[2]: info["archive_info"]["hashes"]["sha256"] for info in found}


def main() -> None:
    """Ask for every lock file, then write the record."""
    wheels: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in LOCKS:
            wheels |= wheels_of(HERE / name, Path(folder))
    head = "# Made by arm64.py: the wheels of the locks for Linux on arm64, Python 3.11. No line, no wheel.\n"
    lines = [f"{digest}  {name}\n" for name, digest in sorted(wheels.items())]
    RECORD.write_text(head + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
