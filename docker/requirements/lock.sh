#!/usr/bin/env bash
# Remakes the hash-locked requirement files from base.in and dev.in. Needs uv, and pip from 23.2 on.
#   base.txt        everything but torch and its CUDA companions, for every platform
#   torch-cuda.txt  torch as the default index serves it: CUDA on Linux, MPS on macOS
#   dev.txt         what tests and checks need besides
#   arm64.sha256    which file of each Linux on arm64 installs
#   torch-cpu.txt   the CPU build for Linux, by hand: the hashes are listed beside the files on PyTorch's CPU index
set -euo pipefail
cd "$(dirname "$0")"
torch=2.13.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
lock() { uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header "$@"; }

echo "torch==$torch" > "$work/torch.in"
lock base.in "$work/torch.in" -o "$work/all.txt"
lock dev.in -c "$work/all.txt" --no-emit-package pip -o dev.txt # every virtual environment has its own pip
python3 - "$work/all.txt" <<'PY'
import re
import sys

blocks = re.findall(r"^[A-Za-z0-9].*(?:\n[ \t].*)*\n?", open(sys.argv[1]).read(), re.MULTILINE)
gpu = re.compile(r"(torch|triton|nvidia-|cuda-)")
head = "# Made by lock.sh from base.in; do not edit.\n"
open("base.txt", "w").write(head + "".join(block for block in blocks if not gpu.match(block)))
open("torch-cuda.txt", "w").write(head + "".join(block for block in blocks if gpu.match(block)))
PY
python3 arm64.py # fails where a package has no wheel for Linux on arm64
