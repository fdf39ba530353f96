"""The tables of docs/scaling.md: predicted times and efficiencies of training steps.

`python -m train.benchmark.scaling` prints them; `--write FILE` puts them between the
two markers of that file.
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import linen as nn

from inertia_jax import Conv, Fixed, Inertial, Plan, Tucker2, count_cost, create_model
from inertia_jax.compression.sites import find_sites
from inertia_jax.models.create import abstract_variables, input_shape
from train.benchmark.scaling_model import (
    MACHINES,
    Machine,
    Step,
    count_step,
    efficiency,
    sending_seconds,
)

DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MARKER = "<!-- tables of the model of scaling -->"


def tucker_model(name: str, share: float) -> nn.Module:
    """Returns a network whose 3x3 convolutions have ranks for a share of its MACs.

    Every layer's ranks are the same fraction of its channels, the largest multiple of
    1/64 that keeps to the share. The first convolution stays dense.
    """
    dense = create_model(name)
    shape = input_shape(dense)
    variables = abstract_variables(dense, shape)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    sites = find_sites(dense, zeros, shape).items()
    total = count_cost(dense, shape).macs
    for part in range(64, 0, -1):
        macs, rules = total, []
        for path, site in sites:
            side, _, c_in, c_out = site.kernel.shape
            if side > 1 and c_in > 3:
                spec = Tucker2(max(1, c_in * part // 64), max(1, c_out * part // 64))
                macs += site.macs(spec) - site.macs(Conv())
                rules.append((path, spec))
        if macs <= share * total:
            return create_model(name, plan=Plan(tuple(rules)))
    raise ValueError(f"{name} has no ranks for `share` (={share}) of its MACs.")


def all_steps() -> Iterator[Step]:
    """Yields the steps of the tables."""
    for name in ("resnet18", "vgg16", "simpledla", "resnet20", "lenet"):
        yield count_step(name, create_model(name))
    for share in (0.5, 0.25):
        model = tucker_model("resnet18", share)
        yield count_step(f"resnet18, Tucker-2 at {share}", model)
    tiled = Inertial(3, 4, reading="tiled", threshold=Fixed(0.1))
    model = create_model("resnet18", plan=Plan((("layer*conv*", tiled),)))
    yield count_step("resnet18, tiled", model, dense=True)
    step = count_step("resnet18, --no-sync-batch-norm", create_model("resnet18"))
    yield dataclasses.replace(step, norms=0)


def tables(steps: Sequence[Step]) -> str:
    """Returns the tables as Markdown."""
    header = ["network", "parameters", "gradients, statistics, metrics"]
    header += ["synchronised BatchNorm", "all-reduced a step", "GFLOP an image"]
    counts = [
        [
            step.name,
            f"{step.params:,}",
            f"{step.gradient_bytes:,} B",
            f"{step.norm_bytes:,} B",
            f"{(step.gradient_bytes + step.norm_bytes) / 1e6:.3f} MB",
            f"{step.flops / 1e9:.3f}",
        ]
        for step in steps
    ]
    lines = _markdown(header, counts)
    lines += ["", "**Milliseconds on 8 devices: gradients + BatchNorm**", ""]
    sent = [
        [
            step.name,
            *(
                " + ".join(f"{1e3 * s:.2f}" for s in sending_seconds(step, machine, 8))
                for machine in MACHINES
            ),
        ]
        for step in steps
    ]
    lines += _markdown(["network", *(machine.name for machine in MACHINES)], sent)
    for title, per_device, in_all in (
        ("Weak scaling, 128 images a device", 128, None),
        ("Strong scaling, 1024 images in all", None, 1024),
        ("Strong scaling, 128 images in all", None, 128),
    ):
        for machine in MACHINES:
            most = min(machine.most, in_all or machine.most)
            devices = [n for n in DEVICES if n == 1 or machine.fewest <= n <= most]
            shares = [
                [
                    step.name,
                    *(
                        _cell(
                            step,
                            machine,
                            n,
                            batch_size=in_all or (per_device or 0) * n,
                            batch_alone=in_all or per_device or 0,
                        )
                        for n in devices
                    ),
                ]
                for step in steps
            ]
            lines += ["", f"**{title}: {machine.name}**", ""]
            lines += _markdown(["network", *map(str, devices)], shares)
    return "\n".join(lines)


def _markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    header_row, *others = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return [header_row, "|---" * len(header) + "|", *others]


def _cell(
    step: Step, machine: Machine, n: int, *, batch_size: int, batch_alone: int
) -> str:
    share = functools.partial(
        efficiency, step, machine, n, batch_size=batch_size, batch_alone=batch_alone
    )
    # Sending takes a larger share of the time where devices compute faster.
    least = f"{100 * share(utilisation=0.4, overlap=False):.0f}"
    most = f"{100 * share(utilisation=0.2, overlap=True):.0f}"
    return least if least == most else f"{least}-{most}"


def main() -> None:
    """Prints the tables, or writes them into the document."""
    prog = f"python -m {__spec__.name}"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--write", type=pathlib.Path, help="file with the markers")
    file = parser.parse_args().write
    text = tables(list(all_steps()))
    if file is None:
        print(text)
        return
    before, _, after = file.read_text().split(MARKER)
    file.write_text(f"{before}{MARKER}\n\n{text}\n\n{MARKER}{after}")


if __name__ == "__main__":
    main()
