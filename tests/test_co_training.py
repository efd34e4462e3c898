"""D, S and C with and without inverse dynamics, and the loss of questions beside that of actions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.instructions import Rewording, variants_of
from data.vision_language import CoTrainingBatches, Mixture, open_set
from tests.conftest import train_config
from tests.test_contract import batch_of, build, observation_of
from tests.vl_files import write_llava, write_onevision
from train import robot_samples, total_steps, train
from vla.checkpoint import load_policy
from vla.cli import compose_config
from vla.co_training import CoTraining
from vla.config import AugmentConfig, CoTrainConfig
from vla.errors import UserError
from vla.string_policy import speaker

COMBINATIONS = ["vanilla", "dual", "string", "cotrain", "dual_string", "dual_cotrain", "string_cotrain", "plus"]
ARMS = {"vanilla": "vanilla", "ptr": "ptr"}


@pytest.fixture(scope="module")
def vl(tmp_path_factory) -> tuple[str, ...]:
    """Overrides that name two small sets."""
    root = tmp_path_factory.mktemp("vl")
    chat, images = write_llava(root / "llava")
    folder = write_onevision(root / "onevision")
    return (
        f"cotrain.sets.llava_cc3m.annotations={chat}",
        f"cotrain.sets.llava_cc3m.images={images}",
        f"cotrain.sets.onevision.annotations={folder}",
        "cotrain.use=[llava_cc3m,onevision]",
    )


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("baseline", ["openvla", "pi0"])
def test_every_combination_trains_exports_and_acts(baseline, combination, inverse, vl, store, tmp_path):
    arm = ("ptr" if combination == "vanilla" else f"{combination}_ptr") if inverse else combination
    cfg = train_config(store.path, tmp_path, f"baseline={baseline}", f"ablation={arm}", "chunk=1", "max_steps=2", *vl)
    assert cfg.arm == arm and cfg.inverse_dynamics.enabled == inverse
    assert cfg.policy.dual == ("dual" in arm or "plus" in arm)
    policy, config = load_policy(train(cfg))
    assert config["about"]["steps"] == 2 and policy.dual == cfg.policy.dual
    actions = policy.predict(observation_of(batch_of(store, cfg, pairs=None)))
    assert actions.shape == (4, 1, 7) and actions.isfinite().all()
    assert not any("inverse" in name for name in policy.state_dict())


@pytest.mark.parametrize(("baseline", "arm"), [*itertools.product(["openvla", "pi0"], ["vanilla", "ptr"])])
def test_with_everything_off_a_run_is_the_plain_one(baseline, arm, store, tmp_path):
    """What the keys of D, S and C say does not matter while they are off: same name, same weights, bit for bit."""
    off = ("policy.dual=false", "policy.actions=native", "policy.string.form=fixed", "cotrain.share=0.3", "max_steps=2")
    of = (f"baseline={baseline}", f"ablation={arm}")
    plain = train(train_config(store.path, tmp_path / "a", *of, "max_steps=2"))
    other = train(train_config(store.path, tmp_path / "b", *of, *off))
    assert (plain / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_resumed_run_goes_on_in_both_streams(vl, store, tmp_path):
    of = ("baseline=openvla", "ablation=string_cotrain", "chunk=1", *vl)
    whole = train(train_config(store.path, tmp_path / "whole", *of, "max_steps=4"))
    again = (*of, "max_steps=4", "trainer.checkpoint_every=2")
    half = train_config(store.path, tmp_path / "halves", *again)
    import vla.training as training

    real, made = training.make_trainer, []

    def stopped(*arguments):
        trainer = real(*arguments)
        if not made:
            trainer.fit_loop.epoch_loop.max_steps = 2
        made.append(trainer)
        return trainer

    training.make_trainer = stopped
    try:
        train(half)
        policy = next((tmp_path / "halves").glob("*/policy"))
        import shutil

        shutil.rmtree(policy)
        resumed = train(train_config(store.path, tmp_path / "halves", *again, "resume=auto"))
    finally:
        training.make_trainer = real
    assert len(made) == 2
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def questions(store, tmp_path, baseline: str, *overrides: str):
    module, cfg = build(baseline, "vanilla", store, "policy.speaks=true", "chunk=1", *overrides)
    mixture = Mixture([open_set(*write_llava(tmp_path / "llava"))], cfg.policy.image_size, seed=0)
    return module, cfg, mixture.batch(np.arange(4))


def test_the_text_loss_is_that_of_one_pass(store, tmp_path):
    """Against Llama on the whole text, row by row: the answer and EOS, nothing of the question."""
    module, _, batch = questions(store, tmp_path, "openvla")
    policy, tokenizer = module.policy, module.policy.tokenizer
    with torch.no_grad():
        total, count = CoTraining(policy, CoTrainConfig()).loss(policy, batch)
        tokens = policy.encode_images({"static": batch["images"]})["static"]
        expected, said = 0.0, 0
        for row, (question, answer) in enumerate(zip(batch["question"], batch["answer"], strict=True)):
            prompt = tokenizer.encode(f"In: <VLM_PROMPT> {question}\nOut:", add_special_tokens=False)
            ids = [tokenizer.bos_token_id, *prompt, *tokenizer.encode(f" {answer}"), tokenizer.eos_token_id]
            text = policy.language_model.model.embed_tokens(torch.tensor([ids]))
            embeds = torch.cat([text[:, :1], tokens.embeds[row][None], text[:, 1:]], dim=1)
            labels = torch.tensor(ids[1 + len(prompt) :])
            logits = policy.language_model(inputs_embeds=embeds).logits[0, -len(labels) - 1 : -1]
            expected, said = expected + F.cross_entropy(logits, labels, reduction="sum"), said + len(labels)
    assert count == said
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_the_released_label_mask_counts_bytes_as_tokens(store, tmp_path):
    module, _, batch = questions(store, tmp_path, "openvla")
    model, space = speaker(module.policy)
    released = CoTraining(module.policy, CoTrainConfig(released_label_mask=True))
    plain = CoTraining(module.policy, CoTrainConfig())
    answer = "place the bowl on the plate"  # of whole-word tokens: fewer tokens than bytes
    prompt, said, counted = released.ids(model, space, batch["question"][0], answer)
    assert len(said) == sum(counted) == len(answer.encode()) + 1
    asked, answered, _ = plain.ids(model, space, batch["question"][0], answer)
    assert prompt + said == asked + answered and len(answered) < len(said)


@pytest.mark.parametrize(("baseline", "actions"), [("openvla", "native"), ("openvla", "string"), ("pi0", "string")])
def test_token_losses_are_one_mean(baseline, actions, store, tmp_path):
    module, cfg, vl = questions(store, tmp_path, baseline, f"policy.actions={actions}", "normalization=q99")
    module.cotrain, module.augment = CoTraining(module.policy, CoTrainConfig()), AugmentConfig()
    batch = batch_of(store, cfg, pairs=None) | {"vl": vl}
    module.eval()
    with torch.no_grad():
        found = module.losses(batch)
        total, count = module.cotrain.loss(module.policy, vl)
        frames = module.policy.prepare(batch["images"])
        own = module.policy.loss(batch, module.policy.encode_images(frames))
    expected = (own["loss"] * own["tokens"] + total) / (own["tokens"] + count)
    torch.testing.assert_close(found["total"], expected, rtol=1e-4, atol=1e-5)


def test_beside_a_flow_the_text_loss_is_weighted(store, tmp_path):
    module, cfg, vl = questions(store, tmp_path, "pi0")
    module.cotrain = CoTraining(module.policy, CoTrainConfig(weight=0.25))
    torch.manual_seed(0)
    losses = module.losses(batch_of(store, cfg, pairs=None) | {"vl": vl})
    torch.testing.assert_close(losses["total"], losses["loss"] + 0.25 * losses["text_loss"])


def test_long_examples_are_left_out(store, tmp_path):
    module, _, batch = questions(store, tmp_path, "openvla")
    batch["answer"][1] = "word " * 400
    cut = CoTraining(module.policy, CoTrainConfig(max_tokens=300))
    without = {key: [v for i, v in enumerate(value) if i != 1] for key, value in batch.items() if key != "images"}
    without["images"] = batch["images"][[0, 2, 3]]
    with torch.no_grad():
        torch.testing.assert_close(cut.loss(module.policy, batch), cut.loss(module.policy, without))
        nothing = CoTraining(module.policy, CoTrainConfig(max_tokens=3)).loss(module.policy, batch)
    assert nothing == (0, 0)


def test_epochs_are_of_the_robot_data():
    """Of a batch of 48, 24 are questions: an epoch of 240 robot samples takes ten steps, not five."""
    cfg = compose_config("train", "baseline=openvla", "ablation=cotrain", "batch_size=48", "max_epochs=1")
    assert robot_samples(cfg) == 24 and total_steps(cfg, 240, robot_samples(cfg)) == 10
    plain = compose_config("train", "baseline=openvla", "batch_size=48", "max_epochs=1")
    assert robot_samples(plain) == 48 and total_steps(plain, 240, robot_samples(plain)) == 5


def test_bad_shares_and_sets_are_named(store, tmp_path, vl):
    def config(*words: str):
        return train_config(store.path, tmp_path, "baseline=openvla", "ablation=cotrain", *vl, *words)

    with pytest.raises(UserError, match=r"cotrain\.share=1\.0 of batch_size=4 leaves one kind of data out"):
        train(config("cotrain.share=1.0"))
    with pytest.raises(UserError, match=r"batch_size=4 gives 3 robot samples; with data\.pairs=shared"):
        train(config("cotrain.share=0.25"))
    with pytest.raises(UserError, match="does not exist; download it"):
        train(config("cotrain.sets.onevision.annotations=nowhere"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"cotrain\.use=\['llava', 'mine'\] is not known; choose among llava_cc3m"):
        train(config("cotrain.use=[llava,mine]"))
    module, _ = build("openvla", "vanilla", store)
    with pytest.raises(UserError, match=r"needs policy\.speaks=true \(ablation=cotrain sets both\)"):
        CoTraining(module.policy, CoTrainConfig())


def test_ranks_divide_the_stream():
    from data.sampler import Share, StatelessBatches

    def numbers(rank: int) -> list[list[int]]:
        batches = CoTrainingBatches(StatelessBatches(50, 8, 0, first_step=3, share=Share(rank, world=2)), 10)
        return [examples.tolist() for _, (_, examples) in zip(range(2), batches, strict=False)]

    assert numbers(0) + numbers(1) == [list(range(a, a + 5)) for a in (30, 40, 35, 45)]


def test_instructions_are_reworded_as_the_seed_says():
    rewording = Rewording("data/instruction_augmentation.yaml")
    told = ["pick coke can"] * 200 + ["fold the towel thrice over"]
    torch.manual_seed(0)
    first = rewording(told)
    torch.manual_seed(0)
    assert rewording(told) == first and first[-1] == told[-1]
    allowed = {"pick coke can", *variants_of("pick coke can", rewording.wordings)}
    assert set(first[:-1]) == allowed and len(allowed) >= 9
