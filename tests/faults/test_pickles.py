"""Nothing that comes from data, weights or the network is executed.

Each entry point gets a payload that does run under plain unpickling, which is shown on the very same file.
"""

import io
import json
import os
import pickle
import subprocess
from pathlib import Path

import msgpack
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import make_episodes, train_config
from lerobot_files import hub_like
from rlds_files import BRIDGE, made_steps, read_all, write_rlds
from test_calvin_data import frame, write_split
from test_cifar10 import batches
from vla_eval.protocol.messages import unpack_message

from data.calvin import CalvinSplit, read_frame
from data.cifar10 import TEST, read_cifar10
from data.frame_store import FrameStore
from data.lerobot import Reading, read_lerobot
from data.statistics import ActionStatistics
from data.store_writer import write_store
from envs import libero_files
from train import train
from vla.build import build_policy
from vla.checkpoint import export_policy, initial_policy, load_policy
from vla.errors import UserError
from vla.released.source import read_tensors
from vla.run_identity import run_dir
from vla.saving import STATE, About, seal
from vla.serving.wire import WireError, unpack
from vla.training import policy_arguments

ROOT = Path(__file__).resolve().parents[2]


class Payload:
    """Makes the file `canary` when it is unpickled without care."""

    def __init__(self, canary: Path, kind: str):
        self.canary, self.kind = canary, kind

    def __reduce__(self):
        write = f"open({str(self.canary)!r}, 'w').close()"
        return {
            "system": (os.system, (f"touch {self.canary}",)),
            "eval": (eval, (write,)),
            "exec": (exec, (write,)),
            "run": (subprocess.run, (["touch", str(self.canary)],)),
        }[self.kind]


def numpy_objects(payload: Payload) -> np.ndarray:
    array = np.empty(2, object)
    array[:] = [payload, 1]
    return array


# An entry point: (write the payload below a folder, read it through the project, read it as plain unpickling would).


def calvin_annotations(folder: Path, payload: Payload):
    split = write_split(folder / "training", segments=[(0, 3)], windows=[(0, 3, "t", "do it")])
    file = split / "lang_annotations/auto_lang_ann.npy"
    np.save(file, {"language": {"ann": [payload], "task": ["t"]}, "info": {"indx": [(0, 3)]}})
    return lambda: CalvinSplit(split).annotations, lambda: np.load(file, allow_pickle=True)


def calvin_segments(folder: Path, payload: Payload):
    split = write_split(folder / "training", segments=[(0, 3)], windows=[(0, 3, "t", "do it")])
    np.save(split / "ep_start_end_ids.npy", numpy_objects(payload))
    return lambda: CalvinSplit(split).segments, lambda: np.load(split / "ep_start_end_ids.npy", allow_pickle=True)


def calvin_frame(folder: Path, payload: Payload):
    file = folder / "episode_0000000.npz"
    np.savez(file, **frame(0) | {"rel_actions": numpy_objects(payload)})
    return lambda: read_frame(file, {"rel_actions": (7,)}), lambda: np.load(file, allow_pickle=True)["rel_actions"]


def libero_init_states(folder: Path, payload: Payload):
    file = folder / "task.pruned_init"
    torch.save({"states": payload}, file)
    return lambda: libero_files.initial_states(file), lambda: torch.load(file, weights_only=False)


def released_weights(name: str):
    def written(folder: Path, payload: Payload):
        torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": {"x": payload}}, folder / name)
        return lambda: read_tensors(folder), lambda: torch.load(folder / name, weights_only=False)

    return written


def cifar_batch(folder: Path, payload: Payload):
    for name, value in batches().items():
        content = value | {b"x": payload} if name == TEST[0] else value
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return lambda: read_cifar10(folder), lambda: pickle.loads((folder / TEST[0]).read_bytes())


def checkpoint(folder: Path, payload: Payload):
    """A checkpoint whose manifest is right: what somebody hands on as "resume from mine"."""
    write_store(make_episodes(), folder / "store", reader={"image_rotation": "rotate180"})
    cfg = train_config(folder / "store", folder / "runs", "resume=auto", "max_steps=2")
    partial = run_dir(cfg) / "checkpoints/.step=1.partial"
    partial.mkdir(parents=True)
    torch.save({"state_dict": {}, "global_step": 1, "epoch": 0, "loops": payload}, partial / STATE)
    sealed = seal(partial, About(step=1, world_size=1, batch_size=cfg.batch_size))
    return lambda: train(cfg), lambda: torch.load(sealed / STATE, weights_only=False)


def exported(folder: Path):
    """(policy directory, run's configuration, statistics, arguments) of an untrained tiny policy."""
    cfg, (episode,) = train_config(folder / "none", folder / "runs"), make_episodes(1)
    statistics = ActionStatistics.of(episode.actions, episode.state)
    arguments = policy_arguments(cfg)
    policy = build_policy(cfg.policy.name, statistics, cfg.normalization, arguments)
    about = {"arm": "vanilla", "train_seed": 0, "image_rotation": "rotate180"}
    export_policy(policy, folder / "policy", name=cfg.policy.name, arguments=arguments, about=about)
    return folder / "policy", cfg, statistics, arguments


def plain_torch(file: Path):
    """Not by its name, which says safetensors."""
    return torch.load(io.BytesIO(file.read_bytes()), weights_only=False)


def policy_weights(folder: Path, payload: Payload):
    policy, *_ = exported(folder)
    torch.save({"w": payload}, policy / "model.safetensors")
    return lambda: load_policy(policy), lambda: plain_torch(policy / "model.safetensors")


def init_from(folder: Path, payload: Payload):
    policy, cfg, statistics, arguments = exported(folder)
    torch.save({"w": payload}, policy / "model.safetensors")
    read = lambda: initial_policy(policy, cfg.policy.name, statistics, cfg.normalization, arguments)  # noqa: E731
    return read, lambda: plain_torch(policy / "model.safetensors")


def store_extension_type(folder: Path, payload: Payload):
    """Arrow once unpickled an extension type's metadata (CVE-2023-47248)."""
    write_store(make_episodes(1, 4), folder / "store", reader={})
    shard = folder / "store/shard-00000-000.arrow"
    table = pa.ipc.open_file(pa.BufferReader(shard.read_bytes())).read_all()
    name, evil = b"ARROW:extension:name", b"ARROW:extension:metadata"
    metadata = {name: b"arrow.py_extension_type", evil: pickle.dumps(payload)}
    field = pa.field("frame_valid", pa.bool_(), metadata=metadata)
    table = table.cast(pa.schema([field, *list(table.schema)[1:]]))
    with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return lambda: FrameStore(folder / "store"), lambda: pickle.loads(metadata[evil])


def wire_object_array(folder: Path, payload: Payload):
    content = pickle.dumps(payload)
    array = {b"__ndarray__": True, b"dtype": "|O", b"shape": [1], b"data": content}
    return lambda: unpack(msgpack.packb({"state": array})), lambda: pickle.loads(content)


def wire_extension(folder: Path, payload: Payload):
    content = pickle.dumps(payload)
    return lambda: unpack(msgpack.packb({"state": msgpack.ExtType(42, content)})), lambda: pickle.loads(content)


def evaluation_wire(folder: Path, payload: Payload):
    content = pickle.dumps(payload)
    array = {"__ndarray__": True, "dtype": "|O", "shape": [1], "data": content}
    message = msgpack.packb({"type": "observation", "payload": {"state": array}, "seq": 1, "timestamp": 0.0})
    return lambda: unpack_message(message), lambda: pickle.loads(content)


ENTRIES = {
    "CALVIN auto_lang_ann.npy": calvin_annotations,
    "CALVIN ep_start_end_ids.npy": calvin_segments,
    "CALVIN frame npz": calvin_frame,
    "LIBERO .pruned_init": libero_init_states,
    "released .pt": released_weights("model.pt"),
    "released .bin": released_weights("pytorch_model.bin"),
    "released Lightning .ckpt": released_weights("last.ckpt"),
    "CIFAR-10 batch": cifar_batch,
    "resume from a checkpoint": checkpoint,
    "policy directory": policy_weights,
    "init_from": init_from,
    "frame store": store_extension_type,
    "openpi message, object array": wire_object_array,
    "openpi message, extension type": wire_extension,
    "vla-eval message, object array": evaluation_wire,
}
READ_ALL_THE_SAME = {"released .pt", "released .bin", "released Lightning .ckpt", "frame store"}
SLOW = {"resume from a checkpoint", "init_from", "policy directory"}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_payload_runs_under_plain_unpickling_and_not_here(entry, tmp_path, monkeypatch):
    monkeypatch.setattr(libero_files, "package", lambda: libero_files.HF)
    for kind in ("system",) if entry in SLOW else ("system", "eval", "exec", "run"):
        folder, canary = tmp_path / kind, tmp_path / f"canary-{kind}"
        folder.mkdir()
        read, plain = ENTRIES[entry](folder, Payload(canary, kind))
        if entry in READ_ALL_THE_SAME:
            read()
        else:
            with pytest.raises((UserError, WireError, ValueError, pickle.UnpicklingError)) as caught:
                read()
            assert "\n" not in str(caught.value) or not isinstance(caught.value, UserError)
        assert not canary.exists(), f"{entry} ran a {kind} payload"
        plain()
        assert canary.exists(), "the payload must be one that does run where it may"


def test_code_beside_a_tokenizer_is_not_run(tmp_path):
    policy, *_ = exported(tmp_path)
    canary = tmp_path / "canary"
    (policy / "tokenizer/evil.py").write_text(
        f"open({str(canary)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Evil\n"
    )
    file = policy / "tokenizer/tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    written = json.loads(file.read_text())
    for change in ({"auto_map": auto_map}, {"auto_map": auto_map, "tokenizer_class": "Evil"}):
        file.write_text(json.dumps(written | change | {"trust_remote_code": True}))
        try:
            load_policy(policy)
        except UserError as refused:
            assert "custom code" in str(refused) and "\n" not in str(refused)
        assert not canary.exists()
    exec(compile((policy / "tokenizer/evil.py").read_text(), "evil", "exec"), {})
    assert canary.exists()


@pytest.mark.parametrize("place", ["top", "arguments", "about", "statistics"])
def test_a_target_in_a_policy_directory_is_not_called(place, tmp_path):
    policy, *_ = exported(tmp_path)
    canary = tmp_path / "canary"
    evil = {"_target_": "pathlib.Path.touch", "_args_": [str(canary)], "_recursive_": True}
    file = policy / ("statistics.json" if place == "statistics" else "config.json")
    content = json.loads(file.read_text())
    if place in ("top", "statistics"):
        content |= evil
    else:
        content[place] |= evil | {"chunk": evil}
    file.write_text(json.dumps(content))
    try:
        load_policy(policy)
    except UserError as refused:
        assert "_target_" in str(refused) or "statistics.json is incomplete" in str(refused)
    assert not canary.exists()


def test_a_target_in_metadata_is_not_called(tmp_path):
    canary = tmp_path / "canary"
    evil = {"_target_": "pathlib.Path.touch", "_args_": [str(canary)]}
    hub_like(tmp_path / "lerobot")
    info = tmp_path / "lerobot/meta/info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | evil | {"pythonClassName": "os.system"}))
    assert len(list(read_lerobot(tmp_path / "lerobot", ("static",), Reading("libero", "rotate180")))) == 3
    folder = tmp_path / "bridge/1.0.0"
    write_rlds(folder, "bridge_dataset", BRIDGE, [made_steps(BRIDGE, 5, np.random.default_rng(0))])
    for name in ("features.json", "dataset_info.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | evil | {"pythonClassName": "os.system"}))
    assert len(read_all(folder)) == 1
    write_store(make_episodes(1, 4), tmp_path / "store", reader=evil)
    assert FrameStore(tmp_path / "store").meta.reader == evil
    assert not canary.exists()
