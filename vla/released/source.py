"""Reading what the authors of a baseline published, safely: tensors, JSON, and nothing that runs.

`resolve` finds the folder (or fetches it from the hub), `read_tensors` reads its weights whatever the container,
`rename` and `drop` help a converter (vla/released/<baseline>.py) to bring them into this project's names, strictly.

Pickled files are read by torch with weights_only=True. A Lightning checkpoint holds other things besides tensors (an
OmegaConf node, callbacks' state): it is read a second time by an unpickler that builds tensors and plain containers and
puts an inert `Opaque` in the place of everything else. No class or function named in a file is ever called.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from vla.errors import UserError

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
HUB_FILES = ["*.json", "*.yaml", "*.txt", "*.model", "*.safetensors", "*.pt", "*.ckpt", "*.bin"]


@dataclass
class Converted:
    """A released checkpoint in this project's terms, what `write_policy` needs.

    Attributes:
        arguments: what the policy class's `build` needs beside the configuration of conf/ (dims, chunk, cameras …).
        weights: the state dict of the policy that `build` makes; loads strictly.
        statistics: fields of data.normalization.ActionStatistics.
        scheme: normalisation scheme.
        tokenizer: a transformers tokenizer.
        notes: what was dropped or assumed, one line each; printed and kept in config.json.
    """

    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    statistics: dict[str, Any]
    scheme: str
    tokenizer: Any
    notes: list[str] = field(default_factory=list)


def resolve(source: str) -> Path:
    """A local file or folder as it is; anything else of the form owner/name is fetched from the hub.

    Raises:
        UserError: neither there nor on the hub.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(f"source={source} does not exist; give a local file or folder, or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises a dozen kinds, all of which mean this
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"source={source} is not a local path and the hub did not give it ({first})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: a .safetensors, .pt, .bin or .ckpt file, or a folder with one of them or its shards.

    Nested dicts come out with their keys joined by dots ("model.projector.0.weight").

    Raises:
        UserError: nothing to read, a damaged or truncated file, a missing shard (each named).
    """
    path = Path(path)
    if path.is_dir():
        tensors: dict[str, Tensor] = {}
        for file in weight_files(path):
            tensors |= read_tensors(file)
        return tensors
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is missing or damaged ({error}); download it again") from error
    return flatten(read_pickle(path))


def weight_files(folder: Path) -> list[Path]:
    """The weight file of a folder, or all its shards; UserError where that is none or ambiguous."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / name).exists():
            shards = sorted(set(read_json(folder / name).get("weight_map", {}).values()))
            for shard in shards:
                if Path(shard).name != shard or not (folder / shard).exists():
                    raise UserError(f"{folder / name} names the shard {shard!r}, which is not there; download it again")
            if shards:
                return [folder / shard for shard in shards]
            raise UserError(f"{folder / name} names no shards; download it again")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
    found = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", *PICKLED))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{folder} should hold one checkpoint and holds {names}; give the file itself as source=FILE")
    return found


def flatten(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts, keys joined by dots; everything else is left out."""
    out: dict[str, Tensor] = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, Tensor):
            out[f"{prefix}{key}"] = value.detach()
        elif isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
    return out


class Opaque:
    """Stands for an object of a class that a file names and we do not build; swallows what unpickling does to it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
}


class InertUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers; every other global of a file becomes `Opaque`."""

    def find_class(self, module: str, name: str) -> Any:
        return ALLOWED.get((module, name), Opaque)


def _inert_load(file: Any, **kwargs: Any) -> Any:
    return InertUnpickler(file, **kwargs).load()


_INERT = SimpleNamespace(__name__="inert", Unpickler=InertUnpickler, load=_inert_load)


def read_pickle(path: Path) -> Any:
    """The whole content of a torch file, tensors and plain containers, `Opaque` for everything else.

    Raises:
        UserError: the file is missing, damaged or truncated.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_INERT)
    except (RuntimeError, OSError, EOFError, ValueError, TypeError, KeyError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a torch checkpoint ({first}); download it again") from error


def read_json(path: Path) -> dict:
    """Raises UserError where the file is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; download the checkpoint's folder whole") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from error


def rename(tensors: dict[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply every rule (regular expression, replacement) in order to every key; UserError when two keys collide."""
    rules, out = list(rules), {}
    for old, tensor in tensors.items():
        key = old
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if key in out:
            raise UserError(f"two weights of the checkpoint come out as {key} (one is {old}); it is of another layout")
        out[key] = tensor
    return out


def drop(tensors: dict[str, Tensor], patterns: Iterable[str]) -> dict[str, Tensor]:
    """Without the keys that a pattern (regular expression, searched) matches: what is expected and not needed."""
    patterns = list(patterns)
    return {k: v for k, v in tensors.items() if not any(re.search(p, k) for p in patterns)}


def take(tensors: dict[str, Tensor], key: str, shape: tuple[int | None, ...] | None = None) -> Tensor:
    """`tensors[key]`, of `shape` (None = any size); UserError naming the key where it is not."""
    if key not in tensors:
        raise UserError(f"the checkpoint has no weight {key}; it is incomplete or of another layout")
    found = tuple(tensors[key].shape)
    if shape is not None and not _fits(found, shape):
        raise UserError(f"the checkpoint's {key} has shape {found}, expected {shape}; it is of another layout")
    return tensors[key]


def _fits(found: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(found) == len(shape) and all(want in (None, size) for want, size in zip(shape, found, strict=True))


def choose_dataset(norm_stats: dict[str, dict], dataset: str | None) -> tuple[str, dict]:
    """(name, entry) of a checkpoint's several action statistics; UserError that lists them where the choice is open."""
    if dataset is None and len(norm_stats) == 1:
        dataset = next(iter(norm_stats))
    if dataset not in norm_stats:
        given = "dataset=… must be given" if dataset is None else f"dataset={dataset} is not in the checkpoint"
        raise UserError(f"{given}; choose one of {', '.join(sorted(norm_stats)) or 'none: it has no statistics'}")
    return dataset, norm_stats[dataset]


def rlds_statistics(entry: dict) -> dict[str, Any]:
    """Fields of ActionStatistics from an RLDS entry: {"action": {…}, "proprio": {…}, "num_transitions": n}."""
    names = ("q01", "q99", "mean", "std", "min", "max")
    action = entry.get("action", {})
    if absent := [name for name in names if len(action.get(name, ())) != 7]:
        raise UserError(f"the checkpoint's action statistics lack seven numbers for {', '.join(absent)}")
    proprio = entry.get("proprio", {})
    state = {name: list(proprio[name]) for name in names} if set(names) <= set(proprio) else None
    return {name: list(action[name]) for name in names} | {"count": entry.get("num_transitions", 0), "state": state}


def count_layers(tensors: dict[str, Tensor], prefix: str) -> int:
    """The number of layers whose weights are called `prefix` + number + "."; 0 where there is none."""
    return 1 + max((int(key[len(prefix) :].split(".")[0]) for key in tensors if key.startswith(prefix)), default=-1)


def no_statistics() -> dict[str, Any]:
    """Statistics of a checkpoint that carries none: the unit range, and a count of 0 that says nothing was measured."""
    zeros, ones = [0.0] * 7, [1.0] * 7
    return dict(q01=[-1.0] * 7, q99=ones, mean=zeros, std=ones, min=[-1.0] * 7, max=ones, count=0)
