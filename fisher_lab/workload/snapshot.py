"""The state of a training in one safetensors file: tensors, and everything else as JSON.

The JSON is in the file's header. One file is replaced as a whole by a rename, and reading it
executes no code, as a pickle would.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import Tensor

from fisher_lab.runs import atomic


class SnapshotError(RuntimeError):
    """A snapshot cannot be read or belongs to another training."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write nested dicts, lists and tuples of tensors and JSON values, atomically.

    Raises:
        TypeError: A value is neither.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _pack(state, tensors, "")
    with atomic.writing(path) as temporary:
        save_file(tensors, temporary, metadata={"state": json.dumps(skeleton)})


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, with tensors on the CPU.

    Raises:
        SnapshotError: The file is cut short or is no snapshot.
    """
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _unpack(skeleton, tensors)
    except (SafetensorError, KeyError, ValueError) as error:
        raise SnapshotError(f"{path} cannot be read as the state of a training: {error}") from error


def to_tensor(state: Any) -> Tensor:
    """The bytes of a state (uint8), to be sent to another rank; takes what `save` takes."""
    tensors: dict[str, Tensor] = {}
    header = json.dumps(_pack(state, tensors, "")).encode()
    data = len(header).to_bytes(8, "little") + header + save_bytes(tensors)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def from_tensor(received: Tensor) -> Any:
    """What `to_tensor` was given, with tensors on the CPU."""
    data = received.numpy().tobytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return _unpack(json.loads(data[8:end]), load_bytes(data[end:]))


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(value, Tensor):
        # A copy: safetensors refuses two names for one memory, and the training continues.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            "dict": [
                [key, _pack(item, tensors, f"{name}/{key}" if name else str(key))]
                for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        items = [_pack(item, tensors, f"{name}/{index}") for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"{name}: a {type(value).__name__} cannot be saved")


def _unpack(packed: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = packed.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: _unpack(item, tensors) for key, item in content}
        case "list":
            return [_unpack(item, tensors) for item in content]
        case "tuple":
            return tuple(_unpack(item, tensors) for item in content)
        case "value":
            return content
    raise ValueError(f"unknown entry {kind!r}")


def random_state() -> dict[str, Any]:
    """The state of every random-number generator that a training may draw from."""
    name, keys, *rest = np.random.get_state()
    assert isinstance(keys, np.ndarray)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators to the state that `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
