"""Maps of friction: what each inertial layer measures on a handful of images."""

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from inertia_jax.calls import apply_network
from inertia_jax.intercept import first_argument, on_calls
from inertia_jax.layers.inertial import FRICTION, InertialConv
from inertia_jax.metadata import Preprocessing
from inertia_jax.ops.inertial.settings import CLOSED, OPEN
from inertia_jax.plan.plan import without_ladders
from inertia_jax.variables import subtree
from train.data import Split
from train.data.augment import Augmentation
from train.networks import NetworkDescription

# The quantiles of a layer's friction between which a slider chooses. With three of its
# own thresholds, there are at most 252 edges, so that levels fit into a byte.
_QUANTILES = 249


@dataclasses.dataclass(frozen=True, eq=False)
class LayerMap:
    """The friction of a layer's regions, and what opens them.

    Attributes:
        path: The layer's path; the number of the call where it is called again.
        friction: The friction of each tile, or of each output in the window reading.
        thresholds: Its threshold, or that of each channel; friction above it opens.
        covered: The shares of the image's height and width that the map covers. They
            exceed 1 where the last tiles are filled up with zeros.
    """

    path: str
    friction: Float[np.ndarray, "n rows columns"]
    thresholds: Float[np.ndarray, "k"]
    covered: tuple[float, float]

    @property
    def threshold(self) -> float:
        """The threshold; the median over the channels where each has its own."""
        return float(np.quantile(self.thresholds, 0.5, method="inverted_cdf"))

    @property
    def gate_rate(self) -> float:
        """The share of open gates, over all images and channels."""
        closed = self.friction[..., None] <= self.thresholds
        return float(1 - closed.mean())


@dataclasses.dataclass(frozen=True, eq=False)
class GateMaps:
    """The layers' maps on some images.

    Attributes:
        layers: One a layer that has gates, and one a call of it.
        images: The images as the network sees them, resized and cut.
        labels: The class of each image.
        answers: The class that the network gives each.
    """

    layers: tuple[LayerMap, ...]
    images: UInt8[np.ndarray, "n h w c"]
    labels: tuple[int, ...]
    answers: tuple[int, ...]


def map_maker(
    network: NetworkDescription,
) -> Callable[[Mapping[str, Any], Split], GateMaps]:
    """Returns a function of variables and test images that returns maps of friction.

    Every layer that sows its friction has one, in the order of the computation.
    """
    model = without_ladders(network.model)
    augmentation = Augmentation.plain(network.preprocessing, model.dtype)
    covered: dict[str, tuple[float, float]] = {}

    @jax.jit
    def measure(variables: Any, images: Any) -> Any:
        def look(module: Any, path: str, call: Any, args: Any, kwargs: Any) -> Any:
            if isinstance(module, InertialConv):
                height, width = first_argument(args, kwargs).shape[-3:-1]
                covered[path] = _covered(module, (height, width))
            return call(*args, **kwargs)

        batch = augmentation.for_evaluation(images)
        with on_calls(look):
            logits, changed = apply_network(
                model, variables, batch, mutable=["intermediates"]
            )
        return batch, logits.argmax(-1), changed.get("intermediates", {})

    def run(variables: Mapping[str, Any], split: Split) -> GateMaps:
        batch, answers, sown = jax.device_get(measure(variables, split.images))
        layers = []
        for path in covered:
            stored = subtree(variables.get("thresholds", {}), path)
            stored = stored or subtree(variables["params"], path)
            thresholds = np.ravel(np.asarray(stored["threshold"], np.float32))
            # Friction is not below 0, and JSON has neither NaN, which opens, nor inf.
            thresholds = np.nan_to_num(thresholds, nan=OPEN, neginf=OPEN, posinf=CLOSED)
            for number, friction in enumerate(subtree(sown, path).get(FRICTION, ())):
                again = f" (call {number + 1})" if number else ""
                friction = np.asarray(friction, np.float32)
                layers.append(
                    LayerMap(f"{path}{again}", friction, thresholds, covered[path])
                )
        return GateMaps(
            tuple(layers),
            images=_pixels(batch, network.preprocessing),
            labels=tuple(map(int, split.labels)),
            answers=tuple(map(int, answers)),
        )

    return run


def _pixels(
    batch: Float[np.ndarray, "n h w c"], preprocessing: Preprocessing
) -> UInt8[np.ndarray, "n h w c"]:
    """Returns the images of a batch that was normalised."""
    shares = batch.astype(np.float32) * preprocessing.std + preprocessing.mean
    return np.clip(np.rint(255 * shares), 0, 255).astype(np.uint8)


def _covered(layer: InertialConv, image_size: tuple[int, int]) -> tuple[float, float]:
    if layer.reading != "tiled":
        return 1.0, 1.0
    tiling = layer.tiling(image_size)
    vertical, horizontal = (
        count * tiling.tile_size / size
        for count, size in zip(tiling.tiles, tiling.output_size, strict=True)
    )
    return vertical, horizontal


def slider_edges(layer: LayerMap) -> Float[np.ndarray, " edges"]:
    """Returns the thresholds that a slider offers, in order, each once.

    They are quantiles of the friction, which are values of it, and the layer's own: the
    least, the median and the greatest of its channels'.
    """
    finite = layer.friction[np.isfinite(layer.friction)]
    shares = np.linspace(0, 1, _QUANTILES)
    quantiles = (
        np.quantile(finite, shares, method="inverted_cdf") if finite.size else []
    )
    own = np.quantile(layer.thresholds, [0, 0.5, 1], method="inverted_cdf")
    edges = np.unique(np.concatenate([quantiles, own]).astype(np.float32))
    return edges


def levels(layer: LayerMap, edges: Float[np.ndarray, " edges"]) -> np.ndarray:
    """Returns how many edges each friction exceeds, in bytes.

    With the edge `k` as threshold, the gates whose level exceeds k are open. That is
    exact: no friction is rounded. A friction that is NaN exceeds all edges.
    """
    return np.searchsorted(edges, layer.friction, side="left").astype(np.uint8)


def layer_to_json(layer: LayerMap) -> dict[str, Any]:
    """Returns what the page's script draws a layer from."""
    edges = slider_edges(layer)
    return {
        "path": layer.path,
        "rows": layer.friction.shape[1],
        "columns": layer.friction.shape[2],
        "covered": layer.covered,
        "edges": [float(f"{edge:.5g}") for edge in edges],
        "own": int(np.searchsorted(edges, np.float32(layer.threshold))),
        "thresholds": len(layer.thresholds),
        "levels": base64.b64encode(levels(layer, edges).tobytes()).decode(),
    }


def maps_to_json(
    index: int, maps: GateMaps, class_names: Sequence[str]
) -> dict[str, Any]:
    """Returns what the page's script draws the maps of the subject `index` from."""
    pictures = [
        {
            "image": _data_url(image),
            "label": class_names[label],
            "answer": class_names[answer],
        }
        for image, label, answer in zip(
            maps.images, maps.labels, maps.answers, strict=True
        )
    ]
    layers = [layer_to_json(layer) for layer in maps.layers]
    return {"subject": index, "pictures": pictures, "layers": layers}


def _data_url(image: UInt8[np.ndarray, "h w c"]) -> str:
    """Returns an image as the address of a PNG, which holds it."""
    stream = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(pixels).convert("RGB").save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
