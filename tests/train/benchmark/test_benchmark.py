"""What `benchmark` measures and records, and what is set before JAX starts."""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from helpers import make_config, synthetic_set

import inertia_jax as ij
from inertia_jax.compression.sites import find_sites
from train.__main__ import main
from train.benchmark import accelerator as bench_accelerator
from train.benchmark import checks as bench_checks
from train.benchmark import ops as bench_ops
from train.benchmark import startup as bench_startup
from train.benchmark.loop import _blocks, overhead
from train.benchmark.timing import median_with_interval, relative_gap, times_in_turn
from train.errors import UsageError
from train.fit.trainer import Trainer
from train.machine import platform
from train.verbs.benchmark import SUITES

WHAT = ("train", "eval")
# Options of each suite beside `--help` and `--out`.
NETWORKS = {"models", "batch-size", "width", "against"}
OPTIONS = {
    "checkpoints": {
        *("against", "batch-sizes", "train", "no-train", "repeats", "image-size"),
        *("dtype", "data", "model"),
    },
    "train": {*NETWORKS, "dtype", "repeats"},
    "infer": {*NETWORKS, "repeats"},
    "ops": {"batch-size", "dtype", "against", "repeats"},
    "checks": {"width"},
    "accelerator": {
        *("minutes", "skip", "data", "epochs", "width", "batch-size", "against"),
        "repeats",
    },
    "memory": NETWORKS,
    "startup": {"verbs", "repeats", "against", "small-pages", "no-small-pages"},
    "loop": {"config", "data", "width", "steps", "repeats"},
    "inertial": {
        *("batch-size", "width", "models", "image-size", "layers", "tile-size"),
        *("ops", "no-ops", "repeats"),
    },
    "tiles": {"sides", "channels", "tile-sizes", "figure"},
    "tucker": {*NETWORKS, "stem", "repeats"},
    "sweep": {"sweep", "data", "batch-size", "steps", "repeats"},
    "compile": {
        *("device", "chips", "models", "networks", "programs", "dtypes", "width"),
        *("batch-size", "eval-batch-size", "sync-batch-norm", "no-sync-batch-norm"),
    },
}
NARROW = ["--models", "vgg16", "--width", "0.02", "--batch-size", "2", "--repeats", "2"]


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_has_its_own_options_alone(suite, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["benchmark", "--suite", suite, "--help"])
    said = set(re.findall(r"(?<!\S)--([a-z][a-z-]+)", capsys.readouterr().out))
    assert said - {"suite", "help", "out"} == OPTIONS[suite]


def test_options_of_other_suites_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "--steps", "3", "--suite", "ops"])
    assert "--steps" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "--suite", "speed"])
    assert "'speed' must be one of checkpoints, train" in capsys.readouterr().err
    assert main(["benchmark", "--suite=startup", "--repeats", "0"]) == 2
    assert "`repeats` (=0) must be >= 1." in capsys.readouterr().err
    assert main(["benchmark", "--suite", "tucker", "--stem", "imagenet"]) == 2
    assert "`stem` (=imagenet) is for `models`" in capsys.readouterr().err


def test_starts_are_timed_from_the_root_of_the_repository():
    assert (bench_startup._ROOT / "configs" / "quickstart.py").is_file()


def test_a_start_is_timed_to_what_it_prints(tmp_path, monkeypatch):
    program = tmp_path / "train" / "__main__.py"
    program.parent.mkdir()
    program.write_text(
        """if True:
        import os, sys, time
        print(sys.argv[1], "before")
        while not os.path.exists("seen"): time.sleep(0.01)
        start = time.process_time()
        while time.process_time() - start < 0.3: pass
        sys.exit("early") if sys.argv[1] == "fail" else print("after")
        time.sleep(60)
        """
    )
    cpu_seconds = bench_startup._cpu_seconds

    def seen(process_id):
        seconds = cpu_seconds(process_id)
        (tmp_path / "seen").touch()  # the program goes on once it was looked at
        return seconds

    monkeypatch.setattr(bench_startup, "_cpu_seconds", seen)
    start = functools.partial(
        bench_startup._start, root=tmp_path, caches=tmp_path, marks=("before", "after")
    )
    found = start(["fit"])
    assert list(found) == ["compiling", "first step"]
    (cpu_before, before), (cpu_after, after) = found.values()
    assert cpu_after - cpu_before >= 0.26  # the system counts hundredths, of two kinds
    assert 0 < before < after
    with pytest.raises(UsageError, match=r"(?s)\['fail'\] ended early: .*early"):
        start(["fail"])


def test_starts_of_two_checkouts_take_turns(tmp_path, monkeypatch):
    started = []

    def start(command, *, root, caches, marks):
        started.append((command, root, caches.name))
        number = len(started)
        return {"compiling": (number, 2 * number), "first step": (number, number)}

    monkeypatch.setattr(bench_startup, "_start", start)
    suite = bench_startup.Suite(verbs=("fit",), repeats=3, against=str(tmp_path))
    (row,) = suite.rows()
    assert [root for _, root, _ in started[:4]] == 2 * [ROOT] + 2 * [tmp_path]
    cold, cached = started[0], started[1]
    assert cold[2] == cached[2] != started[4][2]  # a round has its own cache
    assert cold[0][:3] == ["fit", "--config", "configs/quickstart.py"]
    assert cold[0][-2:] != cached[0][-2:]  # each has its own directory
    spread = {"median": 12, "min": 4, "max": 20}
    assert row["here, cached"]["compiling"]["wall_s"] == spread
    assert row["here, cached"]["first step"]["cpu_s"] == {
        "median": 6,
        "min": 2,
        "max": 10,
    }
    assert set(row) == {
        "verb",
        *(f"{s}, {c}" for s in ("here", "against") for c in ("cold", "cached")),
    }


def test_help_lists_the_suites_and_imports_none():
    code = """if True:
        import sys
        from train.__main__ import main
        try:
            main(["benchmark", "--help"])
        finally:
            print("imported", {"torch"} & {*sys.modules})
            print([name for name in sys.modules if name.startswith("train.bench")])
    """
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    *said, torch, suites = found.stdout.splitlines()
    assert (torch, suites) == ("imported set()", "[]")
    listed = [line.split()[0] for line in said if line.startswith("  ")]
    assert [name for name in listed if name in SUITES] == list(SUITES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "digits"), [("infer", 2), ("tucker", 2), ("inertial", 1)]
)
def test_a_suite_prints_and_records_what_it_found(
    suite, digits, monkeypatch, tmp_path, capsys
):
    record, out = ROOT / "results" / f"{suite}_cpu.json", tmp_path / "record.json"
    rows = json.loads(record.read_text())["rows"]
    found = iter(rows)
    module = importlib.import_module(f"train.benchmark.{suite}")
    monkeypatch.setattr(module.Suite, "measure", lambda suite, case: next(found))
    models = [] if suite == "inertial" else ["--models", "resnet18"]
    assert main(["benchmark", "--suite", suite, *models, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == rows
    said = capsys.readouterr().out
    for row in rows:
        tables = [row["times"]] if suite == "inertial" else row["times"].values()
        for name, times in itertools.chain(*(table.items() for table in tables)):
            ms = f"{times['median_ms']:.{2 if 'part' in name else digits}f} ms"
            assert any(name in line and ms in line for line in said.splitlines())


@pytest.mark.slow
def test_tiles_are_timed_and_drawn(tmp_path, capsys):
    out, figure = tmp_path / "record.json", tmp_path / "map.png"
    words = ["--sides", "8", "12", "--channels", "4", "--tile-sizes", "2", "4"]
    words += ["--out", str(out), "--figure", str(figure)]
    assert main(["benchmark", "--suite", "tiles", *words]) == 0
    rows = json.loads(out.read_text())["rows"]
    cases = [(row["tile_size"], row["shape"][1]) for row in rows]
    assert cases == [(2, 8), (2, 12), (4, 8), (4, 12)]
    said = capsys.readouterr().out
    for row in rows:
        assert row["shape"][0] == 2**22 // (row["shape"][1] ** 2 * 4)
        assert min(row["dense_ms"], *row["ms"]) > 0
        for rate, ms in zip(row["open"], row["ms"], strict=True):
            words = f"{rate:.0%} open" if rate else "closed"
            line = rf"{words} +{ms:.2f} ms +{row['dense_ms'] / ms:.2f}x"
            assert re.search(line, said)
    assert figure.read_bytes().startswith(b"\x89PNG")
    for option, message in (
        (["--figure", "map.xyz"], "`figure` .* must end in .png or .svg"),
        (["--tile-sizes", "1"], "`tile_sizes` .* must be >= 2"),
    ):
        assert main(["benchmark", "--suite", "tiles", *option]) == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_steps_are_timed_and_set_against_the_peak(tmp_path, capsys):
    out = tmp_path / "record.json"
    assert main(["benchmark", *NARROW, "--against", "nnx", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in said[2:]] == [["vgg16", w, "2"] for w in WHAT]
    for what, kind in itertools.product(WHAT, ("jax", "nnx")):
        found = row[what][kind]
        assert 0 < found["min_ms"] <= found["median_ms"] <= found["max_ms"]
        assert found["images_per_s"] == pytest.approx(2e3 / found["median_ms"])
        share = found["gflops"] / row["peak_gflops"]
        assert found["share_of_peak"] == pytest.approx(share)
        assert 0 < share < 1
    # There are two gradients beside the forward pass.
    flops = [row[w]["jax"]["gflops"] * row[w]["jax"]["median_ms"] for w in WHAT]
    assert flops[0] == pytest.approx(3 * flops[1])


def test_parts_for_an_accelerator_leave_each_other_alone(tmp_path, capsys, monkeypatch):
    def run_part(name, arguments, *, seconds):
        assert 0 < seconds <= 60
        if name != "train resnet18":
            return {"part": name, "outcome": "failed", "seconds": 1.0, "said": ["no"]}
        found = {"machine": {"device": "a chip"}, "rows": [1]}
        return {"part": name, "outcome": "done", "seconds": 2.0, "said": [], **found}

    monkeypatch.setattr(bench_accelerator, "run_part", run_part)
    out = tmp_path / "record.json"
    command = ["benchmark", "--suite", "accelerator", "--skip", "memory", "infer"]
    assert main([*command, "--minutes", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    outcomes = [(row["part"], row["outcome"]) for row in record["rows"]]
    assert outcomes == [
        ("checks", "failed"),
        ("train resnet18", "done"),
        *((f"train {name}", "failed") for name in ("vgg16", "simpledla")),
    ]
    assert record["machine"]["device"] == "a chip"
    assert record["machine"]["command"].startswith("python -m train")
    assert "checks: failed after 1 s\nno\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "seconds", "outcome"),
    [
        (["--version"], 60, "done"),
        (["benchmark", "--suite", "nothing"], 60, "failed"),
        (["quickstart"], 0.1, "stopped"),
        (["quickstart"], 0, "not begun"),
    ],
)
def test_a_part_is_a_program_with_an_outcome(arguments, seconds, outcome):
    row = bench_accelerator.run_part("part", arguments, seconds=seconds)
    assert (row["outcome"], row["arguments"]) == (outcome, arguments)
    if outcome == "done":
        assert row["said"][0].split() == ["inertia_jax", ij.__version__]
    if outcome == "failed":
        assert "'nothing' must be one of" in row["said"][-1]


def test_each_row_is_recorded_as_soon_as_it_is_measured(tmp_path, monkeypatch):
    out = tmp_path / "record.json"

    def measure(self, case):
        if case == "Tucker-2":
            raise KeyboardInterrupt
        return {"case": case, "gaps": {}}

    monkeypatch.setattr(bench_checks.Suite, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        main(["benchmark", "--suite", "checks", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["convolution", "strided convolution"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["window", "ladder"])
def test_this_device_is_as_near_to_float64_as_its_types_allow(case):
    gaps = bench_checks.Suite().measure(case)["gaps"]
    for dtype, unit in (("float32", 2**-23), ("bfloat16", 2**-7)):
        assert gaps[dtype]["device"] == gaps[dtype]["cpu"]
        assert all(0.1 * unit < gap < 10 * unit for gap in gaps[dtype]["cpu"].values())


@pytest.mark.slow
def test_operations_are_timed_beside_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_ops, "STAGES", ((8, 4),))
    out = tmp_path / "record.json"
    command = ["benchmark", "--suite", "ops", "--repeats", "1", "--batch-size", "3"]
    if importlib.util.find_spec("torch") is not None:
        command += ["--against", "torch"]
    assert main([*command, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    times, said = row["times"], capsys.readouterr().out
    assert row["shape"] == [3, 8, 8, 4] and row["rank"] == 2
    names = [name for name in times if not name.endswith(", PyTorch")]
    assert all(f"  {name} " in said for name in names)
    work = {
        name: found["gflops"] * found["median_ms"]
        for name, found in times.items()
        if "gflops" in found
    }
    # MACs: 3 x 8 x 8 pixels of 9 x 4 x 4, of 4 x 4, or of 4 x 2 + 9 x 2 x 2 + 2 x 4.
    assert work["conv 3x3"] == pytest.approx(2e-6 * 192 * 144)
    assert work["conv 3x3, gradient"] == pytest.approx(3 * work["conv 3x3"])
    assert work["conv 1x1"] == pytest.approx(2e-6 * 192 * 16)
    assert work["Tucker-2"] == pytest.approx(2e-6 * 192 * 52)
    assert ("conv 3x3, PyTorch" in times) == ("--against" in command)


@pytest.mark.slow
def test_the_loop_is_timed_beside_its_bare_steps(tmp_path, capsys):
    out = tmp_path / "record.json"
    command = ["benchmark", "--suite", "loop", "--config", "configs/quickstart.py"]
    # An epoch has 22 steps, so that blocks come from two epochs.
    command += ["--width", "0.01", "--steps", "5", "--repeats", "6"]
    assert main([*command, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["steps"], row["rounds"], row["steps_per_epoch"]) == (5, 6, 22)
    for name in ("bare", "whole", "first_input", "checkpoint"):
        assert 0 < row[name]["min_ms"] <= row[name]["median_ms"] <= row[name]["max_ms"]
    extra = row["first_input"]["median_ms"] + row["checkpoint"]["median_ms"]
    more = row["added_to_epoch"] - row["added_to_steps"]["median"]
    # The median of both together is not the sum of medians.
    assert more == pytest.approx(extra / (4.4 * row["bare"]["median_ms"]), rel=0.5)
    said = capsys.readouterr().out
    assert f"the loop adds to an epoch: {row['added_to_epoch']:.2%}" in said


@pytest.mark.parametrize(("steps", "repeats"), [("23", "6"), ("5", "5")])
def test_blocks_that_cannot_be_are_refused(steps, repeats, capsys):
    command = ["benchmark", "--suite", "loop", "--config", "configs/quickstart.py"]
    command += ["--width", "0.01", "--steps", steps, "--repeats", repeats]
    assert main(command) == 2
    said = {
        "23": "`steps` (=23) must be at most 22",
        "5": "`repeats` (=5) must be >= 6",
    }
    assert said[steps] in capsys.readouterr().err


def test_blocks_hold_whole_calls_of_one_epoch():
    config = dataclasses.replace(make_config("float32"), steps_per_call=3)
    trainer = Trainer(config, synthetic_set(16, num_train=10 * 32))
    blocks = _blocks(trainer, 2)
    taken = [[np.asarray(x[2]) for x in next(blocks)] for _ in range(3)]
    blocks.close()
    # Ten steps: three calls of three, of which two make a block, and one that is short.
    first, second = (
        [np.asarray(x[2]) for x in trainer.inputs(epoch, 0)] for epoch in (0, 1)
    )
    for found, expected in zip(taken, (first, second), strict=False):
        np.testing.assert_array_equal(found, expected[:2])
    assert all(len(block) == 2 for block in taken)


def test_what_a_loop_adds_is_of_pairs():
    # The machine slows down tenfold; every whole block takes a twentieth longer.
    bare = [100.0, 200.0, 300.0, 500.0, 800.0, 1000.0]
    whole = [1.05 * ms for ms in bare]
    whole[0] = 400.0  # something else ran
    found = overhead(bare, whole, [10.0, 20.0, 90.0], blocks_per_epoch=5)
    assert found["added_to_steps"]["median"] == pytest.approx(0.05)
    assert found["added_to_steps"]["low_95"] == pytest.approx(0.05)
    assert found["added_to_steps"]["high_95"] == pytest.approx(3)
    assert found["added_to_epoch"] == pytest.approx(0.05 + 20 / (5 * 400))


def test_medians_have_intervals():
    # P(at most 1 of 9 above the median) is 10 / 512; of at most 2 it is 46 / 512.
    found = median_with_interval([9, 2, 7, 4, 5, 6, 3, 8, 1])
    assert found == {"median": 5, "low_95": 2, "high_95": 8}
    with pytest.raises(ValueError, match="at least six"):
        median_with_interval([1.0] * 5)


def test_calls_are_in_turn_and_the_first_round_is_not_timed(monkeypatch):
    calls, clock = [], itertools.count()
    now = [0.0]

    def call(name):
        calls.append(name)
        now[0] += next(clock)  # 0, 1, 2, ... seconds

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    functions = {name: functools.partial(call, name) for name in "ab"}
    prepare = functools.partial(calls.append, "-")
    times = times_in_turn(
        functions, repeats=2, before=lambda name: functions[name](), prepare=prepare
    )
    assert "".join(calls) == "-aabb-bbaa-aabb"
    # Calls 0 to 3 are the first round's, and of the others every second is timed.
    assert times == {"a": [7000, 9000], "b": [5000, 11000]}


@pytest.mark.slow
def test_factors_by_tensorly_in_pytorch_give_the_same_logits():
    reason = "needs PyTorch and TensorLy: the extra `torch`"
    pytest.importorskip("tensorly", reason=reason)
    from train.benchmark.tucker import tensorly_factors, torch_call

    dense = ij.create_model("resnet18", width=0.2, stem="imagenet")
    shape = (64, 64, 3)
    variables = ij.init_variables(dense, jax.random.key(0), shape)
    model, compressed = ij.compress(
        dense, variables, ranks=ij.Ratio(0.3), image_shape=shape
    )
    factors = tensorly_factors(find_sites(dense, variables, shape), model.plan)
    assert len(factors) == 3 * len(model.plan.rules) > 30
    images = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    found = torch_call(model, compressed, images, changed=factors)()
    expected = model.apply(compressed, images)
    assert relative_gap(found, expected) < 1e-5
    changed = {"layer1.0.conv1.1.weight": 2 * factors["layer1.0.conv1.1.weight"]}
    found = torch_call(model, compressed, images, changed={**factors, **changed})()
    assert relative_gap(found, expected) > 1e-3


@pytest.fixture
def cache_settings():
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    settings = {name: jax.config.values[name] for name in names}
    yield settings
    for name, value in settings.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_unless_the_user_says_where(
    cache_settings, monkeypatch, tmp_path
):
    place, size, seconds = cache_settings
    jax.config.update(place, "/theirs")
    before = {name: jax.config.values[name] for name in cache_settings}
    platform.use_compilation_cache()
    assert {name: jax.config.values[name] for name in cache_settings} == before
    jax.config.update(place, None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    platform.use_compilation_cache()
    expected = {place: f"{tmp_path}/inertia_jax/compiled", size: 2 << 30, seconds: 0}
    assert {name: jax.config.values[name] for name in cache_settings} == expected


def test_flags_that_the_user_set_stay_set(monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS",
        "--xla_cpu_experimental_ynn_fusion_type=1 --xla_cpu_scheduler_type=2",
    )
    platform.choose_cpu_flags()
    flags = platform.os.environ["XLA_FLAGS"]
    assert flags.count("ynn") == flags.count("scheduler") == 1


def test_versions_without_a_flag_are_not_given_it(monkeypatch):
    def chosen(version):
        monkeypatch.setenv("XLA_FLAGS", "--other")
        monkeypatch.setattr(platform.jaxlib.version, "__version_info__", version)
        platform.choose_cpu_flags()
        return platform.os.environ["XLA_FLAGS"]

    ynn = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"
    scheduler = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    assert chosen((0, 9, 2)) == "--other"
    assert chosen((0, 10, 0)) == f"--other {ynn} {scheduler}"
    assert chosen((0, 12, 0)) == f"--other {scheduler}"
    assert chosen((0, 13, 0)) == "--other"
