"""`python -m train predict`: the classes that a network sees in images."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from inertia_jax.cost.table import aligned
from inertia_jax.metadata import Preprocessing
from train.data.image_files import read_image
from train.errors import UsageError, user_input
from train.evaluate.deployed import images_to_logits
from train.networks import TrainedNetwork, read_network
from train.options.predict import parse
from train.result import add_result
from train.run.checkpoints import find_checkpoint
from train.run.outputs import check_output_file, write_json


def run(argv: Sequence[str]) -> int:
    """Predicts as the arguments say, and prints classes and probabilities."""
    args = parse(argv)
    check_output_file("out", args.out)
    path = find_checkpoint(args.checkpoint)
    for file in args.images:
        if not pathlib.Path(file).is_file():
            raise UsageError(f"there is no image at {file}.")
    network = read_network(path, factory=args.factory)
    images = np.stack([load_image(f, network.preprocessing) for f in args.images])
    probabilities = predict(network, images, batch_size=args.batch_size)
    names = network.class_names or tuple(map(str, range(probabilities.shape[1])))
    found: list[dict[str, Any]] = []
    for file, row in zip(args.images, probabilities, strict=True):
        # Of equal classes the lower comes first, as in argmax.
        order = np.argsort(-row, kind="stable")[: args.top]
        classes = [
            {"class": names[i], "index": int(i), "probability": float(row[i])}
            for i in order
        ]
        found.append({"image": file, "classes": classes})
    for one in found:
        print(one["image"])
        rows = [[f"  {c['class']}", f"{c['probability']:.2%}"] for c in one["classes"]]
        print(aligned(rows))
    add_result({"checkpoint": path, "images": found})
    write_json(args.out, {"checkpoint": str(path), "images": found})
    return 0


def load_image(file: str, preprocessing: Preprocessing) -> UInt8[np.ndarray, "h w c"]:
    """Reads an image as evaluation has it before its centre is cut out.

    Raises:
        UsageError: The file is damaged or no image, or the network takes neither grey
            nor colour images.
    """
    from PIL import Image

    channels = preprocessing.image_shape[2]
    if channels not in (1, 3):
        raise UsageError(f"the network takes images of {channels} channels, no files.")
    with user_input():
        pixels = read_image(pathlib.Path(file), preprocessing.resized_sides)
    if channels == 3:
        return pixels
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def predict(
    network: TrainedNetwork, images: UInt8[np.ndarray, "n h w c"], *, batch_size: int
) -> Float[np.ndarray, "n k"]:
    """Returns the probability of each class, in float64; rows sum to 1."""
    size = min(batch_size, len(images))
    function = images_to_logits(
        network.model, network.variables, network.preprocessing, "uint8"
    )
    call: Any = jax.jit(function)
    # The last batch is filled up, lest it be compiled for itself.
    filled = np.resize(images, (-(-len(images) // size) * size, *images.shape[1:]))
    logits = np.concatenate(
        [np.asarray(call(filled[i : i + size])) for i in range(0, len(filled), size)]
    )[: len(images)].astype(np.float64)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)
