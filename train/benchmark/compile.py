"""What a TPU's compiler says of a network's programs: nothing of it is a measurement.

No TPU is needed, since the compiler runs on CPU and no program does.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from inertia_jax.chips.chip import CHIPS, Chip, find_chip
from inertia_jax.chips.compiler import compile_lowered, topology
from inertia_jax.chips.estimate import Estimate, estimate
from inertia_jax.cost.table import aligned
from inertia_jax.ops.inertial.settings import near_miss
from train.benchmark import gpu
from train.benchmark.collectives import Collective, find_collectives
from train.benchmark.programs import NETWORKS, PROGRAMS
from train.benchmark.suite import BaseSuite
from train.errors import UsageError, user_input
from train.machine.parallel import Parallel


class Case(NamedTuple):
    """A program of a network for some chips; `batch_size` is that of one chip."""

    device: str
    chips: int
    model: str
    width: float
    network: str
    program: str
    dtype: str
    batch_size: int
    sync_batch_norm: bool

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Case":
        """Returns the case of a row of the record."""
        return cls(*(row[name] for name in cls._fields))

    def __str__(self) -> str:
        alone = ", BatchNorm of each chip" if not self.sync_batch_norm else ""
        return (
            f"{self.model} {self.network}, width {self.width:g}, {self.program}, "
            f"{self.dtype}, {self.batch_size} images on each of {self.chips} "
            f"{self.device}{alone if self.chips > 1 else ''}"
        )


@dataclasses.dataclass(frozen=True)
class Suite(BaseSuite):
    """A TPU's compiler's estimates for training steps, evaluations, exported networks.

    Nothing is measured. A program that `--out` has already, compiled by the same
    versions, is not compiled again.
    """

    device: str = "v5e"
    """Chip to compile for: v4, v5e, v5p or v6e; h100: a GPU, whose compiler says its
    memory, fusions and what cuDNN does, but no costs."""
    chips: tuple[int, ...] = (1,)
    """Numbers of chips that share the work."""
    models: tuple[
        Literal["resnet18", "vgg16", "simpledla", "resnet20", "lenet"], ...
    ] = ("resnet18",)
    """Networks to compile."""
    networks: tuple[Literal["dense", "tucker", "tiled"], ...] = (
        "dense",
        "tucker",
        "tiled",
    )
    """Their convolutions: ordinary ones; Tucker-2 factors at a quarter of the MACs; 2x2
    inertial tiles."""
    programs: tuple[Literal["train", "evaluate", "export"], ...] = (
        "train",
        "evaluate",
        "export",
    )
    """A training step, an evaluation of a batch, an exported network (of one chip)."""
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    """Types of the computation."""
    batch_size: int = 128
    """Number of images of a training step on each chip."""
    eval_batch_size: int = 256
    """Number of images of the other programs on each chip."""
    width: float = 1.0
    """Width of the networks."""
    sync_batch_norm: bool = True
    """Whether chips share the statistics of BatchNorm in training."""

    def cases(self) -> Iterator[Case]:
        _recorded(self.out)  # whose form is looked at before minutes pass
        if self.device not in (names := (*CHIPS, gpu.NAME)):
            raise UsageError(
                f"`device` (={self.device}) must be one of {', '.join(names)}."
                f"{near_miss(self.device, names)}"
            )
        if min((*self.chips, self.eval_batch_size)) < 1:
            raise UsageError(
                f"`chips` (={self.chips}) and `eval_batch_size` "
                f"(={self.eval_batch_size}) must be >= 1."
            )
        for chips, model, network, program, dtype in itertools.product(
            self.chips, self.models, self.networks, self.programs, self.dtypes
        ):
            if program == "export" and chips > 1:
                continue
            is_training = program == "train"
            yield Case(
                device=self.device,
                chips=chips,
                model=model,
                width=self.width,
                network=network,
                program=program,
                dtype=dtype,
                batch_size=self.batch_size if is_training else self.eval_batch_size,
                sync_batch_norm=is_training and chips > 1 and self.sync_batch_norm,
            )

    def measure(self, case: Case) -> dict[str, Any]:
        """Compiles a program, unless the record has it, and reads what it costs."""
        is_gpu = case.device == gpu.NAME
        devices = gpu.gpu_devices if is_gpu else functools.partial(_tpus, case.device)
        parallel = Parallel("shard_map", tuple(devices(case.chips)))
        dtype = jnp.dtype(case.dtype)
        model = NETWORKS[case.network](case.model, width=case.width, dtype=dtype)
        options: dict[str, Any] = {"batch_size": case.batch_size}
        if case.program == "train":
            options["sync_batch_norm"] = case.sync_batch_norm
        function, shapes = PROGRAMS[case.program](model, parallel, **options)
        lowered = function.trace(*shapes).lower()
        known = case._asdict() | {
            "versions": versions(case.device),
            "program_sha256": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        }
        for row in _recorded(self.out):
            if known.items() <= row.items():
                return row
        if is_gpu:
            compiled = lowered.compile(gpu.OPTIONS)
            found = gpu.read_gpu_program(compiled)
        else:
            compiled = compile_lowered(lowered, chip=case.device)
            found = _estimates(compiled, find_chip(case.device))
        return known | found | {"collectives": _collectives(compiled.as_text())}

    def record(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns the record as it was, with the rows new or in their old places."""
        merged = {Case.of_row(row): row for row in (*_recorded(self.out), *rows)}
        every = list(merged.values())
        shares = [_share_of_dense(row, every) for row in every]
        return super().record(
            [
                {**row, "cycles_of_dense": share} if share else row
                for row, share in zip(every, shares, strict=True)
            ]
        )

    def describe(self, row: dict[str, Any]) -> str:
        lines = [str(Case.of_row(row)), _described(row)]
        share = _share_of_dense(row, _recorded(self.out))
        if share is not None:
            verdict = "quicker" if share < 1 else "no quicker"
            lines.append(f"  {share:.2f} of the dense network's cycles: {verdict}")
        for each in row["collectives"]:
            how = f" by {each['algorithm']}" if each["algorithm"] else ""
            beside = (
                f"{each['num_beside']} operations" if each["num_beside"] else "none"
            )
            lines.append(
                f"  {each['count']} {each['kind']}{how}, {each['num_bytes']:,} bytes, "
                f"beside other work: {beside}"
            )
        return "\n".join(lines)


def versions(device: str) -> dict[str, str]:
    """Returns the versions of the packages that compile for a device."""
    compiler = "jax-cuda12-plugin" if device == gpu.NAME else "libtpu"
    names = ("jax", "jaxlib", compiler)
    return {name: importlib.metadata.version(name) for name in names}


def _tpus(device: str, chips: int) -> Sequence[Any]:
    return topology(device, chips).devices


def _estimates(compiled: Any, chip: Chip) -> dict[str, Any]:
    """Returns what the compiler says of a program, and the roofline of the chip."""
    found: Estimate = estimate(compiled)
    return found._asdict() | {
        "milliseconds": {
            "computing": 1e3 * found.flops / chip.bfloat16_flops,
            "moving": 1e3 * found.bytes_accessed / chip.memory_bandwidth,
            "scheduled": 1e3 * found.cycles / chip.clock_hz,
        },
    }


def _collectives(text: str) -> list[dict[str, Any]]:
    """Returns what devices send each other, by operation, algorithm and overlap."""
    kinds: dict[tuple[str, str, bool], list[Collective]] = {}
    for each in find_collectives(text):
        key = (each.kind, each.algorithm, bool(each.num_beside))
        kinds.setdefault(key, []).append(each)
    return [
        {
            "kind": kind,
            "algorithm": algorithm,
            "count": len(each),
            "num_bytes": sum(one.num_bytes for one in each),
            "num_beside": sum(one.num_beside or 0 for one in each),
            "cycles_beside": sum(one.cycles_beside for one in each),
        }
        for (kind, algorithm, _), each in kinds.items()
    ]


def _share_of_dense(
    row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]
) -> float | None:
    """Returns the cycles of a program as a share of those with dense convolutions.

    It is None for a dense network, and where the rows have no dense one.
    """
    case = Case.of_row(row)
    if case.network == "dense" or "cycles" not in row:
        return None
    dense = case._replace(network="dense")
    for other in rows:
        if Case.of_row(other) == dense:
            return row["cycles"] / other["cycles"]
    return None


def _described(row: dict[str, Any]) -> str:
    """Returns the figures of a row as text."""
    if row["device"] == gpu.NAME:
        in_cudnn = ", ".join(f"{n} {name}" for name, n in row["cudnn"].items())
        return (
            f"  {row['memory_bytes'] / 1e6:,.0f} MB of {gpu.MEMORY_BYTES / 1e6:,.0f}; "
            f"{row['num_fusions']} fusions; in cuDNN {in_cudnn or 'nothing'}; "
            f"{row['other_convolutions']} convolutions elsewhere"
        )
    ms, chip = row["milliseconds"], find_chip(row["device"])
    cells = [
        ["  compute", f"{row['flops']:.3g} FLOP", f"{ms['computing']:.2f} ms at peak"],
        [
            "  move",
            f"{row['bytes_accessed'] / 1e9:.2f} GB",
            f"{ms['moving']:.2f} ms at peak",
        ],
        [
            "  schedule",
            f"{row['cycles']:,} cycles",
            f"{ms['scheduled']:.2f} ms, without {row['num_uncosted']:,} operations",
        ],
        [
            "  memory",
            f"{row['memory_bytes'] / 1e6:,.0f} MB",
            f"of {chip.memory_bytes / 1e6:,.0f} MB",
        ],
    ]
    return aligned(cells, left=1)


def _recorded(path: str | None) -> list[dict[str, Any]]:
    """Returns the rows of a record; none where there is no file yet."""
    if path is None or not pathlib.Path(path).is_file():
        return []
    with user_input():
        record: Any = json.loads(pathlib.Path(path).read_text())
    rows = record["rows"] if isinstance(record, dict) and "rows" in record else [{}]
    if not all(row.keys() >= {*Case._fields} for row in rows):
        raise UsageError(f"`out` (={path}) must be a record of this suite, or new.")
    return list(rows)
