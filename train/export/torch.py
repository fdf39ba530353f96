"""A network as a module of PyTorch with its state dict, and as ONNX."""

import logging
import pathlib
import re
import warnings
from typing import Any

import numpy as np

from inertia_jax.torch_source.module import TorchSource, torch_source
from train.errors import UsageError
from train.export.card import model_card
from train.export.comparison import Logits
from train.export.formats import Job

_LOAD = """\
`network.py` is the network, and needs PyTorch alone; `{weights}` is its state dict.

```python
import torch
from network import Network  # with this folder in sys.path

network = Network()
network.load_state_dict(torch.load("{weights}", weights_only=True))
logits = network.eval()(images)  # {dtype} {shape}
```
"""


def write_torch(folder: pathlib.Path, job: Job, weights: str) -> Logits:
    """Writes a folder with a module, its state dict and a card.

    Raises:
        UsageError: PyTorch is not installed.
        ValueError: The network does what has no form in PyTorch here.
    """
    torch = _import_torch("torch", "torch")
    source = _source(job)
    folder.mkdir()
    code = folder / "network.py"
    code.write_text(source.code)
    torch.save(make_network(source.code, source.state).state_dict(), folder / weights)
    height, width, channels = job.image_shape
    load = _LOAD.format(
        weights=weights,
        dtype=job.image_dtype,
        shape=f"[n, {channels}, {height}, {width}]",
    )
    (folder / "README.md").write_text(model_card(job, load, library="pytorch"))
    state = torch.load(folder / weights, weights_only=True)
    network = make_network(code.read_text(), state).eval()
    return lambda images: _call(network, np.moveaxis(images, -1, 1))


def write_onnx(path: pathlib.Path, job: Job) -> Logits:
    """Writes a file of ONNX, which takes images [n, h, w, c], by PyTorch's exporter.

    Raises:
        UsageError: A package of the extra `onnx` is not installed.
        ValueError: The network does what has no form in PyTorch here.
    """
    _import_torch("onnx", "torch", "onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    images = np.zeros((job.batch_size or 2, *job.image_shape), job.image_dtype)
    save_onnx(path, _source(job), images, any_number=job.batch_size is None)
    session = onnxruntime.InferenceSession(
        path.read_bytes(), providers=["CPUExecutionProvider"]
    )
    return lambda images: session.run(["logits"], {"images": images})[0]


def save_onnx(
    path: pathlib.Path, source: TorchSource, images: np.ndarray, *, any_number: bool
) -> None:
    """Writes a file of ONNX.

    Args:
        path: The file.
        source: The network.
        images: Images [n, h, w, c] of the input's shape and type.
        any_number: Whether n is symbolic; there must then be two images at least, since
            PyTorch takes 1 for a size that is fixed.
    """
    import torch

    network = make_network(source.code, source.state).eval()

    class ChannelsLast(torch.nn.Module):
        """The network on images as JAX has them."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Any) -> Any:
            return self.network(images.permute(0, 3, 1, 2))

    sizes = {0: torch.export.Dim("n")} if any_number else {}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about itself
        logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                ChannelsLast().eval(),
                (torch.from_numpy(images),),
                dynamo=True,
                dynamic_shapes={"images": sizes},
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
        finally:
            logger.setLevel(level)
    if program is None:
        raise RuntimeError("PyTorch exported no program.")
    program.save(str(path))


def _source(job: Job) -> TorchSource:
    name = re.sub(r"\s+", " ", str(job.path)).replace('"""', "").replace("\\", "/")
    return torch_source(
        job.call,
        job.variables,
        image_shape=job.image_shape,
        image_dtype=job.image_dtype,
        title=f"The network of {name}.",
    )


def _import_torch(format_: str, *packages: str) -> Any:
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise UsageError(
                f"`format` (={format_}) needs {package}: pip install '.[{format_}]' in "
                f"the checkout."
            ) from error
    import torch

    return torch


def make_network(code: str, state: Any) -> Any:
    """Returns the module that a source defines, with its weights."""
    import torch

    names: dict[str, Any] = {"__name__": "network"}
    exec(compile(code, "network.py", "exec"), names)
    network = names["Network"]()
    tensors = {
        name: value if torch.is_tensor(value) else torch.from_numpy(np.array(value))
        for name, value in state.items()
    }
    network.load_state_dict(tensors)
    return network


def _call(network: Any, images: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return network(torch.from_numpy(np.ascontiguousarray(images))).numpy()
