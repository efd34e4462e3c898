"""Frames in and out of mp4 files by their time, with PyAV; what LeRobot data sets keep their pictures in.

    with VideoWriter(Path("file-000.mp4"), fps=20) as video:
        video.add(frames)                      # (T, H, W, 3) uint8 RGB; several calls go on in one film
    frames = read_frames(Path("file-000.mp4"), times, tolerance=0.25 / 20)

Written is H.264 without chroma subsampling (yuv444p, crf 10, a key frame every second frame, no B-frames): on 128 × 128
LIBERO frames 47 dB and 0.7 grey levels of mean error at 3.5 kB a frame, against 44 dB and 1.3 for yuv420p of the same
size. ffmpeg-based readers decode it; web browsers do not.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from vla.errors import UserError

CODEC, CODEC_NAME = "libx264", "h264"
PIXEL_FORMAT = "yuv444p"
OPTIONS = {"crf": "10", "g": "2", "bf": "0"}


class VideoWriter:
    """One mp4 file, frame i at i / fps seconds; complete only after `close`."""

    def __init__(self, path: Path, fps: int):
        self.fps, self.frames, self.size = fps, 0, 0  # size: bytes so far
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        self._stream = None

    def add(self, frames: np.ndarray) -> None:
        """Append (T, H, W, 3) uint8 RGB frames; all of one file are of one size."""
        if self._stream is None:
            self._stream = self._container.add_stream(CODEC, self.fps, options=OPTIONS)
            self._stream.height, self._stream.width = frames.shape[1:3]
            self._stream.pix_fmt = PIXEL_FORMAT
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            picture.pts, picture.time_base = self.frames, Fraction(1, self.fps)
            self._write(picture)
            self.frames += 1

    def _write(self, picture: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(picture):
            self.size += packet.size
            self._container.mux(packet)

    def close(self) -> None:
        if self._stream is not None:
            self._write(None)
        self._container.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_frames(path: Path, times: np.ndarray, tolerance: float) -> np.ndarray:
    """The frames at `times`, one for each, in their order.

    Args:
        times: (T,) seconds from the start of the film, increasing by more than 2 × tolerance.
        tolerance: seconds; a quarter of a frame leaves no two frames to choose from.

    Returns:
        (T, H, W, 3) uint8 RGB.

    Raises:
        UserError: no file, a damaged or truncated one, or one without a frame at one of the times.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; download the data set again")
    try:
        return _read_frames(path, times, tolerance)
    except (av.error.FFmpegError, IndexError, ValueError, TypeError, OverflowError) as error:  # as damage shows itself
        raise UserError(f"{path} cannot be decoded ({error}): damaged or truncated, download it again") from error


def _read_frames(path: Path, times: np.ndarray, tolerance: float) -> np.ndarray:
    found: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("its codec is not known")
        stream.codec_context.options = {"err_detect": "explode"}  # by default damage is painted over
        frames = _frames_from(container, stream, times[0], tolerance)
        for picture in frames:
            second = float(picture.pts * stream.time_base)
            if second < times[len(found)] - tolerance:
                continue
            if second > times[len(found)] + tolerance:
                break
            found.append(picture.to_ndarray(format="rgb24"))
            if len(found) == len(times):
                return np.stack(found)
    raise UserError(
        f"{path} has no frame at {times[len(found)]:.3f} s: truncated, or not the film that meta/episodes describes; "
        "download the data set again"
    )


def _frames_from(container, stream, second: float, tolerance: float):
    """Decoded frames from a key frame at or before `second` on."""
    container.seek(max(0, round(second / stream.time_base) - 1), stream=stream, backward=True)
    frames = container.decode(stream)
    first = next(frames, None)
    if first is None or float(first.pts * stream.time_base) > second + tolerance:
        container.seek(0, stream=stream, backward=True)  # with B-frames a seek can land behind its aim
        frames = container.decode(stream)
        first = next(frames, None)
    if first is not None:
        yield first
        yield from frames
