"""Safetensors files that are cut, lie about themselves or ask for the impossible."""

from __future__ import annotations

import json
import os
import struct

import pytest
from hostile import MODULE, WEIGHTS, edit_header, edit_settings, read_raw, refusal, write_raw

from deltamix_hf import DeltaMixError
from deltamix_hf.storage.headers import read_header, read_headers

RANKS = f"{MODULE}.dm_ranks"
HUGE = [2**31, 2**40, 2**62, 2**63, 2**64, 10**400]


@pytest.mark.parametrize(
    "keep", ["0", "1", "7", "8", "9", "header - 1", "header", "header + 1", "-1"]
)
def test_cut(attack, keep):
    it = attack()
    content = (it.folder / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    (it.folder / WEIGHTS).write_bytes(content[: eval(keep, {"header": header})])
    it.refused(WEIGHTS)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**32, 2**53, 2**63, 2**64 - 1])
def test_length_of_the_header(attack, length):
    it = attack()
    content = (it.folder / WEIGHTS).read_bytes()
    (it.folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])
    it.refused(WEIGHTS)


def test_a_long_file_does_not_excuse_a_long_header(tmp_path):
    """A sparse file takes no disk; reading its 'header' would take 200 MB and more."""
    with open(tmp_path / WEIGHTS, "wb") as handle:
        handle.write(struct.pack("<Q", 2 * 10**8))
        handle.truncate(3 * 10**8)
    refusal(lambda: read_header(tmp_path / WEIGHTS), "header too large")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe{}",
        b"\x80\x04\x95",  # the beginning of a pickle
        b"[" * 100_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        b'{"w":{"dtype":"F32","shape":[' + b"9" * 5_000 + b'],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"format":1},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
    ids=range(13),
)
def test_header_that_is_none(attack, text):
    it = attack()
    write_raw(it.folder / WEIGHTS, text, b"1234")
    it.refused(WEIGHTS)


def test_a_name_twice(attack):
    """Readers differ on which one counts: what one checked, another would load."""
    it = attack()
    header, data = read_raw(it.folder / WEIGHTS)
    again = json.dumps({RANKS: header[RANKS]})[1:]
    write_raw(it.folder / WEIGHTS, (json.dumps(header)[:-1] + "," + again).encode(), data)
    it.refused(WEIGHTS, "twice")


def move(entry: dict, start: int, end: int) -> None:
    entry["data_offsets"] = [entry["data_offsets"][0] + start, entry["data_offsets"][1] + end]


@pytest.mark.parametrize(
    ("start", "end"), [(-2, -2), (2, 2), (0, -2), (0, 2), (-2, 0), (2**62, 2**62), (-(2**40), 0)]
)
def test_ranges_that_overlap_or_leave_gaps(attack, start, end):
    it = attack()
    edit_header(it.folder / WEIGHTS, lambda header: move(header[RANKS], start, end))
    it.refused(WEIGHTS)


def test_two_tensors_on_the_same_bytes(attack):
    it = attack()
    edit_header(it.folder / WEIGHTS, lambda header: header.update({"other": header[RANKS]}))
    it.refused(WEIGHTS)


def test_bytes_of_no_tensor(attack):
    """A second file, of another format, could hide behind the first."""
    it = attack()
    with open(it.folder / WEIGHTS, "ab") as handle:
        handle.write(b"PK\x03\x04")
    it.refused(WEIGHTS, "file not fully covered")


@pytest.mark.parametrize(
    "shape",
    [
        *([number] for number in HUGE),
        *([0, number] for number in HUGE[2:]),  # no bytes, but torch multiplies all the same
        [2**32, 2**32],
        [0] + [2**15] * 8,
        [1] * 65,
        [1] * 100_000,
        [-1],
        [-1, -1],
        [True],
        [1.0],
        [None],
        ["1"],
        [[1]],
        "11",
        None,
        5,
        {},
    ],
    ids=str,
)
def test_shapes(attack, shape):
    it = attack()
    edit_header(it.folder / WEIGHTS, lambda header: header[RANKS].update(shape=shape))
    it.refused(WEIGHTS)


@pytest.mark.parametrize("shape", [[2**40], [2**20, 2**20], [0, 2**40]], ids=str)
@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64", "Q9", "", None, 5, ["U8"]], ids=str)
def test_dtypes_nobody_knows(attack, dtype, shape):
    """Their size is not ours to know, so their shape is not bounded by the file's."""
    it = attack()
    edit_header(it.folder / WEIGHTS, lambda header: header[RANKS].update(dtype=dtype, shape=shape))
    it.refused()


@pytest.mark.parametrize("offsets", [[], [0], [0, 1, 2], [1.0, 2.0], ["0", "4"], None, 7], ids=str)
def test_offsets(attack, offsets):
    it = attack()
    edit_header(it.folder / WEIGHTS, lambda header: header[RANKS].update(data_offsets=offsets))
    it.refused(WEIGHTS)


def test_names_that_would_steer_a_terminal(attack):
    """Names come from the file and end up in messages, on a terminal or in a log."""
    it = attack()
    name = "\x1b[2J\nERROR all is well\u202e" + "x" * 10_000

    def change(header: dict) -> None:
        header[name] = header.pop("model.norm.weight")

    edit_settings(it.folder, overlay=None)  # else the list of what must be there speaks first
    edit_header(it.folder / WEIGHTS, change)
    assert "\\x1b[2J\\nERROR" in it.refused()  # `refused` looks at the rest


def test_a_pipe_instead_of_a_file(tmp_path):
    """It would keep the reader waiting for ever."""
    os.mkfifo(tmp_path / WEIGHTS)
    refusal(lambda: read_header(tmp_path / WEIGHTS), "shorter than")


def test_a_tensor_in_two_files(tmp_path):
    entry = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    for name in "ab":
        write_raw(tmp_path / f"{name}.safetensors", entry, b"1234")
    with pytest.raises(DeltaMixError, match=r"w is in .*a\.safetensors and again in .*b\.safet"):
        read_headers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
