"""CIFAR-10 as published: cifar-10-python.tar.gz or the folder cifar-10-batches-py that it holds; nothing is unpacked.

Six files of 10,000 images each are pickled dicts written by Python 2: b"data" uint8 (10000, 3072), the red plane first,
row by row, and b"labels", a list of 0 … 9. They are read by an unpickler that builds numpy arrays and plain containers
and nothing else.

    cifar = read_cifar10(Path("cifar-10-python.tar.gz"))
    cifar.train_images[0], cifar.names[cifar.train_labels[0]]
"""

from __future__ import annotations

import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import UserError

TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
TEST, META = ["test_batch"], "batches.meta"
ROWS, CLASSES = 10_000, 10
FOLDER = "cifar-10-batches-py"
REMEDY = "download cifar-10-python.tar.gz again"


@dataclass(frozen=True)
class Cifar10:
    """Images uint8 (n, 32, 32, 3), labels int64 (n,) in 0 … 9, and the ten classes' names."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    names: list[str]


def read_cifar10(path: Path) -> Cifar10:
    """All 50,000 training and 10,000 test images.

    Raises:
        UserError: no such file, a file of it missing, damaged, of another size, or holding anything but arrays.
    """
    files = _from_folder(path) if path.is_dir() else _from_archive(path)
    meta = _unpickle(files[META], f"{path}: {META}")
    names = [str(name, "utf-8") for name in meta.get(b"label_names", []) if isinstance(name, bytes)]
    if len(names) != CLASSES:
        raise UserError(f"{path}: {META} names {len(names)} classes, not {CLASSES}; {REMEDY}")
    train, test = (_join([_batch(files[name], f"{path}: {name}") for name in group]) for group in (TRAIN, TEST))
    return Cifar10(*train, *test, names)


def balanced(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """int64 (count,): indices drawn at random, as many of each class (up to one), ascending.

    A smaller draw is part of a larger one with the same seed.

    Raises:
        UserError: more than there are, or none.
    """
    if not 0 < count <= len(labels):
        raise UserError(
            f"{count} images of CIFAR-10 were asked for, there are 1 … {len(labels)}; set evaluation.cifar10"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        mine = order[labels[order] == label]
        rank[mine] = np.arange(len(mine))
    return np.sort(order[np.argsort(rank[order], kind="stable")][:count])


def _from_folder(folder: Path) -> dict[str, bytes]:
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    try:
        return {name: (folder / name).read_bytes() for name in (*TRAIN, *TEST, META)}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); {REMEDY}") from error


def _from_archive(path: Path) -> dict[str, bytes]:
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if member.isfile() and name in (*TRAIN, *TEST, META):
                    found[name] = archive.extractfile(member).read()
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; put cifar-10-python.tar.gz there or set evaluation.cifar10.path"
        ) from None
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{path} is no CIFAR-10 archive, or a damaged one ({error}); {REMEDY}") from error
    if missing := [name for name in (*TRAIN, *TEST, META) if name not in found]:
        raise UserError(f"{path} lacks {missing[0]}; {REMEDY}")
    return found


def _batch(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(content, where)
    data, labels = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (ROWS, 3 * 32 * 32):
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError(f"{where} holds {found} as data, not uint8 ({ROWS}, 3072); {REMEDY}")
    known = isinstance(labels, list) and all(type(label) is int and 0 <= label < CLASSES for label in labels)
    if not known or len(labels) != ROWS:
        raise UserError(f"{where} does not hold {ROWS} labels of 0 … {CLASSES - 1}; {REMEDY}")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)


def _join(batches: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


_SAFE = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not an array")
        return _SAFE[module, name]


def _unpickle(content: bytes, where: str) -> dict:
    try:
        found = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except (ValueError, EOFError, pickle.UnpicklingError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{where} cannot be read ({error}); {REMEDY}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} holds {type(found).__name__}, not a dict; {REMEDY}")
    return found
