"""Convert weights that a baseline's authors published into a policy directory.

    python scripts/convert_weights.py baseline=openvla source=openvla/openvla-7b dataset=bridge_orig out=weights/openvla
    python evaluate.py policy=weights/openvla benchmark=…
    python train.py baseline=openvla size=full init_from=weights/openvla benchmark=…

Every weight of the source must fit and every weight of the model must be there, or the conversion is refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.cli import main
from vla.config import ConvertWeightsConfig


@main("convert_weights")
def run(cfg: ConvertWeightsConfig) -> None:
    from vla.released.convert import convert_weights

    out, notes = convert_weights(cfg)
    for note in notes:
        print(f"note: {note}")
    print(f"{out}: evaluate it with policy={out}, fine-tune it with init_from={out}")


if __name__ == "__main__":
    run()
