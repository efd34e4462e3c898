"""Small vision-language sets in the public forms."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(value: int, size: tuple[int, int] = (20, 30), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def exchange(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_llava(folder: Path, count: int = 6) -> tuple[Path, Path]:
    """(chat.json, images): example n has a picture of grey 10 n, a question and "Number n"."""
    images = folder / "images"
    images.mkdir(parents=True)
    rows = []
    for n in range(count):
        (images / f"{n}.png").write_bytes(picture(10 * n))
        rows.append(
            {"id": str(n), "image": f"{n}.png", "conversations": exchange(f"<image>\nWhat is {n}?", f"Number {n}")}
        )
    (folder / "chat.json").write_text(json.dumps(rows))
    return folder / "chat.json", images


def write_onevision(folder: Path, count: int = 5) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {
            "id": str(n),
            "image": {"bytes": picture(10 * n), "path": None},
            "conversations": exchange("Read it.", f"Word {n}"),
        }
        for n in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-0.parquet", row_group_size=2)
    return folder


def write_vqasynth(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {
            "images": [{"bytes": picture(10 * n), "path": None}],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "How far?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"{n} Metres"}]},
                {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
            ],
        }
        for n in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder
