"""Uniform bins: one token per action dimension, ids counting down from the end of the vocabulary (fact sheet §6.2).

256 edges from -1 to 1; a value's bin d in 1 … 256 is the number of edges at or below it, and its id is `end` - d. The
255 intervals between the edges have centres; decoding takes an id to the centre of its interval, and every other id,
those of words too, to the first or the last.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vla.policy import sent


class UniformBins:
    """Normalised values in [-1, 1] ↔ token ids in [end - count, end - 1].

    No module: as a buffer the float64 edges would follow the policy into bf16. On an edge float32 gives another id.
    """

    def __init__(self, end: int, count: int = 256):
        self.end, self.count = end, count
        self.edges = torch.from_numpy(np.linspace(-1, 1, count))
        self.centres = (self.edges[:-1] + self.edges[1:]) / 2

    def encode(self, values: Tensor) -> Tensor:
        """Ids, int64, of any shape of values; those outside [-1, 1] are clipped."""
        bins = torch.bucketize(values.double().clamp(-1, 1), sent(self.edges, values.device), right=True)
        return self.end - bins

    def decode(self, ids: Tensor) -> Tensor:
        """float32 values of any shape of ids."""
        index = (self.end - 1 - ids).clamp(0, self.count - 2)
        return sent(self.centres, ids.device)[index].float()
