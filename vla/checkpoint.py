"""The exported policy directory: what a policy needs to act, and nothing of how it was trained.

    model.safetensors    the policy's weights (averaged ones where the run keeps an average); no inverse dynamics head
    config.json          baseline, its arguments and dimensions, cameras, image orientation, versions, origin
    statistics.json      action statistics and the normalisation scheme
    tokenizer/           tokenizer files

`load_policy` needs no hub, no pickle and no training code. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from data.normalization import ActionStatistics
from vla import saving
from vla.build import apply_ideas, build_policy, policy_class
from vla.errors import UserError
from vla.files import sha256, sync
from vla.policy import Policy

FORMAT = 1


def export_policy(
    policy: Policy, out: Path, *, name: str, arguments: dict, about: dict, weights: dict | None = None
) -> None:
    """Write `policy` to the folder `out`, replacing an older export of the same run.

    Args:
        name: the baseline.
        arguments: those its `build` got; `policy.architecture()` completes them.
        about: JSON-able facts to travel along (arm, benchmark, image_rotation, config hash, data hash, versions).
        weights: the policy's, where its own are sharded.
    """
    weights = {key: value.detach().cpu().contiguous() for key, value in (weights or policy.state_dict()).items()}
    normalizer = policy.normalizer
    write_policy(
        out,
        weights,
        config={"format": FORMAT, "baseline": name, "arguments": arguments | policy.architecture(), "about": about},
        statistics={"scheme": normalizer.scheme, **normalizer.statistics.to_dict()},
        tokenizer=policy.tokenizer,
    )


def write_policy(out: Path, weights: dict, *, config: dict, statistics: dict, tokenizer) -> None:
    """The folder itself, from its parts; it appears whole or not at all."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        safetensors.torch.save_file(weights, partial / "model.safetensors")
        _write_json(partial / "config.json", config)
        _write_json(partial / "statistics.json", statistics)
        tokenizer.save_pretrained(partial / "tokenizer")
        for path in [*saving.files_of(partial), partial]:
            sync(path)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def initial_policy(path: Path, name: str, statistics: ActionStatistics, scheme: str, arguments: dict) -> Policy:
    """A policy to train, with the weights and the architecture of the policy directory `path`.

    The new data's statistics are kept, and of the run's arguments those in `of_the_run`; all others come from there.

    Raises:
        UserError: as `load_policy`, or the directory holds another baseline.
    """
    policy = build_policy(name, statistics, scheme, initial_arguments(path, name, arguments))
    _load_weights(policy, path)
    return apply_ideas(policy, arguments)


def initial_arguments(path: Path, name: str, arguments: dict) -> dict:
    """Those of the policy in `path`, before this run's ideas, beside the run's own."""
    config, tokenizer = _read_config(path), _read_tokenizer(path)
    if config["baseline"] != name:
        raise UserError(f"init_from={path} holds {config['baseline']}, not {name}; set baseline={config['baseline']}")
    own = {key: arguments[key] for key in policy_class(name).of_the_run}
    if config["arguments"].get("dual") and not arguments["dual"]:
        raise UserError(f"init_from={path} has two vision encoders (dual); set policy.dual=true")
    if config["arguments"].get("actions", "native") != "native" and arguments["actions"] == "native":
        raise UserError(f"init_from={path} says its actions as text; set policy.actions=string")
    return config["arguments"] | own | {"tokenizer": tokenizer}


def load_policy(path: Path, device: str = "cpu", tap: str | None = None) -> tuple[Policy, dict]:
    """The policy in eval mode, and its config.json.

    Args:
        tap: read other visual tokens than the run's inverse dynamics did (for probes).

    Raises:
        UserError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    path = Path(path)
    config, statistics = _read_config(path), _read_json(path, "statistics.json")
    scheme = statistics.pop("scheme", None)
    try:
        statistics = ActionStatistics(**statistics)
    except TypeError as error:
        raise UserError(f"{path}/statistics.json is incomplete ({error}); export the policy again") from error
    arguments = config["arguments"] | ({"tap": tap} if tap else {}) | {"tokenizer": _read_tokenizer(path)}
    try:
        policy = build_policy(config["baseline"], statistics, scheme, arguments)
    except TypeError as error:
        raise UserError(f"{path}/config.json is not of this code's {config['baseline']} ({error})") from error
    _load_weights(policy, path)
    return policy.to(torch.device(device)).eval(), config


def _load_weights(policy: Policy, path: Path) -> None:
    try:
        policy.load_state_dict(safetensors.torch.load_file(path / "model.safetensors"), strict=True)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path}/model.safetensors is missing or damaged ({error}); export the policy again") from error
    except RuntimeError as error:
        raise UserError(f"{path}/model.safetensors does not fit config.json: {error}") from error


def _read_config(path: Path) -> dict:
    config = _read_json(path, "config.json")
    if config.get("format") != FORMAT:
        raise UserError(
            f"{path}/config.json is of format {config.get('format')}, this code reads {FORMAT}; export again"
        )
    return config


def _read_tokenizer(path: Path):
    if not (path / "tokenizer").is_dir():
        raise UserError(f"{path} has no tokenizer/; export the policy again")
    try:
        return AutoTokenizer.from_pretrained(path / "tokenizer", local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:  # a damaged file, or one that names code to run
        raise UserError(f"{path}/tokenizer cannot be read ({str(error).splitlines()[0]}); export again") from error


def checkpoint_hash(path: Path) -> str:
    """sha256 of the weights, the identity of a policy in every record."""
    return sha256(Path(path) / "model.safetensors")


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
