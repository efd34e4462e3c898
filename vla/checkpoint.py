"""The exported policy directory: what a policy needs to act, and nothing of how it was trained.

    model.safetensors    the policy's weights (averaged ones where the run keeps an average); no inverse dynamics head
    config.json          baseline, its arguments and dimensions, cameras, image orientation, versions, origin
    statistics.json      action statistics and the normalisation scheme
    tokenizer/           tokenizer files

`load_policy` needs no hub, no pickle and no training code. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from data.normalization import ActionStatistics
from vla.build import build_policy
from vla.errors import UserError
from vla.policy import Policy

FORMAT = 1


def export_policy(policy: Policy, out: Path, *, name: str, arguments: dict, about: dict) -> None:
    """Write `policy` to the folder `out`, replacing an older export of the same run.

    Args:
        name: the baseline.
        arguments: those its `build` got; `policy.architecture()` completes them.
        about: JSON-able facts to travel along (arm, benchmark, image_rotation, config hash, data hash, versions).
    """
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in policy.state_dict().items()}
    safetensors.torch.save_file(weights, partial / "model.safetensors")
    normalizer = policy.normalizer
    config = {"format": FORMAT, "baseline": name, "arguments": arguments | policy.architecture(), "about": about}
    _write_json(partial / "config.json", config)
    _write_json(partial / "statistics.json", {"scheme": normalizer.scheme, **normalizer.statistics.to_dict()})
    policy.tokenizer.save_pretrained(partial / "tokenizer")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)


def load_policy(path: Path, device: str = "cpu", tap: str | None = None) -> tuple[Policy, dict]:
    """The policy in eval mode, and its config.json.

    Args:
        tap: read other visual tokens than the run's inverse dynamics did (for probes).

    Raises:
        UserError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    path = Path(path)
    config = _read_json(path, "config.json")
    statistics = _read_json(path, "statistics.json")
    if config.get("format") != FORMAT:
        raise UserError(
            f"{path}/config.json is of format {config.get('format')}, this code reads {FORMAT}; export again"
        )
    scheme = statistics.pop("scheme", None)
    arguments = config["arguments"] | ({"tap": tap} if tap else {})
    try:
        statistics = ActionStatistics(**statistics)
    except TypeError as error:
        raise UserError(f"{path}/statistics.json is incomplete ({error}); export the policy again") from error
    if not (path / "tokenizer").is_dir():
        raise UserError(f"{path} has no tokenizer/; export the policy again")
    arguments["tokenizer"] = AutoTokenizer.from_pretrained(path / "tokenizer", local_files_only=True)
    policy = build_policy(config["baseline"], statistics, scheme, arguments)
    try:
        policy.load_state_dict(safetensors.torch.load_file(path / "model.safetensors"), strict=True)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path}/model.safetensors is missing or damaged ({error}); export the policy again") from error
    except RuntimeError as error:
        raise UserError(f"{path}/model.safetensors does not fit config.json: {error}") from error
    return policy.to(torch.device(device)).eval(), config


def checkpoint_hash(path: Path) -> str:
    """sha256 of the weights, the identity of a policy in every record."""
    with open(Path(path) / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict) -> None:
    with open(path, "w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _read_json(folder: Path, name: str) -> dict:
    if not folder.is_dir():
        raise UserError(
            f"policy directory {folder} does not exist; train one with train.py (it ends as runs/<run>/policy)"
        )
    file = folder / name
    if not file.exists():
        raise UserError(
            f"{folder} has no {name}, so it is not an exported policy; train.py writes one at runs/<run>/policy"
        )
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is damaged ({error}); export the policy again") from error
