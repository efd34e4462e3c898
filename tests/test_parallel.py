"""Many processes and one give the same: shares of a batch, weighted losses, sharding, recomputation.

Several real processes: tests/faults/test_distributed.py. Here a process group of one shards for real, and accumulation
stands for several processes, since both cut a step's batch into the same parts.
"""

from __future__ import annotations

import csv
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from data.frame_store import FrameStore
from data.sampler import PairDataset, Share, StatelessBatches
from data.store_writer import write_store
from tests.conftest import make_episodes, train_config
from tests.test_contract import batch_of, build
from tests.test_data import windowed_episodes
from train import train
from vla.build import BASELINES, build_inverse_dynamics, build_policy
from vla.cli import compose_config
from vla.config import OptimConfig
from vla.errors import UserError
from vla.module import VLAModule
from vla.parallel import ShardedAverage, blocks, full_weights, recompute_blocks, require_plain_index, shard
from vla.run_identity import run_dir
from vla.training import policy_arguments, statistics_of

NO_DRAWS = (  # nothing random in a step, and no batch normalisation, whose statistics are of a part
    "policy.vision=qwen",
    "policy.vision_size=64",
    "policy.image_size=32",
    *(f"+policy.vision_config.{name}" for name in ("depth=2", "hidden_size=32", "intermediate_size=64", "num_heads=2")),
    "+policy.vision_config.deepstack_visual_indexes=[0]",
    "augment.shift={static: 0}",
    "augment.brightness=0.0",
    "batch_size=8",
)


def losses_of(policy: Path) -> dict[str, list[float]]:
    """The columns of a run's metrics.csv that the clock has no part in."""
    with open(policy.parent / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    timing = ("samples_per_s", "data_wait", "mfu")
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name not in timing}


def assert_same_run(one: Path, other: Path, atol: float, leave_out: tuple[str, ...] = ()) -> None:
    """Losses to 1e-5 relative, weights to `atol`. What batch normalisation counts is a part's own, and left out."""
    a, b = losses_of(one), losses_of(other)
    assert a.keys() == b.keys() and a["step"] == b["step"]
    for name in a.keys() - set(leave_out):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-7, err_msg=name)
    weights, others = (safetensors.torch.load_file(policy / "model.safetensors") for policy in (one, other))
    assert weights.keys() == others.keys()
    for name in weights:
        if not any(part in name for part in ("running_", "num_batches")):
            torch.testing.assert_close(weights[name], others[name], rtol=0, atol=atol, msg=name)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 9), st.integers(1, 60))
@settings(max_examples=60)
def test_the_parts_of_a_step_are_its_batch_whatever_their_number(world, accumulate, size, first, length):
    batch = world * accumulate * size
    whole = StatelessBatches(length, batch, 0)
    ranks = [iter(StatelessBatches(length, batch, 0, first, Share(r, world, accumulate))) for r in range(world)]
    for step in (first, first + 1):
        parts = [next(ranks[r]) for _ in range(accumulate) for r in range(world)]
        assert all(len(part) == size for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), whole.whole(step))


@pytest.mark.parametrize("pairs", [None, "separate", "shared"])
@pytest.mark.parametrize("tail", ["pad", "whole"])
def test_what_is_valid_is_counted_without_the_batch(pairs, tail, tmp_path):
    write_store(iter(windowed_episodes()), tmp_path / "store", reader={})
    dataset = PairDataset(FrameStore(tmp_path / "store"), 5, ["static"], pairs, tail)
    for rows in (np.arange(len(dataset)), np.array([0, 9, 17, 17])):
        batch = dataset.__getitems__(rows)
        expected = (batch["action_valid"].sum(), batch["future_valid"].sum() if pairs else 0)
        assert dataset.valid(rows) == expected


@pytest.fixture(scope="module")
def told_alike(tmp_path_factory) -> FrameStore:
    """One instruction: VLM4VLA's query stands behind the longest of a part."""
    path = tmp_path_factory.mktemp("data") / "store"
    write_store(
        [replace(episode, instruction="open it") for episode in make_episodes()],
        path,
        reader={"image_rotation": "rotate180"},
    )
    return FrameStore(path)


@pytest.mark.parametrize("ablation", ["vanilla", "aux"])
def test_two_passes_are_one_batch(ablation, told_alike, tmp_path):
    """With chunks and pairs that run past the episode, so that the mean of the parts' means is another one."""
    store = told_alike
    dataset = PairDataset(store, 8, ["static"], "shared")
    parts = StatelessBatches(len(dataset), 4, 0, share=Share(accumulate=2))
    counts = [dataset.valid(part) for part, _ in zip(parts, range(12), strict=False)]
    assert any(first != second for first, second in zip(counts[::2], counts[1::2], strict=True))
    options = (*NO_DRAWS, f"ablation={ablation}")
    one = train(train_config(store.path, tmp_path / "one", *options))
    two = train(train_config(store.path, tmp_path / "two", *options, "trainer.accumulate=2"))
    assert_same_run(one, two, atol=1e-6)


def test_a_run_goes_on_with_another_number_of_passes(told_alike, tmp_path):
    """Stopped after step 3 of 6 and gone on with two passes a step: the run that was not stopped, up to rounding."""
    options = (*NO_DRAWS, "trainer.checkpoint_every=3", "trainer.keep_checkpoints=5")
    whole = train(train_config(told_alike.path, tmp_path / "whole", *options))
    cfg = train_config(told_alike.path, tmp_path / "halves", *options, "trainer.accumulate=2", "resume=auto")
    shutil.copytree(whole.parent, run_dir(cfg))
    shutil.rmtree(run_dir(cfg) / "policy")
    shutil.rmtree(run_dir(cfg) / "checkpoints" / "step=6")
    assert_same_run(whole, train(cfg), atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["trainer.devices=2"], "needs trainer=ddp or fsdp"),
        (["trainer.strategy=tpu"], "trainer.strategy=tpu is not known"),
        (["trainer.accumulate=0"], "must be at least 1"),
        (["trainer.accumulate=3"], r"batch_size=4 has 4 robot samples, which 1 processes × trainer.accumulate=3"),
        (["trainer.accumulate=4"], r"× data.pairs=shared cannot share evenly; make them a multiple of 8"),
        (["trainer=ddp", "trainer.devices=64"], "trainer.devices=64, but"),
    ],
)
def test_what_cannot_be_shared_out_is_one_line(overrides, named, store, tmp_path):
    with pytest.raises(UserError, match=named):
        train(train_config(store.path, tmp_path / "runs", *overrides))
    assert not (tmp_path / "runs").exists()


def test_how_a_run_is_spread_is_not_which_run_it_is(store, tmp_path):
    base = run_dir(train_config(store.path, tmp_path))
    spread = ("trainer.strategy=fsdp", "trainer.devices=8", "trainer.num_nodes=2", "trainer.accumulate=4")
    assert run_dir(train_config(store.path, tmp_path, *spread, "trainer.activation_checkpointing=true")) == base
    assert run_dir(train_config(store.path, tmp_path, "batch_size=8")) != base


@pytest.mark.parametrize(
    ("baseline", "count"),
    # Blocks of the tiny models (conf/backbone): tower(s) + decoder(s) + others in lists.
    [("vlm4vla", 2 + 1), ("flower", 4 + 4 + 1 + 2), ("openvla", 2 + 2 + 2), ("pi0", 2 + 2 + 2)],
)
def test_blocks_are_the_elements_of_the_lists_of_layers(baseline, count, store):
    module, _ = build(baseline, "vanilla", store)
    found = list(blocks(module))
    assert len(found) == count
    inside = {id(p) for block in found for p in block.parameters()}
    assert len(inside) == sum(len(list(block.parameters())) for block in found), "a block within a block"


ARMS = [(b, a) for b in BASELINES for a in ("ptr", "dual_string")]
ARMS.remove(("flower", "dual_string"))


def built(baseline: str, arm: str, store, *overrides: str):
    """(module, batch) with everything that may be trained, frozen, tied or cached in one."""
    cfg = compose_config("train", f"baseline={baseline}", "size=tiny", f"ablation={arm}", *overrides)
    torch.manual_seed(0)
    policy = build_policy(baseline, statistics_of(store), cfg.normalization, policy_arguments(cfg))
    policy.fit_to(torch.from_numpy(store.actions))
    inverse = build_inverse_dynamics(policy, cfg.inverse_dynamics)
    module = VLAModule(policy, inverse, cfg.optim, cfg.augment, max_steps=10, warmup_steps=1, seed=0)
    return module, batch_of(store, cfg, pairs="shared")


def gradients(module, batch, losses=None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    found = (losses or module.losses)(batch)
    found["total"].backward()
    return {n: v.detach() for n, v in found.items()}, {n: p.grad for n, p in module.named_parameters()}


@pytest.mark.parametrize(("baseline", "arm"), ARMS)
def test_recomputed_blocks_change_nothing(baseline, arm, store):
    """Bit-equal losses and gradients with dropout on; the blocks that are given no cache are computed twice, at least
    those of the trained vision tower."""
    module, batch = built(baseline, arm, store)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.1
    losses, expected = gradients(module, batch)
    again, _ = built(baseline, arm, store)
    for part in again.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.1
    calls: dict[int, int] = {}

    def counted(forward):
        def call(*inputs, **options):
            calls[id(forward)] = calls.get(id(forward), 0) + 1
            return forward(*inputs, **options)

        return call

    for block in blocks(again):
        block.forward = counted(block.forward)
    wrapped = recompute_blocks(again)
    found, got = gradients(again, batch)
    cached = "string" in arm or baseline == "pi0"
    assert sum(count == 2 for count in calls.values()) >= (1 if cached else wrapped) > 0
    assert found.keys() == losses.keys() and all(torch.equal(found[n], losses[n]) for n in losses)
    for name, gradient in expected.items():
        assert (gradient is None and got[name] is None) or torch.equal(gradient, got[name]), name


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("baseline", "arm"), ARMS)
@pytest.mark.parametrize("recompute", [False, True])
def test_sharded_modules_give_the_losses_and_gradients_of_whole_ones(baseline, arm, recompute, store, alone):
    module, batch = built(baseline, arm, store)
    losses, expected = gradients(module, batch)
    sharded, _ = built(baseline, arm, store)
    if recompute:
        recompute_blocks(sharded)
    shard(sharded, alone)
    register_fsdp_forward_method(sharded, "losses")
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    found, got = gradients(sharded, batch, sharded.losses)
    for name, value in losses.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)
    for name, gradient in expected.items():
        assert (gradient is None) == (got[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(got[name].full_tensor(), gradient, rtol=1e-4, atol=1e-6, msg=name)
    whole = full_weights(sharded.policy)
    assert whole.keys() == module.policy.state_dict().keys()
    for name, value in module.policy.state_dict().items():
        if not any(part in name for part in ("running_", "num_batches")):
            assert torch.equal(whole[name], value), name


@pytest.mark.parametrize("baseline", BASELINES)
def test_sharded_modules_under_autocast_give_what_whole_ones_do(baseline, store, alone):
    """trainer.precision=bf16-mixed; what differs is the order of bf16 sums."""
    module, batch = built(baseline, "ptr", store)
    sharded, _ = built(baseline, "ptr", store)
    shard(sharded, alone)
    register_fsdp_forward_method(sharded, "losses")
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = gradients(module, batch)
        found, got = gradients(sharded, batch)
    torch.testing.assert_close(found["total"].float(), losses["total"].float(), rtol=1e-2, atol=0)
    assert all(g is None or (g.dtype == torch.float32 and g.full_tensor().isfinite().all()) for g in got.values())


@pytest.mark.parametrize("cfg", [OptimConfig(lr=1.0, ema=0.9), OptimConfig(lr=1.0, ema_power=2 / 3)])
def test_the_sharded_average_is_the_formula(cfg, alone):
    """ema: d·a + (1 − d)·w after a first copy; ema_power: d = 1 − (1 + n)^−p after n updates (fact sheet §4.5)."""
    module = torch.nn.Linear(3, 2)
    shard(module, alone)
    average, expected = ShardedAverage(module, cfg), None
    for update in range(4):
        with torch.no_grad():
            module.weight += torch.randn(())
        average.update(module)
        now = module.weight.full_tensor().double()
        decay = cfg.ema or 1 - (1 + update) ** -cfg.ema_power
        expected = now.clone() if expected is None else decay * expected + (1 - decay) * now
    average.copy_to(module)
    torch.testing.assert_close(module.weight.full_tensor().double(), expected, rtol=1e-6, atol=1e-6)


def test_the_index_of_a_sharded_checkpoint_executes_nothing(alone, tmp_path):
    """Of a real one every name is known; one that would run code is refused before torch reads it."""
    module = torch.nn.Linear(3, 2)
    shard(module, alone)
    checkpoint.save({"weights": module.state_dict()}, checkpoint_id=tmp_path / "state")
    index, canary = tmp_path / "state" / ".metadata", tmp_path / "canary"
    require_plain_index(index)

    class Payload:
        def __reduce__(self):
            return open, (str(canary), "w")

    for content in (pickle.dumps(Payload()), index.read_bytes()[:100], b""):
        index.write_bytes(content)
        with pytest.raises(UserError, match="is not the index of a sharded checkpoint"):
            require_plain_index(index)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload())).close()
    assert canary.exists(), "the payload would have worked"
