"""FLOPs of a step, counted while it runs, and what the device can do: their ratio is the MFU (model FLOPs utilisation).

Counted are matrix products, convolutions and attention, by torch's own formulas. The device's rate is its data sheet's
dense bf16 figure where it is one of DATA_SHEET, so that MFU compares with published ones; else, as on a CPU, that of a
large matrix product, measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

DATA_SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40": 181e12}
"""Dense bf16 FLOP/s (anchors §B.5)."""


class FlopCounter(TorchDispatchMode):
    """`total` FLOPs of what runs inside the context.

    It looks on only: torch's FlopCounterMode takes some operations apart, and a step would not be the same to the bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        packet = getattr(function, "_overloadpacket", None)
        if formula := flop_registry.get(packet):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
        return out


def data_sheet_rate(device: str) -> float | None:
    """FLOP/s of a device by the name that the driver gives it."""
    return next((rate for name, rate in DATA_SHEET.items() if name in device), None)


def device_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s to hold a step's against (module docstring)."""
    sheet = data_sheet_rate(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return sheet or measured_rate(device, dtype)


def measured_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of some."""
    side, generator = 8192 if torch.device(device).type == "cuda" else 1024, torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    return 2 * side**3 / fastest(lambda: a @ b, device)


def measured_bandwidth(device: torch.device | str) -> float:
    """Bytes/s at which the sum of a large tensor reads it, the best of some."""
    data = torch.ones(2**28 if torch.device(device).type == "cuda" else 2**25, device=device)
    return data.nbytes / fastest(data.sum, device)


def fastest(work: Callable[[], object], device: torch.device | str, seconds: float = 0.3) -> float:
    """Seconds of the fastest of the calls that `seconds` hold, at least three."""
    best, end, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
