"""Everything that must not depend on kills, and what of it differs between two runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.soak.work import newest_step


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of everything nested in a value."""
    if isinstance(value, dict):
        for key in value:
            yield from flat(value[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from flat(item, f"{path}.{number}")
    else:
        yield path, value


def equal(one: Any, two: Any) -> bool:
    """Bit-equality of leaves."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, np.ndarray):
        return isinstance(two, np.ndarray) and np.array_equal(one, two)
    return type(one) is type(two) and one == two


def outcome(folder: Path, name: str) -> dict[str, Any]:
    """Everything that must not depend on kills, by name: weights, optimizer, random numbers, log history, data order."""
    run = folder / "models" / name
    last = run / "checkpoints" / f"checkpoint-{newest_step(folder, name)}"
    found: dict[str, Any] = {"last step": newest_step(folder, name)}
    for place in (run / "final", last):
        for file in sorted(place.rglob("*.safetensors")):
            for tensor, value in load_file(file).items():
                found[f"{place.name}/{file.relative_to(place)}:{tensor}"] = value
    for file in sorted(last.glob("*.pt*")):
        if file.name != "training_args.bin":
            safe = torch.load(file, weights_only=not file.name.startswith("rng_state"))
            found |= {f"{file.name}:{path}": leaf for path, leaf in flat(safe)}
    state = json.loads((last / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    found |= {f"state:{path}": leaf for path, leaf in flat(state) if not path.endswith(("_runtime", "_per_second"))}
    if (order := folder / f"{name}.order").exists():  # several processes keep none: their losses tell
        found |= {f"rows of step {number}": digest for number, digest in data_order(order).items()}
    return found


def data_order(file: Path) -> dict[str, str]:
    """Which rows each step saw. A step that was repeated has to have seen the same rows."""
    seen: dict[str, set[str]] = {}
    for line in file.read_text().splitlines():
        number, digest = line.split()
        seen.setdefault(number, set()).add(digest)
    return {number: " and ".join(sorted(digests)) for number, digests in seen.items()}


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    missing = sorted(one.keys() ^ two.keys())
    return missing + [name for name in one if name in two and not equal(one[name], two[name])]
