"""Operations of JAX as expressions of PyTorch."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from inertia_jax.torch_source.layers import TorchLayer
from inertia_jax.torch_source.program import Known, Operation
from inertia_jax.torch_source.tensor import (
    Tensor,
    bare,
    index_code,
    member,
    ordered,
    plain,
    reshaped_order,
    size_code,
    slices_of,
)


class Operations:
    """Writes operations, one after the other.

    Args:
        constant: A function of a known array and the order of its axes, which returns a
            tensor; a number stays one unless `is_tensor` is set.
    """

    def __init__(self, constant: Callable[..., Tensor]) -> None:
        """Takes what names constants."""
        self._constant = constant

    def write(self, operation: Operation, inputs: Sequence[Known | Tensor]) -> Tensor:
        """Returns the operation on these inputs.

        Raises:
            ValueError: There is no such operation here.
        """
        name, params, shape = operation.name, operation.params, operation.output.shape
        dtype = operation.output.dtype
        if name in ("div", "pow") and not jax.numpy.issubdtype(dtype, np.floating):
            raise ValueError(f"{name} of integers has no form in PyTorch here.")
        if name in _ELEMENTWISE:
            code = _ELEMENTWISE[name]
            return self._elementwise(code, inputs, params, shape)
        method: Any = getattr(self, f"_{name}", None)
        if method is None or params.get("sharding") is not None:
            raise ValueError(f"{name} has no form in PyTorch here.")
        return method(params, inputs, shape)

    def _elementwise(
        self,
        code: str,
        inputs: Sequence[Known | Tensor],
        params: Mapping[str, Any],
        shape: tuple[Any, ...],
    ) -> Tensor:
        full = [x for x in inputs if isinstance(x, Tensor) and x.shape == shape]
        orders = [x.order for x in full] or [tuple(range(len(shape)))]
        # The order that images have, if one of the inputs is an image.
        order = next((o for o in orders if o != tuple(range(len(shape)))), orders[0])
        tensors = [self._in_order(x, order) for x in inputs]
        if code in ("max", "min"):
            code = _clamped(code, inputs, tensors)
        words: dict[str, Any] = {
            k: v for k, v in params.items() if isinstance(v, int | float | bool)
        }
        if "new_dtype" in params:
            words["type"] = f"torch.{np.dtype(params['new_dtype']).name}"
        code = _PAIRS.get(code, code).format(*(x.code for x in tensors), **words)
        sizes = [1] * len(shape)
        for x in tensors:
            for axis, size in enumerate(x.sizes):
                sizes[axis] = size if size != 1 else sizes[axis]
        return Tensor(code, shape, order, tuple(sizes))

    def _in_order(self, x: Known | Tensor, order: Sequence[int]) -> Tensor:
        """Returns a tensor of this order; a number has none."""
        if isinstance(x, Known):
            return self._constant(x, order)
        return ordered(x, order) if x.shape else x

    def _full(self, x: Known | Tensor, order: Sequence[int] | None = None) -> Tensor:
        """Returns a tensor with nothing left to be repeated."""
        if isinstance(x, Known):
            if not all(isinstance(size, int) for size in x.shape):
                raise ValueError("what is repeated for every image has no form here.")
            if x.value.shape != x.shape or x.leaf is None:
                whole = np.array(np.broadcast_to(x.value, x.shape))
                x = Known(whole, x.shape, None)
            order = range(len(x.shape)) if order is None else order
            return self._constant(x, order, is_tensor=True)
        tensor = ordered(x, x.order if order is None else order)
        if tensor.sizes == tensor.shape:
            return tensor
        repeated = [
            s for s, t in zip(tensor.shape, tensor.sizes, strict=True) if s != t
        ]
        if not all(isinstance(size, int) for size in repeated):
            raise ValueError("what is repeated for every image has no form here.")
        sizes = ", ".join(size_code(tensor.shape[axis]) for axis in tensor.order)
        return dataclasses.replace(
            tensor, code=f"{tensor.code}.expand({sizes})", sizes=tensor.shape
        )

    def _torch_layer(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        layer: TorchLayer = params["layer"]
        code = bare(self._full(inputs[0], layer.order).code)
        if layer.pads:
            code = f"functional.pad({code}, {layer.pads})"
        return Tensor(f"{member(layer.name)}({code})", shape, layer.order, shape)

    def _reduce(self, method: str, params: Any, inputs: Any) -> Tensor:
        x = self._full(inputs[0])
        gone = params["axes"]
        if not gone:
            return x
        axes = tuple(i for i, axis in enumerate(x.order) if axis in gone)
        kept = [axis for axis in range(len(x.shape)) if axis not in gone]
        order = tuple(kept.index(axis) for axis in x.order if axis in kept)
        shape = tuple(x.shape[axis] for axis in kept)
        return Tensor(f"{x.code}.{method}({axes})", shape, order, shape)

    def _reduce_sum(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        return self._reduce("sum", params, inputs)

    def _reduce_max(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        return self._reduce("amax", params, inputs)

    def _reduce_min(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        return self._reduce("amin", params, inputs)

    def _transpose(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        x, axes = self._full(inputs[0]), params["permutation"]
        return Tensor(x.code, shape, tuple(axes.index(a) for a in x.order), shape)

    def _broadcast_in_dim(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        x, dims = inputs[0], params["broadcast_dimensions"]
        new = [axis for axis in range(len(shape)) if axis not in dims]
        order = (*(dims[axis] for axis in x.order), *new)
        sizes = [1] * len(shape)
        for axis, size in zip(dims, x.sizes, strict=True):
            sizes[axis] = size
        index = ", ".join(["...", *["None"] * len(new)])
        code = f"{x.code}[{index}]" if new else x.code
        return Tensor(code, shape, order, tuple(sizes))

    def _squeeze(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        return self._reshape(params, inputs, shape)

    def _expand_dims(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        return self._reshape(params, inputs, shape)

    def _reshape(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        x = self._full(inputs[0])
        order = reshaped_order(x, shape)
        if order is None:
            x, order = ordered(x, range(len(x.shape))), tuple(range(len(shape)))
        if sum(not isinstance(size, int) for size in shape) > 1:
            raise ValueError(
                "a shape with the number of images twice has no form here."
            )
        sizes = ", ".join(size_code(shape[axis]) for axis in order)
        return Tensor(f"{x.code}.reshape({sizes})", shape, order, shape)

    def _slice(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        x = self._full(inputs[0])
        steps = params["strides"] or (1,) * len(shape)
        parts = zip(
            params["start_indices"], params["limit_indices"], steps, strict=True
        )
        parts_by_axis = {
            axis: slice(start, stop, step)
            for axis, (start, stop, step) in enumerate(parts)
        }
        return self._indexed(x, parts_by_axis, shape)

    def _indexed(
        self, x: Tensor, by_axis: Mapping[int, slice | int], shape: tuple[Any, ...]
    ) -> Tensor:
        """Returns x with an index for some axes; a number takes the axis away."""
        words = [index_code(by_axis.get(axis), x.shape[axis]) for axis in x.order]
        gone = {axis for axis, part in by_axis.items() if isinstance(part, int)}
        kept = [axis for axis in range(len(x.shape)) if axis not in gone]
        order = tuple(kept.index(axis) for axis in x.order if axis in kept)
        while words and words[-1] == ":":
            words.pop()
        code = f"{x.code}[{', '.join(words)}]" if words else x.code
        return Tensor(code, shape, order, shape)

    def _gather(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        """Writes slices, which are a gather where the number of images is a symbol."""
        x, indices = inputs
        if isinstance(indices, Known) and isinstance(x, Tensor):
            by_axis = slices_of(params, indices, x.shape)
            if by_axis is not None:
                result = self._indexed(self._full(x), by_axis, shape)
                # Where an axis goes: those that every index is one place of are of the
                # batch, the others are offsets.
                numbers = params["dimension_numbers"]
                batch = (i for i in range(len(shape)) if i not in numbers.offset_dims)
                offsets = iter(numbers.offset_dims)
                kept = [
                    a
                    for a in range(len(x.shape))
                    if not isinstance(by_axis.get(a), int)
                ]
                places = [
                    next(batch if axis in numbers.collapsed_slice_dims else offsets)
                    for axis in kept
                ]
                order = tuple(places[axis] for axis in result.order)
                return dataclasses.replace(result, order=order)
        raise ValueError("gather of other places than slices has no form here.")

    def _pad(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        x, value = self._full(inputs[0]), inputs[1]
        around = [params["padding_config"][axis] for axis in reversed(x.order)]
        if not isinstance(value, Known) or any(inner for _, _, inner in around):
            raise ValueError("pad between entries has no form in PyTorch here.")
        while around and tuple(around[-1]) == (0, 0, 0):
            around.pop()
        pads = tuple(int(size) for low, high, _ in around for size in (low, high))
        if not pads:
            return x
        number = self._constant(value, ()).code
        more = "" if number in ("0.0", "0") else f", value={number}"
        return Tensor(f"functional.pad({x.code}, {pads}{more})", shape, x.order, shape)

    def _concatenate(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        order = next(x.order for x in inputs if isinstance(x, Tensor))
        tensors = ", ".join(self._full(x, order).code for x in inputs)
        axis = order.index(params["dimension"])
        return Tensor(f"torch.cat([{tensors}], {axis})", shape, order, shape)

    def _dot_general(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        (left_sum, right_sum), (left_batch, right_batch) = params["dimension_numbers"]
        left, right = (self._full(x) for x in inputs)
        letters = itertools.count(ord("a"))
        of_left = {axis: chr(next(letters)) for axis in range(len(left.shape))}
        of_right = {
            axis: of_left[other]
            for ours, theirs in ((right_sum, left_sum), (right_batch, left_batch))
            for axis, other in zip(ours, theirs, strict=True)
        }
        for axis in range(len(right.shape)):
            of_right.setdefault(axis, chr(next(letters)))
        out = [of_left[axis] for axis in left_batch]
        for names, used in (
            (of_left, (*left_sum, *left_batch)),
            (of_right, (*right_sum, *right_batch)),
        ):
            out += [names[axis] for axis in sorted(names) if axis not in used]
        words = (
            "".join(names[axis] for axis in x.order)
            for names, x in ((of_left, left), (of_right, right))
        )
        equation = f"{','.join(words)}->{''.join(out)}"
        return plain(f'torch.einsum("{equation}", {left.code}, {right.code})', shape)

    def _conv_general_dilated(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        numbers = params["dimension_numbers"]
        count = len(shape) - 2
        if {*params["lhs_dilation"]} - {1} or params["batch_group_count"] != 1:
            raise ValueError("a convolution that dilates its input has no form here.")
        x = self._full(inputs[0], numbers.lhs_spec).code
        kernel = self._full(inputs[1], numbers.rhs_spec).code
        words = ""
        around = [tuple(map(int, pads)) for pads in params["padding"]]
        if all(low == high >= 0 for low, high in around):
            padding = tuple(low for low, _ in around)
            words += f", padding={padding}" if any(padding) else ""
        else:
            pads = tuple(size for pads in reversed(around) for size in pads)
            x = f"functional.pad({x}, {pads})"
        for name, key in (("stride", "window_strides"), ("dilation", "rhs_dilation")):
            if {*params[key]} != {1}:
                words += f", {name}={tuple(params[key])}"
        if params["feature_group_count"] != 1:
            words += f", groups={params['feature_group_count']}"
        code = f"functional.conv{count}d({x}, {kernel}{words})"
        return Tensor(code, shape, tuple(numbers.out_spec), shape)

    def _reduce_window_max(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        return self._pool("max_pool", "", params, inputs, shape, value='-float("inf")')

    def _reduce_window_sum(self, params: Any, inputs: Any, shape: Any) -> Tensor:
        more = ", divisor_override=1"
        return self._pool("avg_pool", more, params, inputs, shape, value="0.0")

    def _pool(
        self, name: str, more: str, params: Any, inputs: Any, shape: Any, *, value: str
    ) -> Tensor:
        window, strides = params["window_dimensions"], params["window_strides"]
        dilations = (*params["base_dilation"], *params["window_dilation"])
        axes = range(1, len(shape) - 1)
        if len(shape) != 4 or (window[0], window[3]) != (1, 1) or {*dilations} != {1}:
            raise ValueError("a window over other axes than an image's has no form.")
        x = self._full(inputs[0], (0, 3, 1, 2))
        sides = tuple(window[axis] for axis in axes)
        steps = tuple(strides[axis] for axis in axes)
        around = [params["padding"][axis] for axis in reversed(axes)]
        pads = tuple(int(size) for pair in around for size in pair)
        code = x.code
        if any(pads):
            code = f"functional.pad({code}, {pads}, value={value})"
        code = f"functional.{name}2d({code}, {sides}, {steps}{more})"
        return Tensor(code, shape, (0, 3, 1, 2), shape)


def _clamped(name: str, inputs: Sequence[Any], tensors: Sequence[Tensor]) -> str:
    """Returns the maximum or minimum of two tensors, or of one and a number."""
    numbers = [
        isinstance(x, Known) and not t.order
        for x, t in zip(inputs, tensors, strict=True)
    ]
    if not any(numbers):
        return name
    number, x = tensors if numbers[0] else tensors[::-1]
    if name == "max" and number.code == "0.0":
        return f"torch.relu({bare(x.code)})"
    bound = "min" if name == "max" else "max"
    return f"{x.code}.clamp({bound}={number.code})"


_PAIRS = {"max": "torch.maximum({0}, {1})", "min": "torch.minimum({0}, {1})"}
_ELEMENTWISE = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "pow": "({0} ** {1})",
    "max": "max",
    "min": "min",
    "neg": "(-{0})",
    "square": "{0}.square()",
    "integer_pow": "({0} ** {y})",
    "not": "(~{0})",
    "and": "({0} & {1})",
    "or": "({0} | {1})",
    "eq": "({0} == {1})",
    "ne": "({0} != {1})",
    "lt": "({0} < {1})",
    "le": "({0} <= {1})",
    "gt": "({0} > {1})",
    "ge": "({0} >= {1})",
    "select_n": "torch.where({0}, {2}, {1})",
    "logistic": "torch.sigmoid({0})",
    "convert_element_type": "{0}.to({type})",
    **{
        name: f"{{0}}.{name}()"
        for name in ("abs", "exp", "log", "sqrt", "rsqrt", "tanh", "sign", "floor")
    },
}
