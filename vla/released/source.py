"""Reading what the authors of a baseline published, safely: tensors, JSON, and nothing that runs.

`resolve` finds the folder (or fetches it from the hub), `read_tensors` reads its weights whatever the container,
`rename` and `drop` help a converter (vla/released/<baseline>.py) to bring them into this project's names, strictly.

Pickled files are read by torch with weights_only=True. A Lightning checkpoint holds other things besides tensors (an
OmegaConf node, callbacks' state): it is read a second time by an unpickler that builds tensors and plain containers and
puts an inert `Opaque` in the place of everything else. No class or function named in a file is ever called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


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
    """A local file or folder as it is; anything else of the form owner/name is fetched from the hub."""
    raise NotImplementedError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: a .safetensors, .pt, .bin or .ckpt file, or a folder with one of them or its shards.

    Nested dicts come out with their keys joined by dots ("model.projector.0.weight").

    Raises:
        UserError: nothing to read, a damaged or truncated file, a missing shard (each named).
    """
    raise NotImplementedError


def read_pickle(path: Path) -> Any:
    """The whole content of a torch file, tensors and plain containers, `Opaque` for everything else."""
    raise NotImplementedError


def read_json(path: Path) -> dict:
    """Raises UserError where the file is missing or damaged."""
    raise NotImplementedError


def rename(tensors: dict[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply every rule (regular expression, replacement) in order to every key; UserError when two keys collide."""
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        out[key] = tensor
    return out


def drop(tensors: dict[str, Tensor], patterns: Iterable[str]) -> dict[str, Tensor]:
    """Without the keys that a pattern (regular expression, searched) matches: what is expected and not needed."""
    return {k: v for k, v in tensors.items() if not any(re.search(p, k) for p in patterns)}
