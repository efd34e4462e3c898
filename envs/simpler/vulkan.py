"""A Vulkan device that SAPIEN can draw with: found, proven once per process tree, or one line on what to install.

SAPIEN needs lavapipe 25 on machines without a GPU; Debian 12's own, 22.3, lacks what it asks for (facts simpler §1).
scripts/setup_simpler.sh (`make simpler`) puts a private copy with its ICD file under the virtual environment, which is
used unless VK_ICD_FILENAMES or VK_DRIVER_FILES says otherwise. Must run before sapien is imported.

    python -m envs.simpler.vulkan        prints the device, or says what is missing and exits with 2
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from vla.errors import UserError

DEVICES = {"auto": ("cuda", "cpu"), "gpu": ("cuda",), "cpu": ("cpu",)}
"""Value of `renderer` -> SAPIEN's devices to try, in order."""
ICD = Path(sys.prefix) / "vulkan" / "lavapipe.json"

# Making a render system is where an unusable driver fails, in a second; a picture would cost ten more of compiling.
_PROBE = """
import sys, sapien
complaint = "no device"
for device in sys.argv[1:]:
    try:
        sapien.render.RenderSystem(sapien.Device(device))
    except RuntimeError as error:
        complaint = error
    else:
        print("device", device)
        sys.exit(0)
sys.exit(f"complaint {complaint}")
"""


def choose_driver() -> None:
    """Point Vulkan at the private lavapipe, where there is one and the user has not chosen."""
    if ICD.exists() and not {"VK_ICD_FILENAMES", "VK_DRIVER_FILES"} & os.environ.keys():
        os.environ["VK_ICD_FILENAMES"] = str(ICD)


def resolve_renderer(renderer: str) -> str:
    """ "gpu" or "cpu": the first of `renderer`'s devices that SAPIEN can draw with.

    Asked in a process of its own, because a broken driver may abort rather than raise.

    Raises:
        UserError: unknown renderer, sapien is not installed, or none of the devices draws.
    """
    if renderer not in DEVICES:
        raise UserError(f"benchmark.renderer={renderer} is not known; choose one of {', '.join(DEVICES)}")
    if find_spec("sapien") is None:
        raise UserError("sapien is not installed; run `make simpler`")
    choose_driver()
    proven = os.environ.get("VLA_VULKAN_PROVEN", "")
    if renderer == proven or (renderer == "auto" and proven):
        return proven
    try:
        probe = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _PROBE, *DEVICES[renderer]],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        lines = (probe.stdout + probe.stderr).splitlines()
    except subprocess.TimeoutExpired:
        lines = ["complaint no answer within 120 s"]
    for line in lines:
        if line.startswith("device "):
            os.environ["VLA_VULKAN_PROVEN"] = {"cuda": "gpu", "cpu": "cpu"}[line.split()[1]]
            return os.environ["VLA_VULKAN_PROVEN"]
    complaint = next((line[10:] for line in lines if line.startswith("complaint ")), f"exit status {probe.returncode}")
    raise UserError(
        f"SAPIEN finds no Vulkan device to draw with, renderer={renderer} ({complaint}): run `make simpler`, which "
        "installs a software driver (Mesa's lavapipe, 25.0 or later), or mend the GPU's"
    )


if __name__ == "__main__":
    try:
        print(resolve_renderer("auto"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
