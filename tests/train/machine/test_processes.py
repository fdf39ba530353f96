"""Real processes: they train as one does, end when one dies, and go on as others."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from helpers import (
    make_config,
    read_metrics,
    relative,
    save_bright_digits,
    start,
    synthetic_set,
    train_steps,
)

from inertia_jax.checkpoint import load_arrays
from train.__main__ import main
from train.data.feed import make_feed
from train.data.sets import Split
from train.machine.parallel import Parallel
from train.machine.processes import EXIT_LOST, Processes, early_processes, is_lost
from train.run.checkpoints import latest_steps

# Of a process that JAX ends itself, when it has not heard of another for long.
_ABORTED = -signal.SIGABRT
_STEPS = 4


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def ended(processes):
    """Leaves no process behind, whatever fails."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def outputs_of(processes, timeout=300):
    return [process.communicate(timeout=timeout)[0] for process in processes]


WORKER = """
import sys
import jax
import numpy as np
address, index, steps, output = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
from helpers import train_streamed
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
assert jax.device_count() == 4
np.save(output, train_streamed(int(steps)))
"""


@pytest.fixture(scope="module")
def one_process():
    with jax.enable_x64(True):
        return train_steps(make_config(), synthetic_set(16), 1, _STEPS)


@pytest.mark.slow
def test_two_processes_of_two_devices_agree_with_one(
    tmp_path, one_process, subprocess_env
):
    address = f"localhost:{free_port()}"
    env = {**subprocess_env, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    # What takes the time is compiling, and what it makes runs for a second.
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    files = [tmp_path / f"{index}.npy" for index in range(2)]
    processes = [
        start(["-c", WORKER, address, str(i), str(_STEPS), str(file)], env)
        for i, file in enumerate(files)
    ]
    with ended(processes):
        logs = outputs_of(processes)
    assert [p.returncode for p in processes] == [0, 0], "\n".join(logs)
    for file in files:
        assert relative(np.load(file), one_process) < 1e-9


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Five epochs of 41 steps, in float64: `fit` and its options."""
    path = tmp_path_factory.mktemp("data") / "set.npz"
    source = save_bright_digits(path, 328, 37, 8)
    return [
        "fit",
        *("--data.source", source, "--batch-size", "8", "--epochs", "5"),
        *("--data.mean", "0.5", "--data.std", "0.25", "--data.crop-padding", "1"),
        *("--model.name", "lenet", "--model.width", "0.1", "--model.dtype", "float64"),
        *("--optimizer.learning-rate", "0.02", "--checkpoint-steps", "15"),
        *("--log-steps", "5", "--resume"),
    ]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The run of one process that nothing stopped."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with jax.enable_x64(True):
        assert main([*command, "--devices", "1", "--workdir", str(workdir)]) == 0
    return workdir


def start_run(command, num_processes, env, *, slurm=False):
    port = free_port()
    env = {**env, "JAX_ENABLE_X64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    processes = []
    for index in range(num_processes):
        options = ["--coordinator", f"localhost:{port}", "--process-id", str(index)]
        options += ["--num-processes", str(num_processes)]
        added = {}
        if slurm:  # as srun sets them
            options = ["--coordinator", "auto"]
            added = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost"}
            added |= {"SLURM_NTASKS": str(num_processes), "SLURM_PROCID": str(index)}
            added |= {"SLURM_LOCALID": str(index), "JAX_COORDINATOR_PORT": str(port)}
        arguments = ["-m", "train", *command, *options, "--dead-seconds", "15"]
        processes.append(start(arguments, {**env, **added}))
    return processes


def wait_for_checkpoint(workdir, processes, after=0):
    """Waits until there is a checkpoint of a step after `after`."""
    deadline = time.monotonic() + 300
    while not any(s > after for s in latest_steps(workdir / "checkpoints")):
        assert all(p.poll() is None for p in processes), outputs_of(processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def latest(workdir):
    step = latest_steps(workdir / "checkpoints")[-1]
    arrays = load_arrays(workdir / "checkpoints" / f"step_{step:08d}")
    values = [np.ravel(x).astype(float) for x in jax.tree.leaves(arrays)]
    return step, np.concatenate(values)


def evaluations_of(workdir):
    return [x["loss"] for x in read_metrics(workdir) if x["kind"] == "test"]


def assert_same_run(workdir, whole):
    (step, values), (last, expected) = latest(workdir), latest(whole)
    assert step == last == 205
    assert relative(values, expected) < 1e-9
    np.testing.assert_allclose(
        evaluations_of(workdir), evaluations_of(whole), rtol=1e-9
    )


@pytest.mark.slow
def test_two_processes_one_killed_then_four_stopped_then_one(
    command, whole, tmp_path, subprocess_env
):
    workdir = tmp_path / "run"
    command = [*command, "--parallel", "pmap", "--workdir", str(workdir)]
    with ended(start_run(command, 2, subprocess_env, slurm=True)) as processes:
        wait_for_checkpoint(workdir, processes)
        processes[1].kill()
        # Its neighbours hear of it at once; waiting for a heartbeat takes longer.
        output, _ = processes[0].communicate(timeout=60)
    assert processes[0].returncode == EXIT_LOST, output
    assert output.count("error:") == 1
    assert "another process of this run is gone" in output
    assert "Traceback" not in output
    reached = latest_steps(workdir / "checkpoints")[-1]
    files = {p.name for p in (workdir / "checkpoints").rglob("ocdbt.process_*")}
    assert files == {"ocdbt.process_0", "ocdbt.process_1"}  # both wrote
    assert 0 < reached < 190

    with ended(start_run(command, 4, subprocess_env)) as processes:
        wait_for_checkpoint(workdir, processes, after=reached)
        processes[2].send_signal(signal.SIGTERM)  # one is told, all must stop
        logs = outputs_of(processes)
    assert [p.returncode for p in processes] == [0] * 4, "\n".join(logs)
    assert f"step {reached} of 205" in logs[0]
    assert "stopped by SIGTERM and saved at step" in logs[0]
    assert not any("stopped" in log for log in logs[1:])  # the first speaks for all
    made = [json.loads(x) for x in (workdir / "run.jsonl").read_text().splitlines()]
    assert [run["num_processes"] for run in made] == [2, 4]

    assert reached < latest_steps(workdir / "checkpoints")[-1] < 205
    with jax.enable_x64(True):
        assert main([*command, "--devices", "1"]) == 0
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_two_processes_tune_a_checkpoint_as_one(whole, tmp_path, subprocess_env):
    command = ["finetune", str(whole), "--teacher", str(whole), "--epochs", "1"]
    command += ["--freeze", "conv1", "--batch-size", "8"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    with jax.enable_x64(True):
        assert main([*command, "--workdir", str(alone)]) == 0
    command += ["--workdir", str(together)]
    with ended(start_run(command, 2, subprocess_env)) as processes:
        logs = outputs_of(processes)
    assert [p.returncode for p in processes] == [0, 0], "\n".join(logs)
    (step, values), (last, expected) = latest(together), latest(alone)
    assert step == last == 41
    assert relative(values, expected) < 1e-9
    assert evaluations_of(alone)[-1] != evaluations_of(whole)[-1]
    np.testing.assert_allclose(
        evaluations_of(together), evaluations_of(alone), rtol=1e-9
    )


@pytest.mark.slow
def test_four_processes_one_hangs_then_two(command, whole, tmp_path, subprocess_env):
    workdir = tmp_path / "run"
    command = [*command, "--parallel", "shard_map", "--workdir", str(workdir)]
    with ended(start_run(command, 4, subprocess_env)) as processes:
        wait_for_checkpoint(workdir, processes)
        processes[3].send_signal(signal.SIGSTOP)  # its connections stay open
        began = time.monotonic()
        logs = outputs_of(processes[:3], timeout=100)
        assert time.monotonic() - began < 60
    # Whoever hears of it first ends the rest, by JAX's own means.
    assert {p.returncode for p in processes[:3]} <= {_ABORTED, EXIT_LOST}
    for log in logs:
        assert "is gone" in log or "another task died" in log, log
    reached = latest_steps(workdir / "checkpoints")[-1]
    assert 0 < reached < 205

    env = {**subprocess_env, "JAX_NUM_CPU_DEVICES": "2"}
    with ended(start_run(command, 2, env)) as processes:
        logs = outputs_of(processes)
    assert [p.returncode for p in processes] == [0, 0], "\n".join(logs)
    assert f"step {reached} of 205" in logs[0]
    assert "test top-1" in logs[0] and "test top-1" not in logs[1]
    assert_same_run(workdir, whole)

    found = tmp_path / "found.json"
    command = ["evaluate", str(workdir), "--batch-size", "10", "--out", str(found)]
    with ended(start_run(command, 2, env)) as processes:
        logs = outputs_of(processes)
    assert [p.returncode for p in processes] == [0, 0], "\n".join(logs)
    assert "top-1" in logs[0] and "top-1" not in logs[1]
    loss = json.loads(found.read_text())["loss"]
    assert np.isclose(loss, evaluations_of(whole), rtol=1e-9, atol=0).any()


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("fit", ["--coordinator", "auto"], "finds no cluster that JAX knows: SLURM"),
        ("evaluate", ["--coordinator", "auto"], "finds no cluster"),
        ("finetune", ["--coordinator", "auto"], "finds no cluster"),
        ("fit", ["--coordinator", "here"], "must be HOST:PORT or `auto`"),
        ("finetune", ["--num-processes=2"], "`num_processes` .*2.* needs"),
        (
            "evaluate",
            ["--dead-seconds=5"],
            "`dead_seconds` .*5.* needs `--coordinator`",
        ),
        ("fit", ["--coordinator", "a:1", "--dead-seconds", "0"], "`dead_seconds` .*0"),
    ],
)
def test_what_cannot_be_joined_is_one_error(verb, arguments, message, capsys):
    checkpoint = [] if verb == "fit" else ["nowhere"]
    if "SLURM_JOB_ID" in os.environ or "KUBERNETES_SERVICE_HOST" in os.environ:
        pytest.skip("this is a cluster that JAX knows")
    # As in a fresh process, where no device has been used yet.
    initialized = "jax._src.xla_bridge.backends_are_initialized"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialized, lambda: False)
        assert main([verb, *checkpoint, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_process_whose_first_never_comes_says_so(command, subprocess_env):
    address = f"localhost:{free_port()}"
    options = ["--coordinator", address, "--num-processes", "2", "--process-id", "1"]
    arguments = ["-m", "train", *command, *options, "--join-seconds", "1"]
    with ended([start(arguments, subprocess_env)]) as processes:
        (output,) = outputs_of(processes, timeout=100)
    assert processes[0].returncode == 2
    assert output.count("error:") == 1
    assert f"no process 0 answers at `coordinator` (={address})" in output


def test_processes_of_different_commands_end(command, tmp_path, subprocess_env):
    options = ["--num-processes", "2", "--coordinator", f"localhost:{free_port()}"]
    commands = [
        [*command, "--epochs", str(5 - i), *options, "--process-id", str(i)]
        for i in range(2)
    ]
    workdir = ["--workdir", str(tmp_path / "run")]
    with ended(
        [start(["-m", "train", *c, *workdir], subprocess_env) for c in commands]
    ) as processes:
        logs = outputs_of(processes, timeout=100)
    assert [p.returncode for p in processes] == [2, 2], "\n".join(logs)
    for log in logs:
        assert "the configuration of process 1 is not that of process 0" in log


def test_what_only_looks_like_a_lost_process_is_none(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for words, lost in [
        ("Gloo all-reduce failed: Connection closed by peer", True),
        ("NCCL operation failed: unhandled system error", True),
        ("ncclCommInitRank failed: invalid usage", False),
        ("RESOURCE_EXHAUSTED: out of memory for NCCL buffers", False),
        ("INTERNAL: a kernel failed", False),
    ]:
        assert is_lost(jax.errors.JaxRuntimeError(words)) == lost
    assert not is_lost(ValueError("connection"))


def test_a_process_reads_only_the_rows_of_its_own_devices():
    read = []

    class Images(np.ndarray):
        def __getitem__(self, index):
            if isinstance(index, np.ndarray):
                read.extend(index.ravel().tolist())
            return super().__getitem__(index)

    split = synthetic_set(size=4).train
    split = Split(split.images.view(Images), split.labels)

    @dataclasses.dataclass(frozen=True)
    class Half(Parallel):
        """The second four of eight devices are another process's."""

        @property
        def own(self):
            return (0, 1, 2, 3)

        def spread_own(self, tree):
            return jax.tree.map(jnp.asarray, tree)

    feed = make_feed(split, Half("pmap", tuple(jax.devices())), memory_share=1e-9)
    order = np.random.default_rng(0).permutation(64)[:48].reshape(3, 16)
    [(images, labels, indices)] = feed.calls(order, 3)
    mine = order.reshape(3, 8, 2)[:, :4].swapaxes(0, 1).reshape(4, 6)
    assert sorted(read) == sorted(mine.ravel().tolist())
    np.testing.assert_array_equal(images, np.asarray(split.images)[mine])
    np.testing.assert_array_equal(labels, split.labels[mine])
    assert indices.shape == (4, 3, 2)


def test_none_is_no_coordinator():
    words = ["--coordinator", "None", "--num_processes=None", "--process-id", "3"]
    assert early_processes(words) == Processes(process_id=3)
