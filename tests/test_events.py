"""TensorBoard's events: written in order, by a thread that hides no error."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from train.events import Events


def read(path):
    """Returns (step, tag, value) of every scalar, from TensorBoard's record format."""
    found = []
    for file in sorted(path.iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += 16 + length
    return found


def test_every_scalar_is_written_in_order(tmp_path):
    events = Events(tmp_path / "events", 0)
    assert not (tmp_path / "events").exists()
    for step in range(5):
        events.add(step, "train", {"loss": step / 2, "accuracy": 0.25})
    events.close()
    rows = read(tmp_path / "events")
    assert rows[::2] == [(step, "train/loss", step / 2) for step in range(5)]
    assert rows[1::2] == [(step, "train/accuracy", 0.25) for step in range(5)]


def test_without_scalars_nothing_is_written(tmp_path):
    Events(tmp_path / "events", 0).close()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    events = Events(tmp_path / "file", 0)
    with pytest.raises(OSError, match="file"):
        for _ in range(100):
            events.add(1, "train", {"loss": 1.0})
            events._pool.submit(int).result()  # which comes after what was asked for
    with pytest.raises(OSError, match="file"):
        events.close()
    assert (tmp_path / "file").read_text() == "mine"
