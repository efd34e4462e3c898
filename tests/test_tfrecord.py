"""TFRecord framing and Example messages: against TensorFlow's own bytes, published checksums, and damage everywhere.

pytest tests/test_tfrecord.py
"""

from __future__ import annotations

import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tfrecord import encode_example, masked_crc, parse_example, read_records, write_records
from vla.errors import UserError

# tf.io.TFRecordWriter of TensorFlow 2.21: an Example with b = [b"\0a", b""], f = [1.5, -0.1], i = [3, -1, 2^40], an
# empty int64 list e, a feature `none` without any list; then a record of no bytes.
TENSORFLOW = bytes.fromhex(
    "53000000000000000d7d4e910a510a0d0a016212080a060a0200610a000a070a016512021a000a110a0166120c120a0a080000c03fcdccccbd0a"
    "1a0a016912151a130a1103ffffffffffffffffff018080808080200a080a046e6f6e65120090c8628c000000000000000029039807d8ea82a2"
)
RECORDS = [b"first", b"", bytes(range(40))]

bytes_lists = st.lists(st.binary(max_size=20), max_size=5)
int64_lists = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5).map(lambda v: np.array(v, np.int64))
float_lists = st.lists(st.floats(width=32), max_size=5).map(lambda v: np.array(v, np.float32))
examples = st.dictionaries(st.text(max_size=8), bytes_lists | int64_lists | float_lists, max_size=5)


def test_crc32c_against_rfc_3720():
    for data, expected in (
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ):
        assert google_crc32c.value(data) == expected
        rotated = int(f"{expected:032b}"[-15:] + f"{expected:032b}"[:-15], 2)
        assert masked_crc(data) == (rotated + 0xA282EAD8) % 2**32


def test_a_file_of_tensorflows(tmp_path):
    path = tmp_path / "theirs"
    path.write_bytes(TENSORFLOW)
    (first, record), (second, empty) = read_records(path)
    assert (first, second, empty) == (0, 1, b"")
    values = parse_example(record, "record 0")
    assert values["b"] == [b"\0a", b""]
    np.testing.assert_array_equal(values["f"], np.array([1.5, -0.1], np.float32))
    np.testing.assert_array_equal(values["i"], np.array([3, -1, 2**40]))
    assert (values["i"].dtype, values["e"].dtype, values["f"].dtype) == (np.int64, np.int64, np.float32)
    assert len(values["e"]) == len(values["none"]) == 0
    assert set(parse_example(record, "record 0", keys=("i", "absent"))) == {"i"}
    write_records(tmp_path / "ours", [record, b""])
    assert (tmp_path / "ours").read_bytes() == TENSORFLOW


@given(records=st.lists(st.binary(max_size=200), max_size=6))
def test_records_are_read_back(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("records") / "file"
    write_records(path, records)
    assert list(read_records(path)) == list(enumerate(records))


@given(values=examples)
@settings(max_examples=200)
def test_examples_are_read_back(values):
    found = parse_example(encode_example(values), "made")
    assert set(found) == set(values)
    for key, content in values.items():
        if isinstance(content, list):
            assert found[key] == content
        else:
            assert found[key].dtype == content.dtype
            np.testing.assert_array_equal(found[key], content)


def test_booleans_and_arrays_become_flat_lists():
    values = {"flag": np.array([True, False]), "grid": np.arange(6.0).reshape(2, 3)}
    found = parse_example(encode_example(values), "made")
    assert found["flag"].tolist() == [1, 0]
    assert found["grid"].dtype == np.float32 and found["grid"].tolist() == [0, 1, 2, 3, 4, 5]


def written(folder: Path) -> tuple[Path, bytes, list[int]]:
    """A file of RECORDS, its content, and where its records end."""
    path = folder / "shard"
    write_records(path, RECORDS)
    ends = np.cumsum([16 + len(record) for record in RECORDS]).tolist()
    return path, path.read_bytes(), ends


def test_cut_at_every_byte(tmp_path):
    path, content, ends = written(tmp_path)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        whole = sum(end <= size for end in ends)
        if size in (0, *ends):  # only the record count of dataset_info.json can tell (tests/test_rlds.py)
            assert len(list(read_records(path))) == whole
            continue
        with pytest.raises(UserError, match=f"^{path}: record {whole} is cut short: download it again") as caught:
            list(read_records(path))
        assert "\n" not in str(caught.value)
        bad: list[str] = []
        assert [record for _, record in read_records(path, bad)] == RECORDS[:whole]
        assert bad == [str(caught.value)]


def test_every_flipped_bit(tmp_path):
    path, content, ends = written(tmp_path)
    for position in range(len(content)):
        number = sum(end <= position for end in ends)
        start = ([0, *ends])[number]
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"^{path}: record {number} .*: download it again"):
                list(read_records(path))
            bad: list[str] = []
            left = [record for _, record in read_records(path, bad)]
            header = position < start + 12  # where the next record begins is then unknown
            assert left == RECORDS[:number] + ([] if header else RECORDS[number + 1 :])
            assert len(bad) == 1


def test_a_length_beyond_the_file_is_not_allocated(tmp_path):
    path = tmp_path / "shard"
    length = struct.pack("<Q", 2**62)
    path.write_bytes(length + struct.pack("<I", masked_crc(length)) + bytes(20))
    with pytest.raises(UserError, match="record 0 is cut short"):
        list(read_records(path))


def test_a_missing_file_and_a_message_of_another_kind(tmp_path):
    with pytest.raises(UserError, match=r"absent: record 0 cannot be read .*No such file"):
        list(read_records(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"^shard: record 4 is no tf\.train\.Example"):
        parse_example(b"\xff\xff\xff", "shard: record 4")
