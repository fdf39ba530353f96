"""Weights are finite floating-point numbers, or an error."""

import ml_dtypes
import numpy as np
import pytest

from inertia_jax.weights.numbers import as_numbers
from inertia_jax.weights.pickles import Unknown


@pytest.mark.parametrize("dtype", ["f2", "f4", ml_dtypes.bfloat16])
def test_floating_point_numbers_are_taken_as_they_are(dtype):
    value = np.arange(3).astype(dtype)
    taken = as_numbers("x.weight", value, (3,))
    assert taken.dtype == value.dtype
    np.testing.assert_array_equal(taken, value)


@pytest.mark.parametrize("dtype", ["i8", "u1", "?", "c8"])
def test_other_numbers_are_an_error(dtype):
    value = np.ones(3, dtype)
    with pytest.raises(ValueError, match=f"x.weight holds {value.dtype}; must be"):
        as_numbers("x.weight", value, (3,))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ml_dtypes.bfloat16])
def test_nan_and_infinity_are_an_error(bad, dtype):
    value = np.array([1, bad, bad]).astype(dtype)
    with pytest.raises(ValueError, match="x.weight holds NaN or infinity 2 times in 3"):
        as_numbers("x.weight", value, (3,))


def test_numbers_beyond_float32_are_an_error():
    value = np.array([1.0, 1e300])
    with pytest.raises(ValueError, match="infinity 1 times in 2"):
        as_numbers("x.weight", value, (2,))


def test_negative_variances_are_an_error():
    value = np.array([1.0, -1e-3], np.float32)
    with pytest.raises(ValueError, match="bn1.running_var is negative 1 times"):
        as_numbers("bn1.running_var", value, (2,))
    as_numbers("bn1.running_mean", value, (2,))


def test_thresholds_may_be_infinite():
    assert as_numbers("conv1.threshold", np.float32(np.inf), ()) == np.inf
    with pytest.raises(ValueError, match="NaN"):
        as_numbers("conv1.threshold", np.float32(np.nan), ())


def test_shapes_are_checked_before_numbers_are_copied():
    huge = np.broadcast_to(np.float64(0), (1 << 20, 1 << 20))
    with pytest.raises(ValueError, match="misshapen x.weight"):
        as_numbers("x.weight", huge, (3,))


def test_what_is_no_array_is_named():
    with pytest.raises(ValueError, match="unreadable x.weight: a sparse tensor"):
        as_numbers("x.weight", Unknown("a sparse tensor"), (3,))
    with pytest.raises(ValueError, match="unreadable x.weight: list"):
        as_numbers("x.weight", [1.0, 2.0], (2,))


def test_tensors_of_pytorch_are_taken():
    torch = pytest.importorskip("torch", reason="needs PyTorch: the extra `torch`")
    x = torch.arange(3.0)
    for value in (x, x.to(torch.bfloat16), torch.nn.Parameter(x)):
        taken = as_numbers("x.weight", value, (3,))
        assert str(taken.dtype) == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(taken.astype(np.float32), [0, 1, 2])
    for value in (x.to_sparse(), x.to("meta")):
        with pytest.raises(ValueError, match="unreadable x.weight: torch"):
            as_numbers("x.weight", value, (3,))


def test_errors_name_no_more_than_the_start_of_what_a_file_names():
    with pytest.raises(ValueError, match="unreadable x: kkkk") as error:
        as_numbers("x", Unknown("k" * 100_000), (2,))
    assert len(str(error.value)) < 200
