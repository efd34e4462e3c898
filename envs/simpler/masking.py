"""What of a SimplerEnv frame is background, by the simulator's own segmentation (facts simpler §4f)."""

from __future__ import annotations

import numpy as np

BACKGROUNDS = ("overlay", "masked")
"""The photo that visual matching lays behind robot and objects, or one colour in its place (GenVLA table III)."""
MASK_COLOUR = (0, 0, 0)


def mask_background(
    frame: np.ndarray, segmentation: np.ndarray, keep: np.ndarray, colour: tuple[int, int, int] = MASK_COLOUR
) -> np.ndarray:
    """A copy of `frame` in which everything but the kept bodies has one colour.

    Args:
        frame: uint8 (H, W, 3).
        segmentation: int (H, W), the id of the actor or link seen at each pixel.
        keep: ids of the robot's links, of other articulations' links (a cabinet) and of the task's objects.

    Raises:
        ValueError: frame and segmentation are not of one size.
    """
    if frame.shape[:2] != segmentation.shape:
        raise ValueError(f"a frame of {frame.shape[:2]} cannot be masked by a segmentation of {segmentation.shape}")
    return np.where(np.isin(segmentation, keep)[..., None], frame, np.array(colour, dtype=np.uint8))
