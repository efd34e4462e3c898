"""mp4 files: the frame that is asked for is the one that comes, of our own films and of others; damage is an error.

pytest tests/test_video.py
"""

from __future__ import annotations

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.video import VideoWriter, read_frames
from vla.errors import UserError

FPS = 10
BLOCK = 8


def numbered(numbers) -> np.ndarray:
    """(T, 24, 32, 3) frames that carry their number: eight bits as light and dark blocks, beside a colour gradient."""
    frames = np.zeros((len(numbers), 24, 32, 3), np.uint8)
    frames[:, 16:] = np.linspace(40, 200, 32)[None, None, :, None] * np.array([1.0, 0.6, 0.3])
    for frame, number in zip(frames, numbers, strict=True):
        for bit in range(8):
            row, column = divmod(bit, 4)
            light = 220 if number >> bit & 1 else 30
            frame[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK] = light
    return frames


def numbers_in(frames: np.ndarray) -> list[int]:
    return [
        sum(
            int(frame[(bit // 4) * BLOCK + 2 : (bit // 4) * BLOCK + 6, (bit % 4) * BLOCK + 4].mean() > 125) << bit
            for bit in range(8)
        )
        for frame in frames
    ]


def read(path, first: int, count: int) -> np.ndarray:
    return read_frames(path, np.arange(first, first + count) / FPS, 0.25 / FPS)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "ours.mp4"
    with VideoWriter(path, FPS) as writer:
        for first in range(0, 60, 20):
            writer.add(numbered(range(first, first + 20)))
    return path


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Films as lerobot's encoder and as ffmpeg's defaults write them: AV1; H.264 with B-frames and one key frame."""
    made = {}
    encoders = {"libsvtav1": {"g": "2", "crf": "30", "preset": "12"}, "libx264": {"bf": "3", "g": "250"}}
    for codec, options in encoders.items():
        made[codec] = tmp_path_factory.mktemp("video") / f"{codec}.mp4"
        with av.open(str(made[codec]), "w") as container:
            stream = container.add_stream(codec, FPS, options=options)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
            for pixels in numbered(range(60)):
                big = np.ascontiguousarray(np.pad(pixels, ((0, 40), (0, 64), (0, 0)), mode="edge"))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(big, format="rgb24")))
            container.mux(stream.encode())
    return made


@settings(max_examples=20)
@given(first=st.integers(0, 59), count=st.integers(1, 60))
def test_the_frame_that_is_asked_for(film, first, count):
    count = min(count, 60 - first)
    frames = read(film, first, count)
    assert frames.shape == (count, 24, 32, 3) and frames.dtype == np.uint8
    assert numbers_in(frames) == list(range(first, first + count))
    assert np.abs(frames.astype(int) - numbered(range(first, first + count))).mean() < 1.5


@pytest.mark.parametrize("codec", ["libsvtav1", "libx264"])
def test_films_of_other_encoders(others, codec):
    for first in range(0, 60, 7):
        for count in {1, 3, 60 - first}:
            count = min(count, 60 - first)
            assert numbers_in(read(others[codec], first, count)) == list(range(first, first + count))


def test_frames_lie_at_multiples_of_a_step(film):
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        times = [picture.pts * stream.time_base for picture in container.decode(stream)]
        assert [time * FPS for time in times] == list(range(60)) and stream.average_rate == FPS


def test_a_time_between_frames_or_after_them_is_an_error(film):
    for times in ([6.0], [5.9, 6.0], [1.05], [0.0, 0.05]):
        with pytest.raises(UserError, match=r"ours\.mp4 has no frame at"):
            read_frames(film, np.array(times), 0.25 / FPS)


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.mp4 is missing"):
        read(tmp_path / "absent.mp4", 0, 1)
    (tmp_path / "text.mp4").write_text("not a film")
    with pytest.raises(UserError, match=r"text\.mp4 cannot be decoded"):
        read(tmp_path / "text.mp4", 0, 1)


@settings(max_examples=40)
@given(share=st.floats(0, 0.999))
def test_truncated_anywhere_is_an_error(film, tmp_path_factory, share):
    content = film.read_bytes()
    short = tmp_path_factory.mktemp("short") / "short.mp4"
    short.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"short\.mp4"):
        read(short, 0, 60)


@settings(max_examples=60)
@given(where=st.floats(0, 0.999), value=st.integers(1, 255))
def test_a_changed_byte_is_an_error_or_gives_as_many_frames(film, tmp_path_factory, where, value):
    """mp4 has no checksums: what is not noticed may tint a picture, but there are as many, and no traceback."""
    content = bytearray(film.read_bytes())
    content[int(where * len(content))] ^= value
    damaged = tmp_path_factory.mktemp("damaged") / "damaged.mp4"
    damaged.write_bytes(content)
    try:
        frames = read(damaged, 0, 60)
    except UserError as error:
        assert "damaged.mp4" in str(error) and "\n" not in str(error)
    else:
        assert len(frames) == 60
