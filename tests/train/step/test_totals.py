"""What a step counts: answers that are right, and the first step that went wrong."""

import dataclasses

import numpy as np
from flax import linen as nn
from helpers import DECAYING, IMAGES, INPUTS, LABELS, take_steps


class Linear(nn.Module):
    """A linear layer, in which a step shows as it is computed by hand."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10, name="fc")(x.reshape(len(x), -1))


def test_right_answers_are_those_of_the_parameters_before_the_step():
    _, before = take_steps(Linear(), 1)
    _, after = take_steps(Linear(), 2)
    logits = Linear().apply({"params": before.variables["params"]}, INPUTS)
    # An epoch is one step, so that every step's totals begin anew.
    assert after.totals.correct == (np.argmax(logits, -1) == LABELS).sum()
    assert after.totals.count == len(LABELS)
    assert after.totals.bad_step == -1


def test_several_steps_a_call_of_one_image_are_all_taken():
    alone = {"images": IMAGES[:1], "labels": LABELS[:1]}
    _, together = take_steps(Linear(), 1, steps_per_call=2, **alone)
    _, one_by_one = take_steps(Linear(), 2, **alone)
    assert together.step == one_by_one.step == 2
    np.testing.assert_allclose(
        together.variables["params"]["fc"]["bias"],
        one_by_one.variables["params"]["fc"]["bias"],
        rtol=1e-6,
    )


def test_the_first_bad_step_is_kept():
    wild = dataclasses.replace(DECAYING, learning_rate=1e30)
    states = [take_steps(Linear(), n, optimizer=wild)[1] for n in (2, 3, 4)]
    # Parameters of 1e30 still have a finite loss. Steps are counted from 0.
    assert [int(state.totals.bad_step) for state in states] == [-1, 2, 2]
