"""Messages on the wire: msgpack with numpy arrays, as openpi's client and vla-eval write them; never a pickle.

openpi codes an array as {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]} and a numpy scalar as
{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}; vla-eval has the first with text keys, and images as
{"__image__": True, "format": "png", "data": bytes, "shape": [h, w, 3]}. `unpack` reads both, `pack` writes openpi's.
What comes in is not trusted: only plain numbers of known types, of exactly the stated size, and few containers, since
each empty one costs a byte on the wire and 64 in memory. Sources: openpi-client 0.1.2, msgpack_numpy.py; vla-eval
0.8.0, protocol/
"""

from __future__ import annotations

import io
import math
from typing import Any

import msgpack
import numpy as np

DTYPES = {np.dtype(code).newbyteorder(order).str for code in "?bBhHiIqQefd" for order in "<>"}
MAX_CONTAINERS = 1000
MAX_ITEMS = 100_000
MAX_SIDE = 4096
"""Pixels; a compressed image of some kilobytes may claim any size."""


class WireError(ValueError):
    """A message that cannot be read, or does not hold what it must; the text is meant for the client."""


def pack(message: Any) -> bytes:
    """Code a message whose arrays and numpy scalars are bool, int or float."""
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes | str) -> Any:
    """Decode a message.

    Raises:
        WireError: text instead of bytes, not msgpack, an array of another dtype or size than stated, too many parts.
    """
    if isinstance(data, str):
        raise WireError("a text frame; send msgpack in a binary frame")
    containers = 0

    def count(item: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > MAX_CONTAINERS:
            raise WireError(f"more than {MAX_CONTAINERS} lists and maps in a message")
        return item

    limits = {"max_array_len": MAX_ITEMS, "max_map_len": MAX_CONTAINERS, "max_ext_len": 0}
    try:
        return msgpack.unpackb(data, object_hook=lambda item: _decode(count(item)), list_hook=count, **limits)
    except WireError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"not a msgpack message: {error or type(error).__name__}") from error


def _encode(item: Any) -> Any:
    if isinstance(item, np.ndarray | np.generic) and item.dtype.str not in DTYPES:
        raise TypeError(f"arrays of dtype {item.dtype} are not sent")
    if isinstance(item, np.ndarray):
        return {b"__ndarray__": True, b"data": item.tobytes(), b"dtype": item.dtype.str, b"shape": item.shape}
    if isinstance(item, np.generic):
        return {b"__npgeneric__": True, b"data": item.item(), b"dtype": item.dtype.str}
    raise TypeError(f"{type(item).__name__} is not sent")


def _decode(item: dict) -> Any:
    for marker, read in _READERS.items():
        if marker in item or marker.encode() in item:
            return read({key.decode() if isinstance(key, bytes) else key: value for key, value in item.items()})
    return item


def _array(item: dict) -> np.ndarray:
    dtype, shape, data = _dtype(item), _shape(item), item.get("data")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        size = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"an array of shape {shape} and dtype {dtype.str} with {size} of data")
    return np.ndarray(shape, dtype, buffer=data)


def _scalar(item: dict) -> np.generic:
    dtype, value = _dtype(item), item.get("data")
    if not isinstance(value, bool | int | float):
        raise WireError(f"a numpy scalar whose data is {type(value).__name__}")
    try:
        return dtype.type(value)
    except (OverflowError, ValueError):
        raise WireError(f"{value} is no {dtype.name}") from None


def _image(item: dict) -> np.ndarray:
    if item.get("format") == "raw":
        return _array(item)
    from PIL import Image

    shape, data = _shape(item), item.get("data")
    if item.get("format") not in ("png", "jpeg") or not isinstance(data, bytes):
        raise WireError(f"an image of format {item.get('format')!r}; send raw, png or jpeg")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:  # reads the header only
            if max(image.size) > MAX_SIDE or image.size[::-1] != shape[:2]:
                raise WireError(f"an image of {image.size[1]} × {image.size[0]} pixels, {shape[:2]} were stated")
            return np.asarray(image)
    except WireError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, for damaged files
        raise WireError(f"an image that cannot be read: {error}") from error


def _dtype(item: dict) -> np.dtype:
    """Only listed names reach numpy, which would make records and Python objects of others."""
    name = item.get("dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise WireError(f"an array of dtype {str(name)[:20]!r}; send bool, int or float")
    return np.dtype(name)


def _shape(item: dict) -> tuple[int, ...]:
    shape = item.get("shape")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise WireError("an array whose shape is not a list of up to 8 lengths")
    return tuple(shape)


_READERS = {"__ndarray__": _array, "__npgeneric__": _scalar, "__image__": _image}
