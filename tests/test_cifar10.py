"""evaluation=cifar10 on small archives in the official format; the probe and t-SNE against plain formulas."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize

import data.cifar10
from data.cifar10 import balanced, read_cifar10
from evaluate import evaluate
from scripts.tables import main as tables
from tests.conftest import train_config
from train import train
from vla.analysis import cifar10
from vla.analysis.linear_probe import fit_linear_probe
from vla.analysis.statistics import rate_interval
from vla.analysis.tsne import joint_probabilities, kl_gradient, tsne
from vla.checkpoint import load_policy
from vla.cli import compose_config
from vla.errors import UserError

ROWS = 100
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """The published files hold 10,000 images each."""
    monkeypatch.setattr(data.cifar10, "ROWS", ROWS)


def batches(seed: int = 0, shuffled: bool = False) -> dict[str, dict]:
    """The seven files' contents; each class has a colour of its own, unless labels are `shuffled`."""
    rng = np.random.default_rng(seed)
    colours = np.array([[r, g, b] for r in (30, 120, 210) for g in (40, 220) for b in (60, 200)])[:10]
    content: dict[str, dict] = {}
    for name in (*data.cifar10.TRAIN, *data.cifar10.TEST):
        labels = np.arange(ROWS) % 10
        rng.shuffle(labels)
        planes = np.repeat(colours[labels], 32 * 32, axis=1) + rng.integers(-25, 26, (ROWS, 3072))
        if shuffled:
            rng.shuffle(labels)
        content[name] = {b"batch_label": b"some", b"labels": labels.tolist(), b"data": planes.astype(np.uint8)}
    names = [name.encode() for name in NAMES]
    return content | {"batches.meta": {b"num_cases_per_batch": ROWS, b"label_names": names, b"num_vis": 3072}}


def write_archive(path: Path, content: dict[str, dict]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, value in content.items():
            pickled = pickle.dumps(value, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(pickled)
            archive.addfile(info, io.BytesIO(pickled))
    return path


@pytest.fixture(scope="module")
def policy(store, tmp_path_factory) -> Path:
    return train(train_config(store.path, tmp_path_factory.mktemp("runs"), "ablation=untouched"))


def test_archive_and_folder_are_read_alike(tmp_path):
    content = batches()
    cifar = read_cifar10(write_archive(tmp_path / "cifar-10-python.tar.gz", content))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    for path in (tmp_path, tmp_path / "cifar-10-batches-py"):
        np.testing.assert_array_equal(read_cifar10(path).train_images, cifar.train_images)
    assert cifar.train_images.shape == (5 * ROWS, 32, 32, 3) and cifar.test_images.shape == (ROWS, 32, 32, 3)
    assert cifar.names == NAMES and cifar.train_labels[ROWS] == content["data_batch_2"][b"labels"][0]
    red, green, blue = np.split(content["data_batch_2"][b"data"][7], 3)  # the red plane first, row by row
    image = cifar.train_images[ROWS + 7]
    assert (image[3, 5] == [red[3 * 32 + 5], green[3 * 32 + 5], blue[3 * 32 + 5]]).all()


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def python2(value) -> bytes:
    """Pickle opcodes as Python 2 and numpy 1 wrote the published files: byte strings, the old module's name."""
    if isinstance(value, bytes):
        return b"T" + len(value).to_bytes(4, "little") + value
    if isinstance(value, int):
        return b"M" + value.to_bytes(2, "little")
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(item) for key, item in value.items()) + b"u"
    rows, columns = value.shape
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return (
        empty
        + b"(K\x01"
        + python2(rows)
        + python2(columns)
        + b"\x86"
        + kind
        + b"\x89"
        + python2(value.tobytes())
        + b"tb"
    )


def test_files_of_python_2_are_read(tmp_path):
    content = batches()
    for name, value in content.items():
        (tmp_path / name).write_bytes(b"\x80\x02" + python2(value) + b".")
    cifar, same = read_cifar10(tmp_path), read_cifar10(write_archive(tmp_path / "c.tar.gz", content))
    np.testing.assert_array_equal(cifar.test_labels, content["test_batch"][b"labels"])
    np.testing.assert_array_equal(cifar.train_images, same.train_images)
    assert cifar.names == NAMES


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("data_batch_3"), "lacks data_batch_3; download"),
        (
            lambda c: c["test_batch"].update({b"data": np.zeros((ROWS - 1, 3072), np.uint8)}),
            r"uint8 \(99, 3072\) as data",
        ),
        (lambda c: c["test_batch"].update({b"data": np.zeros((ROWS, 3072))}), r"holds float64 \(100, 3072\)"),
        (lambda c: c["test_batch"].pop(b"data"), "holds NoneType as data"),
        (lambda c: c["data_batch_1"][b"labels"].append(1), r"data_batch_1 does not hold 100 labels of 0 … 9"),
        (lambda c: c["data_batch_1"][b"labels"].__setitem__(0, 10), "does not hold 100 labels"),
        (lambda c: c["batches.meta"].update({b"label_names": []}), "batches.meta names 0 classes, not 10"),
        (
            lambda c: c["data_batch_5"].update({b"x": Evil()}),
            r"data_batch_5 cannot be read \(it names \w+\.system, which",
        ),
        (lambda c: c.update(test_batch=[1]), "test_batch holds list, not a dict"),
    ],
)
def test_damage_is_named_and_nothing_is_run(change, told, tmp_path):
    content = batches()
    change(content)
    with pytest.raises(UserError, match=told):
        read_cifar10(write_archive(tmp_path / "c.tar.gz", content))


def test_other_files_are_refused(tmp_path):
    whole = write_archive(tmp_path / "c.tar.gz", batches())
    whole.write_bytes(whole.read_bytes()[:20000])
    with pytest.raises(UserError, match=r"is no CIFAR-10 archive, or a damaged one"):
        read_cifar10(whole)
    with pytest.raises(UserError, match=r"absent\.tar\.gz does not exist"):
        read_cifar10(tmp_path / "absent.tar.gz")
    with pytest.raises(UserError, match=r"data_batch_1 cannot be read \(No such file"):
        read_cifar10(tmp_path)


def test_draws_are_balanced_and_nested():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 30))
    few, more = balanced(labels, 25, seed=3), balanced(labels, 120, seed=3)
    assert set(few) <= set(more) and (np.diff(more) > 0).all()
    assert set(np.bincount(labels[more])) == {12} and set(np.bincount(labels[few])) == {2, 3}
    assert set(balanced(labels, 120, seed=4)) != set(more)
    with pytest.raises(UserError, match="301 images of CIFAR-10 were asked for, there are 1 … 300"):
        balanced(labels, 301, seed=0)


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_probe_is_the_minimum_of_its_objective(l2):
    """Against scipy on the objective written out in numpy."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 6)) * [1, 2, 3, 4, 5, 0] + 7, rng.integers(0, 3, 120)
    z = (x - x.mean(0)) / np.where(x.std(0, ddof=1) > 0, x.std(0, ddof=1), 1)

    def objective(flat):
        weight, bias = flat[:18].reshape(3, 6), flat[18:]
        logits = z @ weight.T + bias
        return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(120), y]) + l2 / 2 * (weight**2).sum()

    best = minimize(objective, np.zeros(21), options={"gtol": 1e-8})
    fit = fit_linear_probe(torch.from_numpy(x).float(), torch.from_numpy(y), 3, [l2], seed=0)
    found = np.concatenate([fit.weight.numpy().ravel(), fit.bias.numpy()])
    assert objective(found) == pytest.approx(best.fun, abs=1e-6)
    np.testing.assert_allclose(fit.weight, best.x[:18].reshape(3, 6), atol=2e-3)
    logits = z @ fit.weight.numpy().T + fit.bias.numpy()
    np.testing.assert_allclose(fit(torch.from_numpy(x).float()), logits, atol=1e-4)


def test_penalty_is_chosen_on_held_out_rows():
    """Twenty rows, fifty features of which one says the label: without a penalty the probe believes the noise."""
    rng = np.random.default_rng(1)
    y = np.arange(60) % 2
    x = rng.normal(size=(60, 50))
    x[:, 0] += 3 * (2 * y - 1)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y)
    fit = fit_linear_probe(x, y, 2, [0.0, 0.1, 1e4], seed=0)
    assert fit.l2 == 0.1
    with pytest.raises(UserError, match=r"l2=\[-1\] must be one or several numbers from 0 on"):
        fit_linear_probe(x, y, 2, [-1], seed=0)


def test_tsne_has_the_papers_probabilities_and_gradient():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    p = joint_probabilities(x, perplexity=8).double().numpy()
    assert p.sum() == pytest.approx(1, abs=1e-4) and (p == p.T).all()
    distance = ((x[:, None] - x[None]) ** 2).sum(-1).double().numpy()
    rows = np.zeros((40, 40))
    for i in range(40):  # every row's width by plain search
        low, high = 1e-6, 1e3
        for _ in range(100):
            beta = np.sqrt(low * high)
            row = np.exp((np.sort(distance[i])[1] - distance[i]) * beta)
            row[i] = 0
            row /= row.sum()
            perplexity = np.exp(-(row[row > 0] * np.log(row[row > 0])).sum())
            low, high = (beta, high) if perplexity > 8 else (low, beta)
        rows[i] = row
    np.testing.assert_allclose(p, (rows + rows.T) / 80, atol=1e-6)

    y = torch.randn(40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    q = 1 / (1 + ((y[:, None] - y[None]) ** 2).sum(-1))
    q = q * (1 - torch.eye(40, dtype=torch.float64))
    fixed = torch.from_numpy((rows + rows.T) / 80)
    off = ~torch.eye(40, dtype=torch.bool)
    (fixed[off] * (fixed[off] / (q / q.sum())[off]).log()).sum().backward()
    np.testing.assert_allclose(kl_gradient(y.detach(), fixed), y.grad, atol=1e-8)


def test_tsne_keeps_clusters_together():
    labels = np.repeat(np.arange(5), 30)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(5, 20))[labels] * 5 + rng.normal(size=(150, 20))).float()
    points, left = tsne(x, perplexity=15, steps=500)
    distance = torch.cdist(points, points).fill_diagonal_(np.inf)
    assert (labels[distance.argmin(1).numpy()] == labels).mean() > 0.98 and 0 < left < 0.6
    assert torch.equal(tsne(x, perplexity=15, steps=500)[0], points)


def run(policy: Path, archive: Path, root: Path, *more: str) -> dict:
    small = ("evaluation.cifar10.train=300", "evaluation.cifar10.test=100", "evaluation.cifar10.tsne=60")
    where = (f"policy={policy}", f"results_root={root}", "evaluation=cifar10", f"evaluation.cifar10.path={archive}")
    return evaluate(compose_config("evaluate", *where, *small, *more))


def test_separable_classes_are_told_apart_and_shuffled_labels_are_not(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_DATA", str(tmp_path / "data"))
    found = run(policy, write_archive(tmp_path / "a.tar.gz", batches()), tmp_path / "results")
    assert found["accuracy"]["value"] > 0.98 and found["accuracy"]["n"] == 100 and found["tap"] == "pre_projector"
    right = round(100 * found["accuracy"]["value"])
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == rate_interval(right, 100)
    assert found["per_class"].keys() == set(NAMES) and np.mean(list(found["per_class"].values())) == pytest.approx(
        right / 100
    )
    (picture,) = (tmp_path / "results").rglob("tsne.png")
    with Image.open(picture) as image:
        assert image.size == (1200, 960) and len(image.convert("RGB").getcolors(2**24)) > 200
    with np.load(picture.with_name("cifar10_probe.npz")) as arrays:
        assert arrays["points"].shape == (60, 2) and arrays["right"].sum() == right
        assert set(arrays["shown"]) <= set(arrays["test"]) and set(np.bincount(arrays["labels"])) == {6}
    chance = run(policy, write_archive(tmp_path / "b.tar.gz", batches(shuffled=True)), tmp_path / "shuffled")
    assert chance["accuracy"]["value"] < 0.25


def test_features_are_encoded_once(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_DATA", str(tmp_path / "data"))
    archive = write_archive(tmp_path / "a.tar.gz", batches())
    first = run(policy, archive, tmp_path / "a")
    assert len(list((tmp_path / "data" / "features").rglob("*.npy"))) == 2
    monkeypatch.setattr(cifar10, "mean_features", lambda *arguments: pytest.fail("encoded again"))
    assert run(policy, archive, tmp_path / "b")["accuracy"] == first["accuracy"]
    monkeypatch.setattr(cifar10, "read_cifar10", lambda path: pytest.fail("measured again"))
    assert run(policy, archive, tmp_path / "b")["accuracy"] == first["accuracy"]


def test_features_are_the_mean_of_the_taps_tokens(store, tmp_path):
    two = train(train_config(store.path, tmp_path, "baseline=pi0", "ablation=untouched"))
    policy, _ = load_policy(two, tap="pre_projector")
    policy.cameras = ["static", "wrist"]
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    found = cifar10.pooled_features(policy, images, "cpu", batch_size=2)
    frames = torch.from_numpy(images).permute(0, 3, 1, 2)
    prepared = policy.prepare({"static": frames, "wrist": frames})
    with torch.no_grad():
        tokens = policy.encode_images(prepared)["static"].tap
    np.testing.assert_allclose(found, tokens.float().mean(1), atol=1e-5)


def test_tables_pair_the_arms_on_the_images(policy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLA_DATA", str(tmp_path / "data"))
    archive, results = write_archive(tmp_path / "a.tar.gz", batches()), tmp_path / "results"
    run(policy, archive, results, "arm=plus")
    run(policy, archive, results, "arm=vanilla")
    (file,) = results.rglob("vanilla*/cifar10_probe.npz")
    with np.load(file) as arrays:
        worse = dict(arrays)
    worse["right"] = worse["right"] & (np.arange(100) % 2 == 0)
    np.savez(file, **worse)
    capsys.readouterr()
    tables([str(results)])
    printed = capsys.readouterr().out
    assert "CIFAR-10 linear probe" in printed and "cifar10, pre_projector" in printed
    line = next(line for line in printed.splitlines() if line.startswith("plus vs vanilla, seed 0, cifar10"))
    assert "plus better (+0.50, p < 0.001, n = 100 images)" in line
    summary = file.with_name("cifar10_probe.json")
    summary.write_text(json.dumps({"arm": "vanilla"}))
    with pytest.raises(SystemExit):
        tables([str(results)])
    assert "cifar10_probe.json cannot be read or lacks" in capsys.readouterr().err
