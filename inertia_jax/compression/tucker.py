"""Tucker-2 compression of whole networks: (model, variables) -> (model, variables)."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Shaped

from inertia_jax.calls import ApplyFn
from inertia_jax.compression.budget import choose_ranks
from inertia_jax.compression.calibration import input_moments
from inertia_jax.compression.planned import with_rules
from inertia_jax.compression.ranks import Budget, RankRule, rank_by_rule
from inertia_jax.compression.sites import (
    Site,
    find_sites,
    leaves_at,
    reasons,
    split_convolutions,
    with_leaves,
)
from inertia_jax.compression.weighed_kernel import WeighedKernel
from inertia_jax.inputs import Shape, batched
from inertia_jax.models.create import image_shape_of, inputs_of, shape_of_inputs
from inertia_jax.ops.tucker.tucker import Method
from inertia_jax.plan.plan import Plan, matches, plan_of
from inertia_jax.plan.specs import Conv, Tucker2
from inertia_jax.progress import Progress, counted
from inertia_jax.variables import plain_variables

_NONE = "matches no convolution that can be factorised"
_HIDDEN = (
    "is called inside nn.scan, nn.vmap or a loop, where `calibration` cannot see its "
    "inputs"
)


def compress(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    ranks: RankRule | Budget,
    method: Method = "hosvd",
    calibration: Shaped[ArrayLike, "n *image"] | Mapping[str, Any] | None = None,
    layers: str = "*",
    linear: bool = False,
    keep_stem: bool = False,
    only_cheaper: bool = True,
    round_to: int = 1,
    image_shape: Shape | None = None,
    batch_size: int = 128,
    apply_fn: ApplyFn | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Factorises the convolutions of a trained network.

    A convolution becomes a 1x1 convolution, a core and a 1x1 convolution (`Tucker2`). A
    1x1 convolution becomes two 1x1 convolutions (`LowRank`), except with `Ratio`, which
    makes every convolution Tucker-2. The ranks stand in the new model's plan. Nothing
    is trained: call `recalibrate_batch_norm` and fine-tune afterwards.

    With calibration images, a kernel's error is weighed by the layer's inputs: for
    inputs of second moment M = E[x x^T], over channels, M^(1/2) K is factorised and
    M^(-1/2) is multiplied into U_in. A `Budget` then chooses all ranks together for the
    least summed divergence of the network's outputs, measured for each layer at several
    ranks. Without images it minimises the sum of relative errors; that choice is taken
    with images, too, where the network's outputs on them then diverge less.

    A network that is already compressed is compressed again from its factors multiplied
    out. Shares remain shares of the dense network.

    A convolution stays as it is where no factors could stand for its kernel: where its
    parameters are transformed on the way (`nn.map_variables`, `nn.WeightNorm`,
    `nn.SpectralNorm`), are also used elsewhere (tied weights), in training as well, or
    are those of several layers in one array (`nn.scan`, `nn.vmap`), and where it is
    more than an `nn.Conv` of any number of axes. With `calibration`, layers in loops
    stay, too. `Planned.kept` says which and why, and so does `count_cost`.

    Args:
        model: A network of this library, or any Linen model made of `nn.Conv`, which
            comes back as `Planned`. Inertial layers are left as they are.
        variables: Its trained variables. Boxes such as `nn.Partitioned` are opened, and
            dictionaries come back; the boxes of the new network are those of its
            `init`.
        ranks: A rule (`Ratio`, `Energy`, `Evbmf` or `Budget`), or explicit ranks: a
            `Plan` of `Tucker2`, `LowRank` and `Conv` by glob.
        method: `hosvd`, or `hooi`, which is slower and never worse; see `ops.tucker2`.
        calibration: Some hundred of the network's inputs, normalised: an array, or, for
            a network of several inputs, a dictionary of arrays, which it is called with
            (`apply_fn` may take it apart).
        layers: A glob over the paths of the layers that may change.
        linear: Whether linear layers (`nn.Dense`) may change, too: each becomes two
            (`LowRank`). They do not by default, so that a convolution network's
            classifier, of which little can be saved, is what it was.
        keep_stem: Whether the first convolution is left as it is.
        only_cheaper: Whether a convolution stays as it is if its new form would not
            take fewer MACs. It has no effect on explicit ranks, nor on a `Budget`,
            which never takes a form that costs more in the budget's units.
        round_to: The number that ranks are rounded up to multiples of, to suit the
            hardware; it must be 1 with explicit ranks.
        image_shape: The shape of one input that MACs are counted at: [h, w, c], that of
            a sequence or a volume, or a dictionary of shapes. None: that of
            `calibration`, or the one that a network of this library was published for.
        batch_size: Calibration images per call; images that fill no whole batch are
            left out.
        apply_fn: How the network is called: a function of (model, images, train) that
            returns logits, e.g. `lambda model, images, train: model(images,
            deterministic=not train)["logits"]`. The model is bound to its variables, as
            inside `flax.linen.apply`. None: as `model(images)`, with those of the
            arguments `train`, `training`, `is_training`, `deterministic` and
            `use_running_average` that it takes. Random streams of any name are there.
        progress: A function that is told what is being done, how many parts of it are
            done, and how many there are. None: nobody is told.

    Returns:
        (model, variables) of the compressed network.

    Raises:
        ValueError: A budget that no ranks can meet (the message says the least
            possible), a glob that matches no convolution, ranks outside their range,
            kernels or images that are not finite, or no `image_shape` where it is
            needed.

    Example:
        >>> small, factors = ij.compress(model, variables, ranks=ij.Budget(macs=0.5))
        >>> before, after = (ij.count_cost(m, (28, 28, 1)).macs for m in (model, small))
        >>> after <= before / 2
        True

    References:
        Kim et al., 2016, https://arxiv.org/abs/1511.06530
    """
    _check_options(ranks, round_to, batch_size, linear)
    images = None if calibration is None else inputs_of(model, calibration)
    if image_shape is None and images is not None:
        image_shape = shape_of_inputs(model, images)
    shape = image_shape_of(model, image_shape)
    variables = plain_variables(variables)
    every, kept = split_convolutions(model, variables, shape, apply_fn, linear=linear)
    sites = _wanted_sites(every, kept, ranks, layers, keep_stem, linear)

    multiplied = _multiplied_out(model, variables, every)
    batches = [] if images is None else batched(images, batch_size)
    moments: dict[str, Any] = {}
    if batches:
        counting = counted(batches, progress, "measuring inputs of layers, batches")
        moments = input_moments(*multiplied, sites, counting, apply_fn)
        hidden = {path: _HIDDEN for path in sites if path not in moments}
        kept, sites = kept | hidden, {path: sites[path] for path in moments}
        if not sites:
            raise ValueError(f"`layers` (={layers!r}) {_NONE}{reasons(kept, layers)}.")
    kernels: Mapping[str, WeighedKernel] = {
        path: WeighedKernel(site, moments.get(path)) for path, site in sites.items()
    }

    if isinstance(ranks, Budget):
        specs, kernels = choose_ranks(
            ranks,
            (model, variables),
            multiplied,
            kernels,
            batches,
            image_shape=shape,
            round_to=round_to,
            method=method,
            apply_fn=apply_fn,
            progress=progress,
        )
    else:
        any_cost = not only_cheaper or isinstance(ranks, Plan)
        specs = {}
        for path, site in counted(sites.items(), progress, "choosing ranks, layers"):
            kernel = kernels[path].kernel
            spec = rank_by_rule(ranks, site, kernel, round_to=round_to)
            if any_cost or site.macs(spec) < site.macs(site.spec):
                specs[path] = spec

    changed = {path: s for path, s in specs.items() if s != sites[path].spec}
    leaves = {
        path: kernels[path].parameters(spec, leaves_at(variables, path), method=method)
        for path, spec in counted(changed.items(), progress, "factorising layers")
    }
    return with_rules(model, changed, kept), with_leaves(variables, leaves)


def _check_options(ranks: Any, round_to: int, batch_size: int, linear: Any) -> None:
    if not isinstance(ranks, RankRule | Budget):
        raise ValueError(
            f"`ranks` (={ranks!r}) must be a Ratio, Energy, Evbmf, Budget or Plan."
        )
    if round_to < 1:
        raise ValueError(f"`round_to` (={round_to}) must be >= 1.")
    if round_to > 1 and isinstance(ranks, Plan):
        raise ValueError(f"`round_to` (={round_to}) must be 1 with explicit ranks.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be >= 1.")
    if not isinstance(linear, bool):
        raise ValueError(f"`linear` (={linear!r}) must be True or False.")


def _wanted_sites(
    every: Mapping[str, Site],
    kept: Mapping[str, str],
    ranks: RankRule | Budget,
    layers: str,
    keep_stem: bool,
    linear: bool,
) -> dict[str, Site]:
    """Returns the layers that may change; every glob must match one."""
    can_change = {p: site for p, site in every.items() if linear or not site.is_linear}
    wanted = {
        path: site
        for path, site in can_change.items()
        if matches(path, layers) and not (keep_stem and site.is_first)
    }
    hint = "" if linear else "; linear layers change with `linear` (=True) alone"
    if not wanted:
        raise ValueError(
            f"`layers` (={layers!r}) {_NONE}{reasons(kept, layers)}{hint}."
        )
    for glob, _ in ranks.rules if isinstance(ranks, Plan) else ():
        if not any(matches(path, glob) for path in can_change):
            raise ValueError(
                f"`ranks` has {glob!r}, which {_NONE}{reasons(kept, glob)}{hint}."
            )
    return wanted


def decompress(
    model: nn.Module,
    variables: Mapping[str, Any],
    *,
    image_shape: Shape | None = None,
    apply_fn: ApplyFn | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Multiplies the factors of a compressed network out to dense kernels.

    Args:
        model: A network that `compress` returned.
        variables: Its variables.
        image_shape: The shape [h, w, c] of an input. None: the one that a network of
            this library was published for.
        apply_fn: How the network is called, as in `compress`.

    Returns:
        (model, variables) of a network of ordinary convolutions, with the same outputs
        up to rounding.

    Raises:
        ValueError: A factorised layer whose core is inertial, which no dense kernel
            equals.

    Example:
        >>> small, factors = ij.compress(
        ...     model, variables, ranks=ij.Ratio(1), only_cheaper=False
        ... )
        >>> dense, kernels = ij.decompress(small, factors)
        >>> kernels["params"]["conv2"]["kernel"].shape
        (3, 3, 2, 4)
    """
    shape = image_shape_of(model, image_shape)
    for _, spec in (plan_of(model) or Plan()).rules:
        if isinstance(spec, Tucker2) and not isinstance(spec.core, Conv):
            raise ValueError(f"`model` has {spec}, which no dense kernel equals.")
    variables = plain_variables(variables)
    sites = find_sites(model, variables, shape, apply_fn=apply_fn)
    return _multiplied_out(model, variables, sites)


def _multiplied_out(
    model: nn.Module, variables: Mapping[str, Any], sites: Mapping[str, Site]
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the network with ordinary convolutions in place of their factors."""
    changed, specs = {}, {}
    for path, site in sites.items():
        if isinstance(site.spec, Conv):
            continue
        kernel = WeighedKernel(site)
        leaves = leaves_at(variables, path)
        changed[path] = kernel.parameters(Conv(), leaves, method="hosvd")
        specs[path] = site.core
    return with_rules(model, specs), with_leaves(variables, changed)
