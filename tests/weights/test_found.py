"""A network's weights are found wherever a file keeps them."""

import numpy as np
import pytest

from inertia_jax.weights.found import find_weights
from inertia_jax.weights.names import is_array
from inertia_jax.weights.pickles import Unknown

KEYS = ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "linear.bias")


def weights(value=0.0, prefix=""):
    return {f"{prefix}{key}": np.full(2, value) for key in KEYS}


def find(loaded, *, ema=False, rename=()):
    return find_weights(loaded, set(KEYS), ema=ema, rename=dict(rename))


def module(value=0.0):
    """Returns what stands for a pickled network, as torch.save(network) writes it."""

    def part(**content):
        unknown = Unknown("some.Network")
        empty = {"_parameters": {}, "_buffers": {}, "_modules": {}, "training": False}
        unknown.update({**empty, "_backward_hooks": {}, **content})
        return unknown

    number = np.full(2, value)
    conv = part(_parameters={"weight": number, "bias": None})
    modules = {
        "conv1": conv,
        "bn1": part(_buffers={"running_mean": number, "num_batches_tracked": 3}),
        "layer1": part(_modules={"0": part(_modules={"conv1": part(**conv)})}),
        "linear": part(_parameters={"bias": number}),
    }
    return part(_modules=modules)


PLACES = {
    "plain": weights(),
    "DataParallel": weights(prefix="module."),
    "torch.compile": weights(prefix="_orig_mod."),
    "both": weights(prefix="module._orig_mod."),
    "Lightning": {"state_dict": weights(prefix="model."), "epoch": 3},
    "any wrapper": {"weights": {"last": weights(prefix="backbone.")}},
    "compiled layers": {
        key.replace("layer1", "layer1._orig_mod").replace("bn1", "bn1.module"): value
        for key, value in weights().items()
    },
    "kuangliu": {"net": weights(prefix="module."), "acc": 91.7, "epoch": 3},
    "beside": {**weights(), "epoch": 3, "name": "x", "curve": [1.0]},
    "numbers": {
        "state_dict": weights(),
        "best": np.float64(91.7),
        "best_acc1": np.ones(1),
        "score": np.ones(()),
    },
    "NumPy's number beside": {**weights(), "best": np.float64(91.7)},
    "counters": {**weights(), "bn1.num_batches_tracked": np.ones(())},
    "whole network": module(),
    "nested network": {"model": module(), "args": Unknown("argparse.Namespace")},
    "optimiser": {
        "model": weights(),
        "optimizer": {"state": {0: {"exp_avg": np.ones(2)}}, "param_groups": [{}]},
    },
    "keys of other types": {"net": weights(), 3: np.ones(2), ("a",): {"b": np.ones(2)}},
}


@pytest.mark.parametrize("case", PLACES)
def test_weights_are_found_where_programs_keep_them(case):
    found = find(PLACES[case])
    arrays = {k: v for k, v in found.state.items() if is_array(v)}
    assert set(arrays) == set(KEYS)
    assert not found.note()


AVERAGED = {
    "timm": {"state_dict": weights(1), "state_dict_ema": weights(2)},
    "torchvision": {
        "model": weights(1),
        "model_ema": weights(2, "module.") | {"n_averaged": np.ones((), int)},
    },
    "networks": {"ema": module(2), "model": module(1)},
    "ema_pytorch": weights(1, "online_model.") | weights(2, "ema_model."),
    "beside": weights(1) | weights(2, "swa."),
    "camel": {"net": weights(1), "netEMA": weights(2)},
    "Lightning": {"state_dict": weights(1, "model.") | weights(2, "averaged_model.")},
}


@pytest.mark.parametrize("case", AVERAGED)
def test_averaged_weights_are_taken_if_asked_for(case):
    raw, averaged = find(AVERAGED[case]), find(AVERAGED[case], ema=True)
    assert set(raw.state) == set(averaged.state)
    assert raw.state["conv1.weight"][0] == 1
    assert averaged.state["conv1.weight"][0] == 2
    assert f"not those at `{averaged.place}`" in raw.note()
    assert "`ema` (=True) takes the averaged ones" in raw.note()
    assert f"the weights at `{averaged.place}` are taken" in averaged.note()


def test_averaged_weights_alone_are_taken_and_lacking_ones_are_an_error():
    assert find({"ema": weights(2)}).state["conv1.weight"][0] == 2
    # A schema is no average.
    for loaded in (weights(), {"schema": weights()}):
        with pytest.raises(ValueError, match="`ema` .*there are none"):
            find(loaded, ema=True)


def test_one_of_several_sets_is_said_or_asked_for():
    loaded = {"state_dict": weights(1), "best": weights(2)}
    found = find(loaded)
    assert found.state["conv1.weight"][0] == 1
    assert found.note() == "the weights at `state_dict` are taken, not those at `best`"
    assert find(loaded, rename={"best": ""}).state["conv1.weight"][0] == 2
    pair = weights(1, "teacher.") | weights(2, "student.")
    with pytest.raises(
        ValueError, match="at student, teacher.*`rename`, e.g. student="
    ):
        find(pair)
    assert find(pair, rename={"student": ""}).state["conv1.weight"][0] == 2


def test_arrays_beside_the_weights_are_said():
    loaded = weights(prefix="model.") | {"loss.weight": np.ones(2)}
    found = find(loaded)
    assert set(found.state) == set(KEYS)
    assert found.note() == "arrays beside them are left out: loss.weight"
    # Without a prefix they may belong to the network.
    assert "loss.weight" in find(weights() | {"loss.weight": np.ones(2)}).state


def test_parts_of_keys_are_renamed():
    loaded = weights(prefix="module.")
    loaded["module.top.bias"] = loaded.pop("module.linear.bias")
    assert set(find(loaded, rename={"top": "linear"}).state) == set(KEYS)
    assert set(find(loaded, rename={"t*": "linear"}).state) == set(KEYS)
    with pytest.raises(ValueError, match="'tops', which is part of no key. Is it 'top"):
        find(loaded, rename={"tops": "linear"})
    with pytest.raises(ValueError, match="two values for conv1.weight"):
        find({**weights(), "fc.weight": np.ones(2)}, rename={"fc": "conv1"})
    with pytest.raises(ValueError, match="at most as many \\* as the old one"):
        find(loaded, rename={"top": "linear*"})


@pytest.mark.parametrize("name", ["fc", "classifier", "head"])
def test_known_spellings_of_layers_are_renamed(name):
    loaded = weights(1)
    loaded[f"{name}.bias"] = loaded.pop("linear.bias")
    assert set(find(loaded).state) == set(KEYS)
    # Both are there: which one is meant is unknown.
    loaded["head.bias" if name == "fc" else "fc.bias"] = np.ones(2)
    assert "linear.bias" not in find(loaded).state
    # What the network has is no other spelling.
    assert find({**weights(1), f"{name}.bias": np.ones(2)}).state["linear.bias"][0] == 1


@pytest.mark.parametrize("head", ["head", "linear", "net.fc"])
def test_the_last_layer_is_found_beside_the_others(head):
    loaded = weights(1, "net.encoder.")
    loaded[f"{head}.bias"] = loaded.pop("net.encoder.linear.bias")
    loaded["projector.bias"] = np.ones(2)
    found = find({"state_dict": loaded})
    assert set(found.state) == set(KEYS)
    assert found.note() == (
        "arrays beside them are left out: state_dict.projector.bias"
    )


def test_two_keys_of_one_weight_are_an_error():
    with pytest.raises(ValueError, match="two values for linear.bias"):
        find({**weights(), "module.linear.bias": np.ones(2)})


def test_a_nested_tensor_is_no_array():
    class Nested:
        is_nested = True

        @property
        def shape(self):
            raise RuntimeError("nested tensors have no sizes")

    found = find({**weights(), "linear.bias": Nested()})
    assert repr(found.state["linear.bias"]) == "<a nested tensor>"


def test_names_of_the_network_are_no_wrappers():
    key = "module.conv.weight"
    found = find_weights({key: np.ones(2)}, {key}, ema=False, rename={})
    assert set(found.state) == {key}


@pytest.mark.parametrize("loaded", [{}, {"epoch": 3}, {3: np.ones(2)}, {"a": {}}])
def test_what_holds_no_arrays_is_an_error(loaded):
    with pytest.raises(ValueError, match="no arrays whose keys are strings"):
        find(loaded)


def test_mappings_that_are_made_when_asked_for_are_read():
    from flax.core import freeze

    # Each of them is another object at the place of the one before.
    keys = [f"layer{i}.a.b.conv.weight" for i in range(60)]
    layers = {
        f"layer{i}": {"a": {"b": {"conv": {"weight": np.ones(2)}}}} for i in range(60)
    }
    loaded = freeze(layers)
    found = find_weights(loaded, set(keys), ema=False, rename={})
    assert list(found.state) == keys


def test_mappings_that_hold_themselves_or_each_other_end():
    loaded = weights()
    loaded["self"] = loaded
    level = {"x": np.ones(2)}
    for _ in range(60):
        level = {"a": level, "b": level}
    loaded["doubled"] = level
    deep = {}
    for _ in range(5000):
        deep = {"a": deep}
    loaded["deep"] = deep
    assert set(KEYS) <= set(find(loaded).state)


def test_keys_without_a_letter_are_not_followed_for_ever():
    loaded = weights()
    for _ in range(50):
        loaded = {"": loaded}
    assert find(loaded).state.keys() == set(KEYS)
    for _ in range(100):
        loaded = {"": loaded}
    with pytest.raises(ValueError, match="no arrays"):
        find(loaded)


def test_an_error_names_no_more_than_a_few_of_many_sets():
    loaded = {f"set{i}": weights() for i in range(100)}
    with pytest.raises(ValueError, match="set0, set1, set10, 97 more"):
        find(loaded)
    assert "97 more" in find({"state_dict": weights(), **loaded}).note()


def shadows(*values):
    return {"decay": 0.9, "num_updates": 3, "shadow_params": list(values)}


def test_averages_without_names_are_those_of_the_parameters_in_order():
    """As torch_ema keeps them: without the statistics, which stay the raw ones."""
    raw = {key: np.full((i + 1,), 0.0) for i, key in enumerate(KEYS)}
    averages = [np.full((size,), float(size)) for size in (1, 3, 4)]
    loaded = {"model": raw, "ema": shadows(*averages)}
    found = find(loaded)
    assert found.state == raw
    note = (
        "the weights at `model` are taken, not those at `ema.shadow_params`; `ema` "
        "(=True) takes the averaged ones"
    )
    assert found.note() == note
    found = find(loaded, ema=True)
    assert list(found.state) == list(KEYS)
    assert [array[0] for array in found.state.values()] == [1, 0, 3, 4]
    assert found.note() == (
        "the weights at `ema.shadow_params` are taken, not those at `model`"
    )
    # Named averages are surer.
    loaded["model_ema"] = {key: array + 7 for key, array in raw.items()}
    assert find(loaded, ema=True).state["linear.bias"][0] == 7


@pytest.mark.parametrize("sizes", [(1, 3), (1, 4, 3), (1, 2, 3, 4)])
def test_averages_without_names_that_do_not_fit_are_refused(sizes):
    raw = {key: np.full((i + 1,), 0.0) for i, key in enumerate(KEYS)}
    loaded = {"model": raw, "ema": shadows(*map(np.ones, sizes))}
    message = rf"shadow_params has {len(sizes)} averages .* the 3 parameters beside"
    with pytest.raises(ValueError, match=message):
        find(loaded, ema=True)
    assert find(loaded).state == raw


@pytest.mark.parametrize("listed", [[], [1.0], "ab", np.ones(3)])
def test_other_lists_are_no_averages(listed):
    loaded = {"model": weights(), "ema": {"shadow_params": listed}}
    with pytest.raises(ValueError, match="needs averaged weights"):
        find(loaded, ema=True)


@pytest.mark.parametrize("place", ["", "model", "model.diffusion_model"])
@pytest.mark.parametrize("name", ["", "diffusion_model"])
def test_averages_whose_keys_have_no_dots_are_those_of_the_weights(place, name):
    """As latent diffusion keeps them: of what is trained, with two numbers beside."""
    raw = weights(1, f"{place}." if place else "")
    averages = {
        f"model_ema.{name}{key.replace('.', '')}": np.full(2, 2.0)
        for key in KEYS
        if key != "bn1.running_mean"
    }
    loaded = {**raw, **averages, "model_ema.decay": np.ones(())}
    found = find(loaded)
    assert found.state["conv1.weight"][0] == 1
    assert not found.left_out
    assert "not those at `model_ema`; `ema` (=True) takes" in found.note()
    found = find(loaded, ema=True)
    assert found.place == "model_ema"
    assert {key: found.state[key][0] for key in KEYS} == {
        key: 1 if key == "bn1.running_mean" else 2 for key in KEYS
    }
