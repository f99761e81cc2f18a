"""Frames between a worker process and its owner."""

import os
import struct

import pytest

from luspo_jax.hosts.workers import read_frame, write_frame


def test_objects_come_out_as_they_went_in_and_the_end_is_noticed():
    reading, writing = os.pipe()
    for payload in (("ok", b"x" * 1_000), None):
        write_frame(writing, payload)
        assert read_frame(reading) == payload
    os.write(writing, struct.pack(">I", 9) + b"half")
    os.close(writing)
    with pytest.raises(EOFError):
        read_frame(reading)
    os.close(reading)


def test_a_frame_that_is_none_of_ours_is_refused():
    reading, writing = os.pipe()
    os.write(writing, b"\xff" * 4)
    with pytest.raises(ValueError, match="a frame of 4294967295 bytes"):
        read_frame(reading)
    os.close(writing)
    os.close(reading)
