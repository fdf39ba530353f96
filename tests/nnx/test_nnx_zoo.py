"""Modules of people are compressed, trained, multiplied out again, and exported."""

import nnx_zoo
import pytest
from models_table import PAGE, row
from outcomes import assert_all_the_way, init_module, outcome_of

# Layers that stay, and a word of the reason.
KEPT = {
    "unet": dict.fromkeys(("up/0", "up/1"), "nn.ConvTranspose"),
    "vae": {"up": "nn.ConvTranspose"},
    "generator": {"up": "nn.ConvTranspose"},
    "scanned": {"blocks/a": "several layers", "blocks/b": "several layers"},
    "ensemble": {"twins/a": "several layers", "twins/b": "several layers"},
    "tied": {"encode": "also used outside"},
    "discriminator": dict.fromkeys(
        ("spectral/layer_instance", "weighted/layer_instance"), "differ, or may"
    ),
    "masked": {"masked": "mask"},
}
# The others take seconds each, or are the like of a quick one.
QUICK = ("compiled_whole", "ensemble", "tied", "discriminator", "recursive", "hybrid")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in nnx_zoo.MODELS
    ],
)
def test_a_module_of_someone_else_goes_all_the_way(name, tmp_path):
    (cls, shape), call = nnx_zoo.MODELS[name], nnx_zoo.CALLS.get(name)
    outcome = outcome_of(init_module(cls), shape, tmp_path / "small", call=call)
    assert_all_the_way(outcome, KEPT.get(name, {}))
    assert row(name, outcome) in PAGE.read_text()
