"""Names of files in data sets and archives lead nowhere but below their own folder."""

import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from lerobot_files import hub_like
from rlds_files import BRIDGE, made_steps, read_all, write_rlds
from test_cifar10 import batches
from test_libero_data import write_demos
from vl_files import write_llava
from vqa_files import SETS, write_sets

from data.cifar10 import TEST, read_cifar10
from data.lerobot import Reading, read_lerobot
from data.libero import read_libero
from data.vision_language import open_set
from data.vqa import read_questions
from vla.errors import UserError


def set_image(name: str, folder: Path, outside: str):
    file, images = write_sets(folder)[name]
    target = file / "coco_pope_random.json" if name == "pope" else file
    key = {"textvqa": "image_id", "gqa": "imageId"}.get(name, "image")
    target.write_text(re.sub(f'"{key}": "[^"]*"', f'"{key}": "{outside}"', target.read_text(), count=1))
    return lambda: read_questions(name, file, images)


def llava_image(folder: Path, outside: str):
    chat, images = write_llava(folder)
    rows = json.loads(chat.read_text())
    rows[0]["image"] = outside
    chat.write_text(json.dumps(rows))
    return lambda: open_set(chat, images).image(0, 8)


def lerobot_path(key: str):
    def read(folder: Path, outside: str):
        hub_like(folder / "set")
        info = folder / "set/meta/info.json"
        info.write_text(json.dumps(json.loads(info.read_text()) | {key: outside}))
        return lambda: list(read_lerobot(folder / "set", ("static",), Reading("libero", "rotate180")))

    return read


def lerobot_film(folder: Path, outside: str):
    hub_like(folder / "set")
    info, rows = folder / "set/meta/info.json", folder / "set/meta/episodes/chunk-000/file-000.parquet"
    content = json.loads(info.read_text()) | {"video_path": outside}
    name = "observation.images.image"
    content["features"][name] |= {"dtype": "video"}
    info.write_text(json.dumps(content))
    places = {f"videos/{name}/{key}": 0 for key in ("chunk_index", "file_index", "from_timestamp")}
    pd.read_parquet(rows).assign(**places).to_parquet(rows)
    return lambda: list(read_lerobot(folder / "set", ("static",), Reading("libero", "rotate180")))


def lerobot_image(folder: Path, outside: str):
    hub_like(folder / "set", bytes_inside=False)
    file = folder / "set/data/chunk-000/file-000.parquet"
    table = pd.read_parquet(file)
    table.at[0, "observation.images.image"] = {"bytes": None, "path": outside}
    table.to_parquet(file)
    return lambda: list(read_lerobot(folder / "set", ("static",), Reading("libero", "rotate180")))


def rlds_name(folder: Path, outside: str):
    place = folder / "bridge_dataset/1.0.0"
    write_rlds(place, "bridge_dataset", BRIDGE, [made_steps(BRIDGE, 5, np.random.default_rng(0))])
    content = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(content | {"name": outside}))
    return lambda: read_all(place)


LEADING_OUT = {name: lambda *given, name=name: set_image(name, *given) for name in SETS} | {
    "LLaVA image": llava_image,
    "LeRobot data_path": lerobot_path("data_path"),
    "LeRobot video_path": lerobot_film,
    "LeRobot image": lerobot_image,
    "RLDS name": rlds_name,
}


@pytest.mark.parametrize("entry", LEADING_OUT)
@pytest.mark.parametrize("outside", ["../../secret", "/etc/passwd", "a/../../b"])
def test_a_name_that_leads_out_of_its_folder_is_refused(entry, outside, tmp_path):
    read = LEADING_OUT[entry](tmp_path, outside)
    with pytest.raises(UserError, match=r"names a file outside .*" + re.escape(outside)) as caught:
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["{chunk_index.nothing}", "{0}", "{nothing}", "{file_index:x"])
def test_a_template_that_is_none_is_refused(template, tmp_path):
    with pytest.raises(UserError, match=r"info\.json: .* names no file"):
        lerobot_path("data_path")(tmp_path, template)()


def test_nothing_of_an_archive_is_written_and_links_in_it_are_not_followed(tmp_path):
    (tmp_path / "home").mkdir()
    file = tmp_path / "home/cifar-10-python.tar.gz"
    secret = tmp_path / "secret"
    secret.write_bytes(pickle.dumps({b"labels": [], b"data": np.zeros((0, 3072), np.uint8)}))
    with tarfile.open(file, "w:gz") as archive:
        for name, value in batches().items():
            info = tarfile.TarInfo(f"../../{name}")
            if name == TEST[0]:
                info.type, info.linkname = tarfile.SYMTYPE, str(secret)
                archive.addfile(info)
                continue
            content = pickle.dumps(value, protocol=2)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match="lacks test_batch"):
        read_cifar10(file)
    assert {path.name for path in tmp_path.iterdir()} == {"home", "secret"} and len(list((file.parent).iterdir())) == 1


@pytest.mark.parametrize("kind", ["external link", "external storage", "virtual"])
def test_hdf5_that_reads_other_files_is_refused(kind, tmp_path):
    path, secret = write_demos(tmp_path / "task_demo.hdf5"), tmp_path / "secret.hdf5"
    with h5py.File(path, "a") as file:
        key = "data/demo_1/obs/ee_states"
        values = file[key][()]
        with h5py.File(secret, "w") as other:
            other["x"] = values
        del file[key]
        if kind == "external link":
            file[key] = h5py.ExternalLink(str(secret), "x")
        elif kind == "external storage":
            made = file.create_dataset(key, values.shape, values.dtype, external=[(str(secret), 0, values.nbytes)])
            assert made.external
        else:
            layout = h5py.VirtualLayout(values.shape, values.dtype)
            layout[:] = h5py.VirtualSource(str(secret), "x", values.shape)
            file.create_virtual_dataset(key, layout)
        assert file[key].shape == values.shape
    with pytest.raises(UserError, match=r"demo_1: obs/ee_states lies in another file"):
        list(read_libero(path, ("static",)))


def test_links_below_the_folder_are_followed(tmp_path):
    """The hub's cache has every file as a link to another folder; an archive's are never made (above)."""
    chat, images = write_llava(tmp_path)
    (tmp_path / "blobs").mkdir()
    (images / "0.png").rename(tmp_path / "blobs/abc")
    (images / "0.png").symlink_to("../blobs/abc")
    assert open_set(chat, images).image(0, 8).shape == (8, 8, 3)
