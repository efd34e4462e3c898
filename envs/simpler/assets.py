"""The original simulator's asset folder, and which of its large files are not those of its repository.

ManiSkill2_real2sim keeps scenes and objects in its data folder; MS2_REAL2SIM_ASSET_DIR names another one. Its largest
files are easily lost (mirrors leave them out) and then stood in for, which changes what is seen and a little of what
is touched. LARGE tells such a stand-in by the hash that git gives the file at commit ef7a4d4f; results with one must
say so (facts simpler §3).
"""

from __future__ import annotations

import functools
import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

from envs.simpler.protocol import Cell
from vla.errors import UserError

LARGE = {
    "hab2_bench_assets/stages/bridge_table_1_v1.glb": "0eb8c869fc5503c834e20efc45fe2dedb5a599ce",
    "hab2_bench_assets/stages/bridge_table_1_v2.glb": "893b8a2f17f4b8acd1aa496433f8708d4b3cdb3b",
    "hab2_bench_assets/stages/google_pick_coke_can_1_v4.glb": "002d9a550666a2902ef079301387ea08053b2bf9",
    "hab2_bench_assets/stages/google_pick_coke_can_1_v4_alt_background.glb": "ca7763842982d9e9516a259367238594ba4ec159",
    "hab2_bench_assets/stages/google_pick_coke_can_1_v4_alt_background_2.glb": (
        "29867b7d87a49ea799147a35c4dea1cf3c778fcf"
    ),
    "hab2_bench_assets/stages/Baked_sc1_staging_objaverse_cabinet1_h870.glb": (
        "a7be88852f799a5b8da7e789addf3aeaaf27d936"
    ),
    "hab2_bench_assets/stages/Baked_sc1_staging_objaverse_cabinet2_h870.glb": (
        "52a8d522c1d302682f1cc2ae3ddb4f348f3bcb74"
    ),
    "hab2_bench_assets/stages/modern_bedroom_no_roof.glb": "83a08b80d95675216290093f4792df6aad832729",
    "hab2_bench_assets/stages/modern_office_no_roof.glb": "8d7deb7f9aceebb8e7fe6c5625c1d819c99737ab",
    "custom/models/eggplant/textured.dae": "ad841cda35d5bfab937b82609547816290e18d1a",
    "custom/models/blue_plastic_bottle/textured.dae": "8084e739b16f50986bfec6b3cba9dcdb3770d043",
    "custom/models/baked_opened_redbull_can/textured.dae": "c34602503ef5111b4b08806a4f96a4541413fad7",
    "custom/models/opened_redbull_can/textured.dae": "7463c686c4df82edce2a028873dfcf63a28ba4e6",
}
_MODELS = {
    "PutEggplantInBasketScene-v0": ("eggplant",),
    "MoveNearGoogleBakedTexInScene-v0": ("blue_plastic_bottle", "baked_opened_redbull_can"),
    "MoveNearGoogleInScene-v0": ("blue_plastic_bottle", "opened_redbull_can"),
}
"""Environment -> its models among LARGE."""


def asset_folder() -> Path:
    """The folder with `custom`, `real_inpainting` and `hab2_bench_assets`, as ManiSkill2_real2sim looks for it.

    Raises:
        UserError: the package is not installed in this interpreter, or no such folder.
    """
    package = find_spec("mani_skill2_real2sim")
    if package is None or find_spec("simpler_env") is None:
        raise UserError(
            "SimplerEnv is not installed in the interpreter of benchmark.python; run `make simpler-original`"
        )
    root = Path(os.environ.get("MS2_REAL2SIM_ASSET_DIR") or Path(package.origin).parents[1] / "data")
    if not (root / "custom/info_pick_custom_v0.json").exists():
        raise UserError(f"{root} is not ManiSkill2_real2sim's data folder; set MS2_REAL2SIM_ASSET_DIR to it")
    return root


def check_assets(root: Path, cell: Cell) -> None:
    """UserError unless stage, photo and large models of `cell` are at `root`, be it as stand-ins."""
    needed = [path for path in large_files(cell) if path.endswith(".glb")]
    needed += [cell.build["rgb_overlay_path"]] if cell.build.get("rgb_overlay_path") else []
    missing = [path for path in needed if not (root / path).exists()]
    missing += [path for path in large_files(cell) if not any((root / path).parent.glob(f"{Path(path).stem}.*"))]
    if missing:
        raise UserError(
            f"{root} lacks {missing[0]}, which {cell.task} ({cell.variant}) needs; set MS2_REAL2SIM_ASSET_DIR to "
            "ManiSkill2_real2sim's whole data folder"
        )


def unmade_mesh(root: Path, cell: Cell) -> Path | None:
    """Where sapien 2 will keep the mesh that the stage of `cell` is touched by; None where it has it, or cannot.

    It makes the file when it first loads a stage and reads it from then on, with other last digits: in the episode that
    made it objects would come to rest up to 5e-5 elsewhere.
    """
    stage = root / "hab2_bench_assets/stages" / f"{cell.build['scene_name']}.glb"
    mesh = stage.with_name(f"{stage.name}.nonconvex.stl")
    return mesh if stage.exists() and not mesh.exists() and os.access(stage.parent, os.W_OK) else None


def stand_ins(root: Path, cells: list[Cell]) -> list[str]:
    """Names of the stages and models that `cells` use and that are not the repository's own files; sorted."""
    used = {path for cell in cells for path in large_files(cell)}
    other = {path for path in used if git_hash(root / path) != LARGE[path]}
    return sorted(Path(path).stem if path.endswith(".glb") else Path(path).parent.name for path in other)


def large_files(cell: Cell) -> list[str]:
    """Those of LARGE that `cell` draws."""
    stage = f"hab2_bench_assets/stages/{cell.build['scene_name']}.glb"
    models = [f"custom/models/{model}/textured.dae" for model in _MODELS.get(cell.env_id, ())]
    return [path for path in (stage, *models) if path in LARGE]


@functools.lru_cache
def git_hash(path: Path) -> str:
    """The name git gives the file's content; "" where there is no file."""
    if not path.exists():
        return ""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
