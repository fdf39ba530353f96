"""A network's weights as safetensors, with a card, as the Hugging Face Hub has them."""

import pathlib
import warnings
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from inertia_jax import Plan, create_model, load_torch, to_torch
from inertia_jax.plan.plan import without_ladders
from train.errors import UsageError
from train.evaluate.deployed import images_to_logits
from train.export.card import model_card
from train.export.comparison import Logits
from train.export.formats import Job
from train.networks import model_config
from train.own_network import OwnNetwork

_PLAN = "plan.json"
_LOAD = """\
`{weights}` has PyTorch's names and axes; `plan.json` says what stands at each layer.

```python
import pathlib
import inertia_jax as ij

plan = ij.Plan.from_json(pathlib.Path("plan.json").read_text())
model = ij.create_model({options}, plan=plan)
variables = ij.load_torch(model, "{weights}", image_shape={shape})
logits = model.apply(variables, images)  # normalised, float32 [n, {shown}]
```
"""


def write_safetensors(folder: pathlib.Path, job: Job, weights: str) -> Logits:
    """Writes a folder with weights, plan and card, which `load_torch` reads.

    Raises:
        UsageError: The network is none of this library's.
    """
    model, preprocessing = job.network.model, job.network.preprocessing
    if isinstance(model, OwnNetwork):
        raise UsageError(
            "`format` (=safetensors) must be of a network of this library, which "
            "load_torch reads again; export one of your own as torch."
        )
    shape = preprocessing.image_shape
    with warnings.catch_warnings():
        # That PyTorch has no gates is said in the card, which names them.
        warnings.filterwarnings("ignore", "PyTorch has no inertial layers")
        state = to_torch(model, job.variables)
    folder.mkdir()
    metadata = {"format": "pt", "checkpoint": str(job.path)}
    safetensors.numpy.save_file(state, folder / weights, metadata)
    (folder / _PLAN).write_text(model.plan.to_json() + "\n")
    config = model_config(model)
    options: dict[str, Any] = {"num_classes": model.num_classes}
    options |= {
        name: getattr(config, name)
        for name in ("width", "stem", "shortcut")
        if hasattr(model, name)
    }
    words = ", ".join(f"{name}={value!r}" for name, value in options.items())
    load = _LOAD.format(
        weights=weights,
        options=f"{config.name!r}, {words}",
        shape=shape,
        shown=", ".join(map(str, shape)),
    )
    (folder / "README.md").write_text(model_card(job, load, library="inertia_jax"))
    plan = Plan.from_json((folder / _PLAN).read_text())
    read: Any = without_ladders(create_model(config.name, plan=plan, **options))
    variables = load_torch(read, folder / weights, image_shape=shape)
    function = jax.jit(
        images_to_logits(read, variables, preprocessing, job.image_dtype)
    )
    return lambda images: np.asarray(function(images))
