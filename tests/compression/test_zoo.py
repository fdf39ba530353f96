"""Models of people are compressed, trained, multiplied out again, and exported."""

import pytest
import zoo
from models_table import PAGE, row
from outcomes import assert_all_the_way, init_linen, outcome_of

# Layers that stay, and a word of the reason.
KEPT = {
    "unet": {"ConvTranspose_0": "nn.ConvTranspose"},
    "vae": {"decoder_0": "nn.ConvTranspose"},
    "scanned": {"blocks/a": "several layers", "blocks/b": "several layers"},
    "ensemble": {"twins/a": "several layers", "twins/b": "several layers"},
    "masked": {"masked": "mask"},
    "local": {"ConvLocal_0": "nn.ConvLocal"},
}
# The others take seconds each.
QUICK = ("rematerialised", "clinical", "video", "masked", "local")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in zoo.MODELS
    ],
)
def test_a_model_of_someone_else_goes_all_the_way(name, tmp_path):
    (model, shape), call = zoo.MODELS[name], zoo.CALLS.get(name)
    network = init_linen(model, shape, call)
    outcome = outcome_of(network, shape, tmp_path / "small", call=call)
    assert_all_the_way(outcome, KEPT.get(name, {}))
    assert row(name, outcome) in PAGE.read_text()
