"""The source of a PyTorch module that computes what a network does, and its weights."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import export

from inertia_jax.ops.conv.replaced import in_one_form
from inertia_jax.torch_source.layers import IMAGE_ORDER, TorchLayer, trace_network
from inertia_jax.torch_source.operations import Operations
from inertia_jax.torch_source.program import Known, Program, Unknown, make_program
from inertia_jax.torch_source.tensor import Tensor, bare, member
from inertia_jax.weights.layout import torch_key, transposed

# Constants of at most this size stand in the source.
_FEW = 16
# The longest expression that stands inside of another.
_LONGEST = 66
_LINE = 88


@dataclasses.dataclass(frozen=True)
class TorchSource:
    """A network as a module of PyTorch.

    Attributes:
        code: The source of a Python module with a class `Network`.
        state: Its state dict, as NumPy arrays. BatchNorm's `num_batches_tracked` is not
            in it.
    """

    code: str
    state: dict[str, np.ndarray]


def torch_source(
    function: Callable[[Any, Any], Any],
    variables: Mapping[str, Any],
    *,
    image_shape: tuple[int, int, int],
    image_dtype: Any = np.float32,
    title: str = "A network.",
) -> TorchSource:
    """Writes a network as a module of PyTorch that needs PyTorch alone.

    The module takes images [n, c, h, w] for any n, and computes as the function does
    with JAX, up to rounding. Convolutions, linear layers and BatchNorm are PyTorch's
    own, with the keys of PyTorch's networks; a Tucker-2 convolution is an
    `nn.Sequential` of three, and a low-rank one of two. Inertial layers are written
    out, and compute every region in detail before they select. The module evaluates:
    BatchNorm uses its running statistics after `eval()`, dropout is left out.

    Args:
        function: The network, a function of variables and images [n, h, w, c].
        variables: Its variables.
        image_shape: The shape [h, w, c] of an image.
        image_dtype: The type of the images.
        title: The first line of the module's docstring.

    Raises:
        ValueError: The network does what has no form in PyTorch here.
    """
    number = export.symbolic_shape("n")[0]
    images = jax.ShapeDtypeStruct((number, *image_shape), image_dtype)
    with in_one_form():
        traced = trace_network(function, variables, images)
    writer = _Writer(make_program(traced, variables), variables, title)
    return TorchSource(writer.code(), writer.state)


class _Writer:
    def __init__(
        self, program: Program, variables: Mapping[str, Any], title: str
    ) -> None:
        self.state: dict[str, np.ndarray] = {}
        self._title = title
        self._variables = traverse_util.flatten_dict(dict(variables))
        self._layers: dict[str, TorchLayer] = {}
        self._leaves: dict[str, np.ndarray] = {}
        self._constants: list[tuple[str, np.ndarray]] = []
        self._lines: list[str] = []
        self._program = program
        self._operations = Operations(self._constant)

    def code(self) -> str:
        program = self._program
        uses = collections.Counter(
            x for o in program.operations for x in o.inputs if isinstance(x, Unknown)
        )
        shape = program.images.shape
        order = IMAGE_ORDER if len(shape) == 4 else tuple(range(len(shape)))
        env = {program.images: Tensor("images", shape, order, shape)}
        for operation in program.operations:
            if operation.name == "torch_layer":
                self._add_layer(operation.params["layer"])
            inputs = [x if isinstance(x, Known) else env[x] for x in operation.inputs]
            tensor = self._operations.write(operation, inputs)
            is_named = uses[operation.output] != 1 or len(tensor.code) > _LONGEST
            is_named = is_named and not tensor.code.isidentifier()
            if is_named and operation.output is not program.output:
                name = f"x{len(self._lines)}"
                self._lines.append(f"{name} = {bare(tensor.code)}")
                tensor = dataclasses.replace(tensor, code=name)
            env[operation.output] = tensor
        result = env[program.output]
        back = tuple(result.order.index(axis) for axis in range(len(result.order)))
        code = f"{result.code}.permute{back}"
        self._lines.append(f"return {bare(result.code) if result.is_plain else code}")
        return "\n".join([*_HEAD.format(title=self._title).splitlines(), *self._body()])

    def _body(self) -> Iterator[str]:
        yield "    def __init__(self):"
        yield "        super().__init__()"
        names = [
            *((name, _constructor(layer)) for name, layer in self._layers.items()),
            *((name, None) for name in self._leaves),
        ]
        made: set[str] = set()
        for name, constructor in names:
            yield from _containers(name, [n for n, _ in names], made)
            if constructor is not None:
                yield f"        {member(name)} = {constructor}"
                continue
            owner, _, leaf = name.rpartition(".")
            value = self._leaves[name]
            zeros = f"torch.zeros({tuple(value.shape)})"
            if leaf in ("weight", "weights", "bias", "threshold"):
                yield f"        {member(name)} = nn.Parameter({zeros})"
            else:
                yield f'        {member(owner)}.register_buffer("{leaf}", {zeros})'
        for name, value in self._constants:
            if value.size <= _FEW:
                kind = f"torch.{value.dtype.name}"
                words = f"torch.tensor({_numbers(value)}, dtype={kind})"
                words += f".reshape({value.shape})"
                more = ", persistent=False"
            else:
                words, more = f"torch.zeros({tuple(value.shape)})", ""
            yield f'        self.register_buffer("{name}", {words}{more})'
        yield ""
        yield "    def forward(self, images):"
        for line in self._lines:
            yield f"        {line}"
        yield ""

    def _add_layer(self, layer: TorchLayer) -> None:
        self._layers.setdefault(layer.name, layer)
        self.state |= layer.state

    def _constant(
        self, known: Known, order: Sequence[int], *, is_tensor: bool = False
    ) -> Tensor:
        """Returns a variable, a number, or a constant of the module."""
        value = known.value
        sizes = (*value.shape,)
        missing = len(order) - value.ndim
        if value.size == 1 and known.leaf is None and not is_tensor:
            return Tensor(_number(value), known.shape, (), (1,) * len(known.shape))
        if missing > 0:  # a number with a name
            sizes = (1,) * missing + sizes
        if known.leaf is not None:
            return self._variable(known, sizes, order)
        name = f"constant{len(self._constants)}"
        laid = np.ascontiguousarray(value.transpose(order) if value.ndim else value)
        self._constants.append((name, laid))
        if laid.size > _FEW:
            self.state[name] = laid
        return Tensor(f"self.{name}", known.shape, tuple(order), sizes)

    def _variable(
        self, known: Known, sizes: tuple[Any, ...], order: Sequence[int]
    ) -> Tensor:
        """Returns a variable of the network, as PyTorch has it, in an order."""
        path = known.leaf or ()
        name = torch_key(path[1:])
        whole = np.asarray(self._variables[path])
        self.state[name] = self._leaves[name] = transposed(whole, to_torch_layout=True)
        tensor = Tensor(member(name), known.shape, tuple(order), sizes)
        if whole.shape == sizes and whole.ndim >= 2:
            axes = (whole.ndim - 1, whole.ndim - 2, *range(whole.ndim - 2))
            if axes == tuple(order):
                return tensor
            places = tuple(axes.index(axis) for axis in order)
            return dataclasses.replace(tensor, code=f"{tensor.code}.permute{places}")
        if whole.shape == sizes:
            return tensor
        # Of one axis that is longer than 1, so that no order matters.
        shown = ", ".join(str(sizes[axis]) for axis in order)
        return dataclasses.replace(tensor, code=f"{tensor.code}.reshape({shown})")


def _constructor(layer: TorchLayer) -> str:
    if not layer.parts:
        return layer.constructor
    parts = ",\n            ".join(part.constructor for part in layer.parts)
    return f"nn.Sequential(\n            {parts},\n        )"


def _containers(name: str, names: Sequence[str], made: set[str]) -> Iterator[str]:
    """Yields the lines that make what a member stands in."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        owner = ".".join(parts[:end])
        if owner in made or owner in names:
            continue
        made.add(owner)
        inside = {n.split(".")[end] for n in names if n.startswith(f"{owner}.")}
        if parts[end - 1].isdecimal():
            continue  # an entry of a list
        if all(part.isdecimal() for part in inside):
            count = 1 + max(map(int, inside))
            yield (
                f"        {member(owner)} = "
                f"nn.ModuleList(nn.Module() for _ in range({count}))"
            )
        else:
            yield f"        {member(owner)} = nn.Module()"


def _number(value: np.ndarray | np.generic) -> str:
    """Returns a number with as many digits as its type has."""
    number = value.reshape(()).item()
    if not np.isfinite(number):
        return f'float("{number}")'
    return str(value.reshape(())) if isinstance(number, float) else repr(number)


def _numbers(value: np.ndarray) -> str:
    return f"[{', '.join(_number(number) for number in value.reshape(-1))}]"


_HEAD = '''"""{title}"""

import torch
from torch import nn
from torch.nn import functional


class Network(nn.Module):
    """The network, in evaluation."""

'''
