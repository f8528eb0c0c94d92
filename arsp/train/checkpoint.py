"""Complete-or-invisible training checkpoints: a directory of safetensors whose manifest is written last and moved into place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arsp.errors import InputError
from arsp.runs import atomic_dir, sha256_file, write_json


def save(
    folder: Path, task: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None, state: dict[str, Any], *, keep: int
) -> Path:
    """Write ``folder/{step:08d}`` atomically and delete all but the newest ``keep``; an existing one of this step is kept."""
    target = folder / f"{state['step']:08d}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_dir(target) as temporary:
            parts = {"task": dict(task.state_dict()), "optimizer": _flatten(optimizer)}
            if average is not None:
                parts["average"] = average
            for name, tensors in parts.items():
                save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
            hashes = {f"{name}.safetensors": sha256_file(temporary / f"{name}.safetensors") for name in parts}
            write_json(temporary / "state.json", {"state": state, "sha256": hashes})
    for old in sorted(folder.glob("[0-9]*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def restore_latest(
    folder: Path, task: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None, state: dict[str, Any]
) -> bool:
    """Load the newest complete checkpoint into the given objects; False when there is none. InputError when it is damaged."""
    complete = sorted(path.parent for path in folder.glob("[0-9]*/state.json"))
    if not complete:
        return False
    path = complete[-1]
    hint = f"Delete {path} to resume from the one before it."
    try:
        saved = json.loads((path / "state.json").read_text())
        saved["state"]["step"], saved["sha256"]["task.safetensors"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path / 'state.json'} is damaged ({type(error).__name__}: {error}).", hint) from error
    for name, expected in saved["sha256"].items():
        if not (path / name).is_file() or sha256_file(path / name) != expected:
            raise InputError(f"checkpoint {path / name} is missing or damaged (SHA-256 differs).", hint)
    task.load_state_dict(load_file(path / "task.safetensors"))
    _unflatten(optimizer, load_file(path / "optimizer.safetensors"))
    if average is not None:
        for key, value in load_file(path / "average.safetensors").items():
            average[key].copy_(value)
    state.update(saved["state"])
    return True


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    per_parameter = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value) for index, entry in per_parameter.items() for key, value in entry.items()}


def _unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    saved = optimizer.state_dict()
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        saved["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(saved)
