"""Maps of friction: what they hold, and that a slider's gates are the layer's own."""

import base64

import jax
import numpy as np
import pytest
from helpers import PREPROCESSING, SHAPE
from report_page import PLAN, lenet

import inertia_jax as ij
from inertia_jax.metadata import Metadata
from train.data import Split
from train.networks import read_network
from train.report.findings import choose_pictures
from train.report.gate_maps import (
    LayerMap,
    _covered,
    layer_to_json,
    levels,
    map_maker,
    slider_edges,
)


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """The maps of an inertial network, its images, and what its layers sow."""
    path = tmp_path_factory.mktemp("maps") / "gated"
    model, variables = lenet(PLAN)
    # Each channel of the second layer has a threshold of its own.
    thresholds = np.linspace(0, 0.8, 16, dtype=np.float32)
    variables["params"]["conv2"]["threshold"] = thresholds
    variables["thresholds"]["conv1"]["threshold"] = np.float32(1.2)
    ij.save_checkpoint(path, model, variables, metadata=Metadata(PREPROCESSING))
    images = np.random.default_rng(0).integers(256, size=(3, *SHAPE), dtype=np.uint8)
    network = read_network(path)
    split = Split(images, np.arange(3, dtype=np.int32))
    found = map_maker(network)(network.variables, split)
    batch = (images / 255 - PREPROCESSING.mean[0]) / PREPROCESSING.std[0]
    _, sown = jax.jit(lambda v, x: model.apply(v, x, mutable=["intermediates"]))(
        variables, batch.astype(np.float32)
    )
    return found, images, sown["intermediates"]


@pytest.mark.slow
def test_maps_are_what_the_layers_measure(maps):
    found, images, sown = maps
    np.testing.assert_array_equal(found.images, images)
    assert [layer.path for layer in found.layers] == ["conv1", "conv2"]
    for layer in found.layers:
        own = sown[layer.path]
        # The images were normalised in float32 here and there, in another order.
        np.testing.assert_allclose(layer.friction, own["friction"][0], atol=1e-6)
        rate = float(np.mean(own["gate_rate"][0]))
        # A gate may be the other way round where friction is the threshold.
        np.testing.assert_allclose(layer.gate_rate, rate, atol=0.01)
        assert 0.02 < rate < 0.98
    tiled, window = found.layers
    # Six outputs in tiles of two: three tiles; four windows.
    assert tiled.friction.shape == (3, 3, 3) and tiled.covered == (1, 1)
    assert window.friction.shape == (3, 4, 4)
    assert len(window.thresholds) == 16


def test_tiles_that_are_filled_up_reach_beyond_the_image():
    model = ij.InertialConv(4, (3, 3), reading="tiled", region_size=5, padding="VALID")
    # Six outputs in two tiles of three, and seven in three.
    assert _covered(model, (8, 9)) == (1, 9 / 7)


def test_a_slider_has_exactly_the_gates_of_each_threshold():
    friction = np.random.default_rng(0).gamma(1.0, size=(2, 30, 31)).astype(np.float32)
    friction[0, 0, :3] = np.nan, friction[1].max(), 0.7
    layer = LayerMap("conv", friction, np.array([0.7], np.float32), (1.0, 1.0))
    edges = slider_edges(layer)
    assert len(edges) <= 252 and (np.diff(edges) > 0).all()
    level = levels(layer, edges)
    for place, edge in enumerate(edges):
        # NaN opens the gate, and friction at the threshold does not.
        np.testing.assert_array_equal(level > place, ~(friction <= edge))
    assert (level > -1).all()  # the slider's first place opens every gate
    assert (level <= len(edges) - 1)[~np.isnan(friction)].all()
    told = layer_to_json(layer)
    assert told["own"] == list(edges).index(np.float32(0.7))
    sent = np.frombuffer(base64.b64decode(told["levels"]), np.uint8)
    np.testing.assert_array_equal(sent.reshape(level.shape), level)
    opened = (sent > told["own"]).mean()
    np.testing.assert_allclose(opened, layer.gate_rate, rtol=1e-12)


@pytest.mark.parametrize(
    ("thresholds", "own"), [([-1], -1), ([1e30], 1e30), ([0, 0.5, 1e30], 0.5)]
)
def test_thresholds_beyond_all_friction_are_places_of_the_slider(thresholds, own):
    friction = np.zeros((1, 2, 2), np.float32)
    layer = LayerMap("conv", friction, np.array(thresholds, np.float32), (1.0, 1.0))
    edges = slider_edges(layer)
    assert {*np.float32(thresholds)} <= {*edges}
    assert edges[layer_to_json(layer)["own"]] == np.float32(own)


def test_pictures_are_of_every_class_first():
    labels = np.array([2, 2, 0, 2, 1, 0], np.int32)
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    chosen = [choose_pictures(Split(images, labels), n) for n in (2, 5)]
    assert [c.images.ravel().tolist() for c in chosen] == [[2, 4], [2, 4, 0, 1, 3]]
    assert chosen[1].labels.tolist() == [0, 1, 2, 2, 2]
