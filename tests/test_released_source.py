"""Reading released checkpoints: nothing in a file runs, and what is broken is named."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from vla.errors import UserError
from vla.released.source import (
    Opaque,
    choose_dataset,
    drop,
    read_pickle,
    read_tensors,
    rename,
    resolve,
    rlds_statistics,
    take,
)


class Payload:
    """Runs a command when it is unpickled without care."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class Config:
    """A class of the author's, as in a Lightning checkpoint's hyper-parameters."""

    def __init__(self):
        self.values = {"lr": 1e-4}


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3).to(torch.bfloat16), "n": torch.tensor(7)}


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["beside", "instead"])
def test_a_payload_does_not_run(tmp_path, legacy, place):
    canary = tmp_path / "canary"
    content = {"state_dict": weights(), "extra": Payload(canary)} if place == "beside" else Payload(canary)
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    tensors = read_tensors(tmp_path / "model.pt")
    assert not canary.exists()
    if place == "beside":
        assert same(tensors, {f"state_dict.{key}": value for key, value in weights().items()})
    else:
        assert tensors == {}
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists(), "the payload must be one that does run where it may"


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle_does_not_run(tmp_path, protocol):
    canary = tmp_path / "canary"
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"x": Payload(canary)}, protocol=protocol))
    with pytest.raises(UserError, match=r"model\.pt"):
        read_tensors(tmp_path / "model.pt")
    assert not canary.exists()


def test_lightning_checkpoint_with_foreign_objects(tmp_path):
    ema = list(weights().values())
    content = {
        "state_dict": OrderedDict(weights()),
        "callbacks": {"EMA": {"ema_weights": ema, "cfg": Config()}},
        "hyper_parameters": Config(),
    }
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    read = read_pickle(tmp_path / "last.ckpt")
    assert isinstance(read["hyper_parameters"], Opaque) and not isinstance(read["hyper_parameters"], Config)
    assert same(read["state_dict"], weights())
    found = read["callbacks"]["EMA"]["ema_weights"]
    assert all(torch.equal(a, b) for a, b in zip(found, ema, strict=True))


def test_every_container_reads_alike(tmp_path):
    expected = weights()
    safetensors.torch.save_file(expected, tmp_path / "one.safetensors")
    torch.save(expected, tmp_path / "one.pt")
    assert same(read_tensors(tmp_path / "one.safetensors"), expected) and same(
        read_tensors(tmp_path / "one.pt"), expected
    )
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = {key: f"model-0000{i}-of-00003.safetensors" for i, key in enumerate(expected)}
    for key, name in names.items():
        safetensors.torch.save_file({key: expected[key]}, sharded / name)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert same(read_tensors(sharded), expected)
    (sharded / names["n"]).unlink()
    with pytest.raises(UserError, match=names["n"]):
        read_tensors(sharded)


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    safetensors.torch.save_file(weights(), tmp_path / "secret.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match=r"\.\./secret"):
        read_tensors(inside)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.ckpt"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "missing"])
def test_damaged_files_are_named(tmp_path, name, damage):
    file = tmp_path / name
    if name.endswith("safetensors"):
        safetensors.torch.save_file(weights(), file)
    else:
        torch.save(weights(), file)
    content = file.read_bytes()
    broken = {"truncated": content[: len(content) // 2], "garbage": b"<html>404</html>", "empty": b""}
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(broken[damage])
    with pytest.raises(UserError, match=name):
        read_tensors(file)


def test_ambiguous_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="none"):
        read_tensors(tmp_path)
    torch.save(weights(), tmp_path / "a.pt")
    assert same(read_tensors(tmp_path), weights())
    torch.save(weights(), tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"a\.pt, b\.pt"):
        read_tensors(tmp_path)


def test_rename_drop_take():
    renamed = rename(weights(), [(r"^a\.", "b."), (r"\.weight$", ".kernel")])
    assert list(renamed) == ["b.kernel", "b.bias", "n"]
    assert list(drop(renamed, [r"^n$"])) == ["b.kernel", "b.bias"]
    with pytest.raises(UserError, match=r"come out as x"):
        rename(weights(), [(r"^a\..*", "x")])
    assert take(renamed, "b.kernel", (3, None)).shape == (3, 4)
    for key, shape in (("c", None), ("b.kernel", (4, None)), ("b.kernel", (3,))):
        with pytest.raises(UserError, match=key):
            take(renamed, key, shape)


def test_statistics():
    entry = {"action": {k: [float(i)] * 7 for i, k in enumerate(("q01", "q99", "mean", "std", "min", "max"))}}
    found = rlds_statistics(entry | {"num_transitions": 5})
    assert found["q99"] == [1.0] * 7 and found["count"] == 5 and found["state"] is None
    with pytest.raises(UserError, match="q99"):
        rlds_statistics({"action": {**entry["action"], "q99": [1.0]}})
    assert choose_dataset({"bridge": entry}, None) == ("bridge", entry)
    for dataset in (None, "fractal"):
        with pytest.raises(UserError, match="bridge, rt1"):
            choose_dataset({"bridge": entry, "rt1": entry}, dataset)


def test_resolve(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="not/a/path"):
        resolve("not/a/path")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="source=nobody/nothing"):
        resolve("nobody/nothing")
