"""TensorBoard's events: written in order, by a thread that stops no run."""

import struct

import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from train.config import Config
from train.run.directory import RunDirectory
from train.run.events import Events


def events_of(file):
    """Reads a file of TensorBoard's records."""
    content, at = file.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length


def read(path):
    """Returns (step, tag, value) of every scalar."""
    return [
        (event.step, value.tag, value.simple_value)
        for file in sorted(path.iterdir())
        for event in events_of(file)
        for value in event.summary.value
    ]


def test_every_scalar_is_written_in_order(tmp_path):
    events = Events(tmp_path / "events", 0)
    assert not (tmp_path / "events").exists()
    for step in range(5):
        events.add(step, "train", {"loss": step / 2, "accuracy": 0.25})
    events.close()
    rows = read(tmp_path / "events")
    assert rows[::2] == [(step, "train/loss", step / 2) for step in range(5)]
    assert rows[1::2] == [(step, "train/accuracy", 0.25) for step in range(5)]


@pytest.mark.parametrize(
    "values",
    [[1e30] * 3, [-1.0], [0.5, 2.0], [0.0]],
    ids="closed open two zero".split(),
)
def test_histograms_hold_all_values_whatever_they_are(values, tmp_path):
    run = RunDirectory(tmp_path / "run", Config(), resume=False)
    run.lock()
    run.open(0)
    run.show_histograms(1, {"thresholds/conv": np.float32(values)})
    run.close()
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    found = [
        v.histo for e in events_of(file) for v in e.summary.value if v.tag[:1] == "t"
    ]
    assert sum(found[0].bucket) == len(values)
    assert (found[0].min, found[0].max) == pytest.approx((min(values), max(values)))


def test_without_scalars_nothing_is_written(tmp_path):
    Events(tmp_path / "events", 0).close()
    assert not list(tmp_path.iterdir())


def test_events_after_the_step_gone_back_to_are_dropped(tmp_path):
    events = Events(tmp_path, 7)
    events.add(9, "train", {"loss": 1.0})
    events.close()
    (file,) = tmp_path.iterdir()
    starts = [e.step for e in events_of(file) if e.session_log.status]
    assert starts == [8]


def written(events):
    """Waits for what was added so far."""
    events._pool.submit(int).result()


def test_a_place_that_cannot_be_written_is_warned_of_once(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    events = Events(tmp_path / "file", 0)
    for step in range(3):
        events.add(step, "train", {"loss": 1.0})
        written(events)
    events.close()
    assert capsys.readouterr().err.count("warning: no more events") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_hangs_nothing(tmp_path, monkeypatch, capsys):
    events = Events(tmp_path, 0)
    events.add(1, "train", {"loss": 1.0})
    written(events)

    def fail(self, event):
        raise OSError("no space left")

    monkeypatch.setattr(EventsWriter, "write_event", fail)
    for step in range(100):
        events.add(step, "train", {"loss": 1.0})
    events.close()
    assert capsys.readouterr().err.count("could not write: no space left") == 1
    assert read(tmp_path) == [(1, "train/loss", 1.0)]


def test_a_defect_is_raised(tmp_path, no_shape_checks):
    events = Events(tmp_path, 0)
    events.add(1, "train", {"loss": "much"})
    with pytest.raises(TypeError, match="add.reduce"):
        events.close()
    with pytest.raises(TypeError, match="add.reduce"):
        events.add(2, "train", {"loss": 1.0})


def test_a_run_goes_on_without_events(tmp_path, capsys):
    directory = RunDirectory(tmp_path / "run", Config(), resume=False)
    directory.lock()
    # Before events are begun, which another thread does.
    (tmp_path / "run" / "tensorboard").write_text("mine")
    directory.open(0)
    for step in (1, 2):
        directory.log(step, "train", {"loss": 1.0})
    directory.close()
    assert "warning: no more events for TensorBoard" in capsys.readouterr().err
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert metrics.count('"loss": 1.0') == 2


def rows_of(*steps):
    return [{"step": step, "kind": "train", "loss": step / 2} for step in steps]


def points(path):
    """Returns what TensorBoard shows: (step, tag, value, time) of every scalar."""
    shown = []
    for file in sorted(path.iterdir()):
        for event in events_of(file):
            if event.session_log.status:
                shown = [point for point in shown if point[0] < event.step]
            time = event.wall_time
            shown += [
                (event.step, v.tag, v.simple_value, time) for v in event.summary.value
            ]
    return shown


@pytest.fixture
def half_written(tmp_path):
    """Events until step 3, the last of them cut, where five were logged."""
    events = Events(tmp_path, 0)
    for step in (1, 2, 3):
        events.add(step, "train", {"loss": step / 2})
    events.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    return tmp_path


def test_what_a_kill_took_is_written_on_resume(half_written):
    before = points(half_written)[:2]
    events = Events(half_written, 5, rows_of(1, 2, 3, 4, 5))
    events.add(6, "train", {"loss": 3.0})
    events.close()
    found = points(half_written)
    assert [p[:3] for p in found] == [(s, "train/loss", s / 2) for s in range(1, 7)]
    assert found[:2] == before  # with their times
    assert len(list(half_written.iterdir())) == 1


def test_events_are_written_though_nothing_follows_them(tmp_path):
    Events(tmp_path / "new", 5, rows_of(2, 4)).close()
    assert [point[0] for point in points(tmp_path / "new")] == [2, 4]


def test_events_that_are_whole_stay_as_they_are(tmp_path):
    events = Events(tmp_path, 0)
    for step in (1, 2, 3):
        events.add(step, "train", {"loss": step / 2})
    events.close()
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    events = Events(tmp_path, 2, rows_of(1, 2))
    events.add(4, "train", {"loss": 2.0})
    events.close()
    assert file.read_bytes() == before
    assert [point[0] for point in points(tmp_path)] == [1, 2, 4]
    # Events that the metrics lack are no reason to drop them.
    Events(tmp_path, 4, rows_of(1, 3)).close()
    assert [point[0] for point in points(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"", b"?" * 100, b"\1" + b"\0" * 11 + b"?" * 5])
def test_events_of_any_content_are_no_obstacle(content, tmp_path):
    (tmp_path / "events.out.tfevents.1.host").write_bytes(content)
    Events(tmp_path, 2, rows_of(1, 2)).close()
    assert [point[0] for point in points(tmp_path)] == [1, 2]


def test_a_resumed_run_completes_its_events(tmp_path):
    run = tmp_path / "run"
    for step in (0, 2):
        directory = RunDirectory(run, Config(), resume=True)
        directory.lock()
        directory.open(step)
        if step == 0:
            for logged in (1, 2, 3):
                directory.log(logged, "train", {"loss": logged / 2})
        directory.close()
        (run / "checkpoints" / "step_00000002").mkdir(parents=True, exist_ok=True)
        if step == 0:
            (file,) = (run / "tensorboard").iterdir()
            file.write_bytes(file.read_bytes()[:60])
    assert [point[0] for point in points(run / "tensorboard")] == [1, 2]
