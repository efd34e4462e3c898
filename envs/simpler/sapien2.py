"""A Vulkan device for sapien 2.2.2, the renderer of the original SimplerEnv, in the interpreter that has it.

sapien 2.2.2 asks every device for VK_KHR_external_semaphore_fd, which Debian's lavapipe 25.0.7 lacks and drawing on a
CPU never uses. `prepare` overwrites the name in the loaded library by that of an extension lavapipe has (asked for
twice, which is allowed), in this process only and only where every device is a CPU's (facts simpler §1).

    python -m envs.simpler.sapien2 auto     in that interpreter: prints gpu or cpu, or what is missing and exits with 2
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from envs.simpler.assets import asset_folder
from envs.simpler.vulkan import choose_driver
from vla.errors import UserError

RENDERERS = ("auto", "gpu", "cpu")
WANTED, INSTEAD = b"VK_KHR_external_semaphore_fd\0", b"VK_KHR_external_memory_fd\0\0\0\0"
_CPU = 4  # VK_PHYSICAL_DEVICE_TYPE_CPU
_REMEDY = "run `make simpler-original`"


def resolve_renderer(python: Path, renderer: str) -> str:
    """ "gpu" or "cpu": what the original SimplerEnv of the interpreter `python` draws with.

    Asked in a process of its own: it is another interpreter, and a broken driver may abort rather than raise.

    Raises:
        UserError: no such interpreter, SimplerEnv or its assets are not installed, or nothing draws.
    """
    if not python.exists():
        raise UserError(f"benchmark.python={python} does not exist; {_REMEDY}, or name the interpreter with SimplerEnv")
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [python, "-W", "ignore", "-m", "envs.simpler.sapien2", renderer]
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    except subprocess.TimeoutExpired:
        raise UserError(f"{python} does not answer within 120 s which renderer it has; mend the GPU's driver") from None
    if probe.returncode == 0:
        return probe.stdout.split()[-1]
    lines = probe.stderr.strip().splitlines() or [f"exit status {probe.returncode}"]
    complaint = next((line for line in lines if line.startswith("error: ")), None)
    raise UserError(complaint.removeprefix("error: ") if complaint else f"{python} fails ({lines[-1]}); {_REMEDY}")


def prepare(renderer: str = "auto") -> str:
    """ "gpu" or "cpu": what sapien will draw with in this process, made ready for it before a SapienRenderer is made.

    Raises:
        UserError: unknown renderer, no sapien or no Vulkan here, or no device of that kind.
    """
    if renderer not in RENDERERS:
        raise UserError(f"benchmark.renderer={renderer} is not known; choose one of {', '.join(RENDERERS)}")
    choose_driver()
    found = devices()
    kind = "cpu" if all(device_type == _CPU for device_type, _ in found) else "gpu"
    if not found or renderer not in ("auto", kind):
        raise UserError(
            f"no Vulkan device for renderer={renderer} ({len(found)} device(s), none of that kind): {_REMEDY}, which "
            "installs a software driver, or set VK_ICD_FILENAMES to the ICD file of the driver to use"
        )
    try:
        import sapien.core  # noqa: F401
    except ImportError as error:
        raise UserError(f"{sys.executable} cannot import sapien 2 ({error}); {_REMEDY}") from None
    if kind == "cpu" and not all(WANTED[:-1] in extensions for _, extensions in found):
        _rename_extension()
    return kind


def devices() -> list[tuple[int, set[bytes]]]:
    """(VkPhysicalDeviceType, names of its extensions) of every device that the Vulkan loader finds; [] without one."""
    try:
        vulkan = ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return []
    # VkInstanceCreateInfo: its type's number, 1, and nothing else asked for.
    request, instance, count = (ctypes.c_uint64 * 8)(1), ctypes.c_void_p(), ctypes.c_uint32()
    if vulkan.vkCreateInstance(request, None, ctypes.byref(instance)) != 0:
        return []
    try:
        vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
        handles = (ctypes.c_void_p * count.value)()
        vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles)
        return [(_device_type(vulkan, handle), _extensions(vulkan, handle)) for handle in handles]
    finally:
        vulkan.vkDestroyInstance(instance, None)


def _device_type(vulkan: ctypes.CDLL, handle: int) -> int:
    properties = (ctypes.c_uint32 * 512)()  # VkPhysicalDeviceProperties, 824 bytes; deviceType is its fifth number
    vulkan.vkGetPhysicalDeviceProperties(ctypes.c_void_p(handle), properties)
    return properties[4]


def _extensions(vulkan: ctypes.CDLL, handle: int) -> set[bytes]:
    class Extension(ctypes.Structure):
        _fields_ = (("name", ctypes.c_char * 256), ("version", ctypes.c_uint32))

    count = ctypes.c_uint32()
    vulkan.vkEnumerateDeviceExtensionProperties(ctypes.c_void_p(handle), None, ctypes.byref(count), None)
    found = (Extension * count.value)()
    vulkan.vkEnumerateDeviceExtensionProperties(ctypes.c_void_p(handle), None, ctypes.byref(count), found)
    return {extension.name for extension in found}


def _rename_extension() -> None:
    """Overwrite WANTED in the read-only data of the loaded libsapien; does nothing where it is not there any more."""
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "r+b", buffering=0) as memory:
        for line in maps:
            place, rights, *_, path = line.split()
            if "libsapien.so" not in path or not rights.startswith("r"):
                continue
            start, end = (int(number, 16) for number in place.split("-"))
            memory.seek(start)
            if (offset := memory.read(end - start).find(WANTED)) >= 0:
                memory.seek(start + offset)
                memory.write(INSTEAD)


def renderer(kind: str = "auto") -> tuple[str, Any]:
    """ "gpu" or "cpu", and a renderer to hold on to: as long as one lives, the next ones have its compiled shaders.

    Raises:
        UserError: see `prepare`, or the driver is not good enough.
    """
    found = prepare(kind)
    import sapien.core

    try:
        return found, sapien.core.SapienRenderer()
    except RuntimeError as error:
        raise UserError(f"sapien 2 cannot draw here ({error}): {_REMEDY}, or mend the GPU's driver") from None


if __name__ == "__main__":
    try:
        asset_folder()
        print(renderer(*sys.argv[1:])[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
