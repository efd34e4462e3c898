"""How much of natural images a policy's vision encoder still tells apart: CIFAR-10 (GenVLA §IV, Fig. 4; §8.7).

Frozen visual tokens of the tap, averaged over positions, of images enlarged to the policy's size (bicubic); a linear
probe on them, its accuracy on test images with a Wilson interval, and their t-SNE as a picture. GenVLA says neither
pooling nor resolution nor solver. Under a dual encoder the tap reads the trainable tower.

Pooled features lie in $VLA_DATA/features/<weights>-<tap>-cifar10/, float32 (n, C), named by the images' hash.
Written into the results folder: cifar10_probe.json; cifar10_probe.npz (which test images, which of them right; those
shown, their points and labels); tsne.png.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.cifar10 import balanced, read_cifar10
from vla.analysis.encoder import mean_features
from vla.analysis.linear_probe import fit_linear_probe
from vla.analysis.plots import save
from vla.analysis.statistics import Estimate, rate_interval
from vla.analysis.tsne import tsne
from vla.evaluation_configs import Cifar10Config
from vla.files import write_atomic
from vla.policy import Policy

SUMMARY, ARRAYS = "cifar10_probe.json", "cifar10_probe.npz"


def cifar10_probe(
    cfg: Cifar10Config, policy: Policy, weights: str, header: dict[str, Any], out: Path, device: str, keep: bool
) -> dict:
    """
    Args:
        weights: the checkpoint's hash, which with the tap and the images names the cached features.
        keep: cache them.

    Returns:
        header, and accuracy (value, low, high, n), train_accuracy, per_class {name: accuracy}, l2 (the chosen penalty),
        kl (what t-SNE left, nats); read back where it was measured before.
    """
    if (out / SUMMARY).exists() and (out / "tsne.png").exists():
        return json.loads((out / SUMMARY).read_text())
    cifar = read_cifar10(Path(cfg.path))
    train = balanced(cifar.train_labels, cfg.train, cfg.seed)
    test = balanced(cifar.test_labels, cfg.test, cfg.seed)
    folder = features_folder(weights, policy.tap) if keep else None
    x, y = (
        torch.from_numpy(pooled_features(policy, images, device, cfg.batch_size, folder)).to(device)
        for images in (cifar.train_images[train], cifar.test_images[test])
    )
    train_labels, labels = cifar.train_labels[train], cifar.test_labels[test]
    on_device = torch.from_numpy(train_labels).to(device)
    probe = fit_linear_probe(x, on_device, len(cifar.names), cfg.l2, cfg.seed)
    right = (probe(y).argmax(1).cpu().numpy()) == labels
    estimate = Estimate(float(right.mean()), *rate_interval(int(right.sum()), len(right)), n=len(right))
    shown = balanced(labels, min(cfg.tsne, len(labels)), cfg.seed)
    points, divergence = tsne(((y - probe.mean) / probe.std)[shown], cfg.perplexity)
    result = header | {
        "accuracy": asdict(estimate),
        "train_accuracy": float((probe(x).argmax(1) == on_device).float().mean()),
        "per_class": {name: float(right[labels == c].mean()) for c, name in enumerate(cifar.names) if c in labels},
        "l2": probe.l2,
        "kl": divergence,
    }
    out.mkdir(parents=True, exist_ok=True)
    points = points.cpu().numpy()
    np.savez(out / ARRAYS, test=test, right=right, shown=test[shown], points=points, labels=labels[shown])
    value, low, high = (f"{100 * x:.1f}" for x in (estimate.value, estimate.low, estimate.high))
    title = f"{header['arm']}: linear probe {value} % [{low}, {high}]"
    plot_tsne(points, labels[shown], cifar.names, title, out / "tsne.png")
    write_atomic(out / SUMMARY, json.dumps(result, indent=2))
    return result


def features_folder(weights: str, tap: str) -> Path:
    root = Path(os.environ.get("VLA_DATA", "datasets")) / "features"
    return root / f"{weights[:12]}-{tap.replace(':', '')}-cifar10"


def pooled_features(
    policy: Policy, images: np.ndarray, device: str, batch_size: int, folder: Path | None = None
) -> np.ndarray:
    """float32 (n, C) of uint8 images (n, h, w, 3); from `folder` where they are, else encoded and written there."""
    file = folder / f"{hashlib.sha256(images.tobytes()).hexdigest()[:16]}.npy" if folder else None
    if file and file.exists():
        return np.load(file)
    one = copy.copy(policy)  # shares the weights; a second camera sees nothing here
    one.cameras = policy.cameras[:1]
    features = mean_features(one, _Images(images), device, batch_size)
    if file:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{file.name}.{os.getpid()}.npy"
        np.save(partial, features)
        os.replace(partial, file)
    return features


class _Images:
    """Pictures as a frame store of one camera, as far as `mean_features` asks."""

    def __init__(self, images: np.ndarray):
        self.images, self.samples = images, np.arange(len(images))

    def frames(self, camera: str, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.images[rows])


def plot_tsne(points: np.ndarray, labels: np.ndarray, names: list[str], title: str, out: Path) -> None:
    """Write a PNG: a dot per image, a colour per class, each class named in the legend and above its median point."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, name in enumerate(names):
        mine = points[labels == label]
        if len(mine):
            axes.scatter(*mine.T, s=9, color=colormaps["tab10"](label), label=name, linewidths=0, alpha=0.8)
            middle = np.median(mine, axis=0)
            axes.annotate(name, middle, (0, 5), textcoords="offset points", ha="center", fontsize=8, weight="bold")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"{title}\nt-SNE of {len(points):,} CIFAR-10 test images (axes have no unit)", fontsize=10)
    axes.legend(frameon=False, fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, out)
