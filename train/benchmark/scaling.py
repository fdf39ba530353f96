"""Scaling on paper: what a training step sends and computes, and what that predicts.

`python -m train.benchmark.scaling` prints the tables of docs/scaling.md; `--write FILE`
puts them between that file's two markers.
"""

import argparse
import dataclasses
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

    The ranks are one fraction of every layer's channels, the largest sixty-fourth that
    keeps to the share; the first convolution stays.
    """
    dense = create_model(name)
    shape = input_shape(dense)
    variables = abstract_variables(dense, shape)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    total = count_cost(dense, shape).macs
    sites = {
        path: site
        for path, site in find_sites(dense, zeros, shape).items()
        if site.kernel.shape[0] > 1 and site.kernel.shape[2] > 3
    }

    def specs(part: int) -> dict[str, Tucker2]:
        ranks = {
            path: [max(1, channels * part // 64) for channels in site.kernel.shape[2:]]
            for path, site in sites.items()
        }
        return {path: Tucker2(*both) for path, both in ranks.items()}

    def macs(part: int) -> int:
        saved = sum(
            sites[path].macs(Conv()) - sites[path].macs(spec)
            for path, spec in specs(part).items()
        )
        return total - saved

    most = max(part for part in range(1, 65) if macs(part) <= share * total)
    return create_model(name, plan=Plan(tuple(specs(most).items())))


def all_steps(names: Sequence[str] | None = None) -> Iterator[Step]:
    """Yields the steps of the tables, or those of some networks."""
    for name in ("resnet18", "vgg16", "simpledla", "resnet20", "lenet"):
        if names is None or name in names:
            yield count_step(name, create_model(name))
    for share in (0.5, 0.25):
        label = f"resnet18, Tucker-2 at {share}"
        if names is None or label in names:
            yield count_step(label, tucker_model("resnet18", share))
    label = "resnet18, tiled"
    if names is None or label in names:
        tiled = Inertial(3, 4, reading="tiled", threshold=Fixed(0.1))
        model = create_model("resnet18", plan=Plan((("layer*conv*", tiled),)))
        yield count_step(label, model, dense=True)
    label = "resnet18, --no-sync-batch-norm"
    if names is None or label in names:
        step = count_step(label, create_model("resnet18"))
        yield dataclasses.replace(step, norms=0)


def tables(steps: Sequence[Step]) -> str:
    """Returns the tables as Markdown."""
    lines = [
        "| network | parameters | gradients, statistics, metrics | synchronised "
        "BatchNorm | all-reduced a step | GFLOP an image |",
        "|---|---|---|---|---|---|",
    ]
    for step in steps:
        total = step.gradient_bytes + step.norm_bytes
        lines.append(
            f"| {step.name} | {step.params:,} | {step.gradient_bytes:,} B | "
            f"{step.norm_bytes:,} B | {total / 1e6:.3f} MB | {step.flops / 1e9:.3f} |"
        )
    lines += ["", "**Milliseconds on 8 devices: gradients + BatchNorm**", ""]
    lines.append("| network | " + " | ".join(m.name for m in MACHINES) + " |")
    lines.append("|---" * (1 + len(MACHINES)) + "|")
    for step in steps:
        cells = [
            " + ".join(f"{1e3 * s:.2f}" for s in sending_seconds(step, machine, 8))
            for machine in MACHINES
        ]
        lines.append(f"| {step.name} | " + " | ".join(cells) + " |")
    for title, per_device, in_all in (
        ("Weak scaling, 128 images a device", 128, None),
        ("Strong scaling, 1024 images in all", None, 1024),
        ("Strong scaling, 128 images in all", None, 128),
    ):
        for machine in MACHINES:
            most = min(machine.most, in_all or machine.most)
            devices = [n for n in DEVICES if n == 1 or machine.fewest <= n <= most]
            lines += ["", f"**{title}: {machine.name}**", ""]
            lines.append("| network | " + " | ".join(map(str, devices)) + " |")
            lines.append("|---" * (1 + len(devices)) + "|")
            for step in steps:
                cells = [
                    _cell(
                        step,
                        machine,
                        n,
                        batch_size=in_all or (per_device or 0) * n,
                        batch_alone=in_all or per_device or 0,
                    )
                    for n in devices
                ]
                lines.append(f"| {step.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(
    step: Step, machine: Machine, n: int, *, batch_size: int, batch_alone: int
) -> str:
    def at(utilisation: float, *, overlap: bool) -> str:
        share = efficiency(
            step,
            machine,
            n,
            batch_size=batch_size,
            batch_alone=batch_alone,
            utilisation=utilisation,
            overlap=overlap,
        )
        return f"{100 * share:.0f}"

    # The faster devices compute, the larger is the share of sending.
    low, high = at(0.4, overlap=False), at(0.2, overlap=True)
    return low if low == high else f"{low}-{high}"


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
