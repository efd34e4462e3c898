"""TFRecord files and the tf.train.Example messages in them, without TensorFlow.

    for number, record in read_records(path):                       # one record in memory at a time
        values = parse_example(record, f"{path}: record {number}")  # key -> numpy array or list of bytes

A record is: its length (uint64), the masked CRC-32C of those eight bytes (uint32), the data, the masked CRC-32C of the
data (uint32), all little endian; mask(c) = rotate(c, 15 bits to the right) + 0xA282EAD8 (TensorFlow, tsl/lib/io
record_writer.h and hash/crc32c.h). An Example maps names to lists of bytes, of float32 or of int64 (TensorFlow,
core/example/feature.proto). The checksum is google-crc32c's (Google's own C library, 10 GB/s, nothing else comes with
it), the messages are protobuf's, which other packages bring along already; PyPI's `tfrecord` does not verify checksums
when it reads.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from vla.errors import UserError

Values = np.ndarray | list[bytes]
"""One feature of an Example: float32 (n,), int64 (n,), or n byte strings."""

HEADER, CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
REMEDY = "download it again, or leave it out with data.bad_files=skip"


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def write_records(path: Path, records: Iterable[bytes]) -> None:
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + CHECKSUM.pack(masked_crc(length)) + record + CHECKSUM.pack(masked_crc(record)))


def read_records(path: Path, bad: list[str] | None = None) -> Iterator[tuple[int, bytes]]:
    """(number, data) of each record, numbered from 0; every checksum is verified before the data is handed out.

    Args:
        bad: where given, damage is named there instead of raised: a record whose data is damaged is left out, and the
            file ends where no next record can be found. A file cut between two records cannot be told from a whole one.

    Raises:
        UserError: a file that cannot be opened or read, is cut short, or has a wrong checksum; it names the record.
    """

    def damaged(what: str) -> None:
        message = f"{path}: record {number} {what}: {REMEDY}"
        if bad is None:
            raise UserError(message)
        bad.append(message)

    number = 0
    try:
        with open(path, "rb") as file:
            left = os.fstat(file.fileno()).st_size
            while left:
                length = _length(file, left)
                if isinstance(length, str):
                    return damaged(length)
                record = file.read(length)
                (stored,) = CHECKSUM.unpack(file.read(CHECKSUM.size))
                if stored == masked_crc(record):
                    yield number, record
                else:
                    damaged("has a wrong checksum")
                left -= HEADER.size + length + CHECKSUM.size
                number += 1
    except (OSError, struct.error) as error:
        damaged(f"cannot be read ({error})")


def _length(file: BinaryIO, left: int) -> int | str:
    """Bytes of the next record's data, of which there are that many; or what is wrong with its header."""
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        return "is cut short"
    length, stored = HEADER.unpack(header)
    if stored != masked_crc(header[:8]):
        return "has a length with a wrong checksum"
    return length if HEADER.size + length + CHECKSUM.size <= left else "is cut short"


_SCHEMA = """
name: "example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type_name: ".tensorflow.BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type_name: ".tensorflow.FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type_name: ".tensorflow.Int64List" oneof_index: 0 } }
message_type { name: "Features"
  nested_type { name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type_name: ".tensorflow.Feature" } }
  field { name: "feature" number: 1 label: LABEL_REPEATED type_name: ".tensorflow.Features.FeatureEntry" } }
message_type { name: "Example" field { name: "features" number: 1 type_name: ".tensorflow.Features" } }
"""


def _message_class() -> type:
    """The class of tf.train.Example; in a pool of its own, so that TensorFlow may be imported beside it."""
    schema = text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(schema)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


_Example = _message_class()


def parse_example(record: bytes, where: str, keys: Iterable[str] | None = None) -> dict[str, Values]:
    """The features named in `keys` (default: all) that the message holds. A feature without values is float32 (0,).

    Args:
        where: file and record, for the error.

    Raises:
        UserError: not a tf.train.Example.
    """
    try:
        features = _Example.FromString(record).features.feature
    except DecodeError as error:
        raise UserError(f"{where} is no tf.train.Example ({error}): {REMEDY}") from error
    return {key: _values(features[key]) for key in (features if keys is None else keys) if key in features}


def _values(feature) -> Values:
    kind = feature.WhichOneof("kind")
    if kind == "bytes_list":
        return list(feature.bytes_list.value)
    if kind == "int64_list":
        return np.array(feature.int64_list.value, np.int64)
    return np.array(feature.float_list.value, np.float32)


def encode_example(values: Mapping[str, Values]) -> bytes:
    """The message that `parse_example` reads back equal: floats become float32, booleans and integers int64."""
    example = _Example()
    for key, content in values.items():
        feature = example.features.feature[key]
        if isinstance(content, list):
            feature.bytes_list.value.extend(content)
            feature.bytes_list.SetInParent()
        elif content.dtype.kind == "f":
            feature.float_list.value.extend(content.reshape(-1).tolist())
            feature.float_list.SetInParent()
        else:
            feature.int64_list.value.extend(content.reshape(-1).astype(np.int64).tolist())
            feature.int64_list.SetInParent()
    return example.SerializeToString()
