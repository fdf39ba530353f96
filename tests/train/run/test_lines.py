"""Logs of a run: read as far as they can be, and never in the way of a run."""

import errno
import json
import os
import pathlib
import socket

import pytest
from helpers import make_odd

from train.__main__ import main
from train.config import Config
from train.errors import UsageError
from train.run.checkpoints import find_checkpoint
from train.run.directory import RunDirectory
from train.run.lines import Log, read_metrics, read_starts
from train.run.report import make_record


def row(step, kind="train", **numbers):
    return {"step": step, "kind": kind, "loss": step / 2, **numbers}


def lines(*rows):
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


EPOCH = row(2, "epoch", epoch=1, accuracy=0.5, images_per_s=1.0)
TEST = row(2, "test", epoch=1, top1=0.5, top5=1.0)
HALF = b'{"step": 3, "kind": "tr'
DEEP = b'{"step": 3, "kind": ' + b"[" * 100_000


@pytest.mark.parametrize(
    ("garbage", "is_said"),
    [
        (b"", False),
        (b"\n", True),
        (HALF + b"\n", True),
        (b"\0" * 4096 + b"\n", True),
        (b"\xff\xfe\n", True),
        (b"[]\n", True),
        (b"null\n", True),
        (b"7\n", True),
        (DEEP + b"\n", True),
        (b'{"step": "3", "kind": "train"}\n', True),
        (b'{"step": 3.5, "kind": "train"}\n', True),
        (b'{"step": true, "kind": "train"}\n', True),
        (b'{"step": 3}\n', True),
        (b'{"step": 3, "kind": []}\n', True),
        (b'{"step": 3, "kind": "epoch", "epoch": 1}\n', True),
        (b'{"step": 3, "kind": "test", "epoch": "1", "loss": 1}\n', True),
        # The line after it is whole.
        (HALF, True),
        (b"\0" * 4096, True),
    ],
)
def test_what_cannot_be_read_is_left_out_and_said(garbage, is_said, tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(lines(row(1)) + garbage + lines(EPOCH, TEST))
    assert read_metrics(file) == [row(1), EPOCH, TEST]
    told = capsys.readouterr().err
    assert ("left out: 2." in told and str(file) in told) == is_said
    assert told.count("\n") == is_said


def test_a_last_line_counts_if_it_is_whole(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(lines(row(1), row(2))[:-1])
    assert read_metrics(file) == [row(1), row(2)]
    assert not capsys.readouterr().err
    file.write_bytes(lines(row(1)) + HALF)
    assert read_metrics(file) == [row(1)]
    assert "of its 2 lines" in capsys.readouterr().err


def test_many_lines_are_said_in_few_words(tmp_path, capsys):
    file = tmp_path / "run.jsonl"
    start = lines({"started": "now", "versions": {"started": "x"}})
    file.write_bytes(b"?\n?\n" + start + (b"?\n" + start) * 8)
    assert len(read_starts(file)) == 9
    assert "left out: 1-2, 4, 6, 8, 10 and 4 more." in capsys.readouterr().err


ODD = ["directory", "pipe", "loop", "link to nothing"]


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_left_out(kind, tmp_path, capsys):
    make_odd(kind, tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert "metrics.jsonl: no file." in capsys.readouterr().err
    assert read_metrics(tmp_path / "none") == [] and not capsys.readouterr().err


def begin(path, *, step=0, resume=True):
    directory = RunDirectory(path, Config(), resume=resume)
    directory.lock()
    directory.open(step)
    return directory


@pytest.fixture
def saved(tmp_path):
    """The directory of a run with metrics and something that is called a checkpoint."""
    directory = begin(tmp_path / "run")
    for step in (1, 2, 3):
        directory.log(step, "train", {"loss": step / 2})
    directory.close()
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.jsonl"])
@pytest.mark.parametrize("garbage", [HALF, b"\n", b"\0\0\0", b"[1]\n"])
def test_a_run_goes_on_whatever_is_in_its_logs(name, garbage, saved, capsys):
    with (saved / name).open("ab") as file:
        file.write(garbage)
    begin(saved, step=2).close()
    assert f"{saved / name}: of its" in capsys.readouterr().err
    left = read_metrics(saved / "metrics.jsonl")
    assert all(line.pop("time") > 0 for line in left)
    assert left == [row(1), row(2)]
    assert [start["step"] for start in read_starts(saved / "run.jsonl")] == [0, 2]
    assert not capsys.readouterr().err  # both are whole again


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.jsonl"])
@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_log_is_put_aside(name, kind, saved, capsys):
    for number in (1, 2):
        (saved / name).unlink()
        make_odd(kind, saved / name)
        directory = begin(saved, step=2)
        directory.log(3, "train", {"loss": 1.5})
        directory.close()
        aside = "damaged_" * number + name
        assert f"it is put aside as {aside}." in capsys.readouterr().err
        assert aside in os.listdir(saved)
        assert (saved / name).is_file()


def test_lines_wait_until_there_is_space(tmp_path, monkeypatch, capsys):
    log = Log(tmp_path / "log")
    log.add({"a": 1})

    def write_half(file, content):
        file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("train.run.lines._write_all", write_half)
        log.add({"b": 2})
        log.add({"c": 3})
        told = capsys.readouterr().err
        log.close()
        lost = f"2 lines of {tmp_path / 'log'} could not be written"
        assert lost in capsys.readouterr().err
    assert (tmp_path / "log").read_text() == '{"a": 1}\n'
    assert told.count("\n") == 1
    assert f"could not write {tmp_path / 'log'}: No space left on device" in told
    log.close()
    assert not capsys.readouterr().err
    assert (tmp_path / "log").read_text() == '{"a": 1}\n{"b": 2}\n{"c": 3}\n'


CONFIGS = [
    "[]",
    "null",
    "7",
    '"x"',
    "[" * 100_000,
    '{"data": ' + "[" * 100_000,
    "{",
    "",
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_of_another_type_is_one_sentence(config, saved):
    (saved / "config.json").write_text(config)
    before = sorted(saved.rglob("*"))
    what = r"config.json (is no JSON|holds no config).* beside it are left"
    with pytest.raises(UsageError, match=what):
        RunDirectory(saved, Config(), resume=True)
    with pytest.raises(UsageError, match=r"config.json (is no JSON|holds no config)"):
        make_record(saved)
    assert sorted(saved.rglob("*")) == before


def test_commands_in_errors_are_those_of_this_shell(saved, monkeypatch):
    monkeypatch.setattr("sys.executable", "/an environment/bin/python")
    command = "`'/an environment/bin/python' -m train {}`"
    (saved / "config.json").write_text("[]")
    with pytest.raises(UsageError, match=command.format("finetune")):
        RunDirectory(saved, Config(), resume=True)
    with pytest.raises(UsageError, match=command.format("import")):
        find_checkpoint(saved / "config.json")


def test_fields_of_another_type_are_named(saved):
    (saved / "config.json").write_text('{"data": [], "epochs": null}')
    with pytest.raises(UsageError, match=r"data: \[\] there") as found:
        RunDirectory(saved, Config(), resume=True)
    assert "epochs: None there" in str(found.value)


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_that_cannot_be_is_one_sentence(resume, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="name too long"):
        RunDirectory(tmp_path / ("x" * 300), Config(), resume=resume)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/run\) cannot be written"):
        RunDirectory(tmp_path / "file" / "run", Config(), resume=resume)
    with pytest.raises(UsageError, match="gs:/bucket/run is a URL"):
        RunDirectory(pathlib.Path("gs://bucket/run"), Config(), resume=resume)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="cannot be written"):
        RunDirectory(tmp_path / "run", Config(), resume=resume)


def test_a_place_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    begin(tmp_path / "run").close()
    assert "cannot keep other runs out" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [*ODD, "socket"])
def test_a_lock_that_is_no_file_is_named(kind, tmp_path, monkeypatch):
    lock = tmp_path / ".lock"
    if kind == "socket":
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(lock.name)
    else:
        make_odd(kind, lock)
    opened = os.listdir("/dev/fd")
    with pytest.raises(UsageError) as found:  # and not for ever
        begin(tmp_path)
    assert str(found.value) == f"{lock}: no regular file; remove it"
    assert len(os.listdir("/dev/fd")) == len(opened)
    assert os.listdir(tmp_path) == [".lock"]


@pytest.mark.parametrize("name", [".lock", "config.json", "run.jsonl", "metrics.jsonl"])
def test_nothing_is_written_through_a_link(name, saved, tmp_path):
    mine, file = tmp_path / "mine", saved / name
    file.rename(mine)
    file.symlink_to(mine)
    before = mine.read_bytes(), mine.stat().st_mtime_ns
    if name == ".lock":
        with pytest.raises(UsageError, match="no regular file"):
            begin(saved, step=2)
    else:
        directory = begin(saved, step=2)
        directory.log(3, "train", {"loss": 1.0})
        directory.close()
        assert file.is_file() and not file.is_symlink()
    assert (mine.read_bytes(), mine.stat().st_mtime_ns) == before


def test_a_report_draws_what_can_be_read(saved, capsys):
    again = {**EPOCH, "step": 4, "epoch": 2}
    content = lines(EPOCH, TEST, again) + HALF + b"\n" + lines({**TEST, "epoch": 2})
    (saved / "metrics.jsonl").write_bytes(content)
    (saved / "run.jsonl").write_bytes(b"\0\n")
    record = make_record(saved)
    assert [line["epoch"] for line in record["curve"]] == [1, 2]
    assert record["starts"] == []
    starts, metrics = capsys.readouterr().err.splitlines()
    assert starts.endswith("left out: 1.") and metrics.endswith("left out: 4.")
    (saved / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(UsageError, match="metrics.jsonl has no epoch that ended"):
        make_record(saved)


@pytest.mark.parametrize("config", ["[]", "null", "[" * 9999])
def test_a_run_is_refused_before_its_data_are_read(config, saved, tmp_path, capsys):
    (saved / "config.json").write_text(config)
    for workdir in (saved, tmp_path / ("x" * 300)):
        arguments = ["fit", "--data.source", "npz:none.npz", "--resume"]
        assert main([*arguments, "--workdir", str(workdir)]) == 2
        told = capsys.readouterr().err
        assert "none.npz" not in told and told.count("\n") == 1
