"""Networks in PyTorch, ONNX Runtime and OpenVINO, for benchmarks."""

import importlib
import importlib.metadata
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from inertia_jax.torch_source.module import TorchSource, torch_source
from train.errors import UsageError

RUNTIMES = {"torch": "PyTorch", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}
_ONNX = ("onnx", "onnxruntime", "onnxscript", "torch")
_PACKAGES = {"torch": ("torch",), "onnx": _ONNX, "openvino": ("openvino", *_ONNX)}


def check_installed(runtime: str) -> None:
    """Raises UsageError if a package of a runtime, one of `RUNTIMES`, is missing."""
    try:
        for package in _PACKAGES[runtime]:
            importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"`--against {runtime}` needs {error.name}: pip install '.[{runtime}]' in "
            f"the checkout."
        ) from error


def runtime_versions(runtimes: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the packages of runtimes."""
    packages = {package for runtime in runtimes for package in _PACKAGES[runtime]}
    return {name: importlib.metadata.version(name) for name in sorted(packages)}


def runtime_call(
    runtime: str,
    function: Callable[[Any, Any], Any],
    variables: Mapping[str, Any],
    images: np.ndarray,
) -> Callable[[], Any]:
    """Returns a network's evaluation of these images by another program.

    PyTorch runs the module that `torch_source` writes, channels last, in eager mode.
    The others run a file of the images' shape in float32, and have as many threads as
    this process has processors; all else is their own choice.

    Args:
        runtime: The program, one of `RUNTIMES`.
        function: The network, a function of variables and images [n, h, w, c].
        variables: Its variables.
        images: Images [n, h, w, c].

    Raises:
        UsageError: It is not installed.
        ValueError: The network has no form in PyTorch here, or the program refuses it.
    """
    check_installed(runtime)
    source = torch_source(function, variables, image_shape=images.shape[1:])
    try:
        call = _CALLS[runtime](source, images)
        call()
    except Exception as error:  # the other program's, which may be of any class
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{RUNTIMES[runtime]} refuses it: {reason}") from error
    return call


def module_call(module: Any, images: np.ndarray) -> Callable[[], Any]:
    """Returns the evaluation of images [n, h, w, c] by a module of PyTorch on CPU."""
    import torch

    module.to(memory_format=torch.channels_last)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last)

    def call() -> Any:
        with torch.inference_mode():
            return module(x)

    return call


def _torch_call(source: TorchSource, images: np.ndarray) -> Callable[[], Any]:
    from train.export.torch import make_network

    return module_call(make_network(source.code, source.state).eval(), images)


def _onnx_call(source: TorchSource, images: np.ndarray) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _num_threads()
    session = onnxruntime.InferenceSession(
        _onnx_file(source, images), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"images": images})[0]


def _openvino_call(source: TorchSource, images: np.ndarray) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        # By itself it takes bfloat16 where the processor has it.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": _num_threads(),
    }
    model = core.read_model(_onnx_file(source, images))
    request = core.compile_model(model, "CPU", settings)
    return lambda: request([images])[0]


_CALLS: Mapping[str, Callable[[TorchSource, np.ndarray], Callable[[], Any]]] = {
    "torch": _torch_call,
    "onnx": _onnx_call,
    "openvino": _openvino_call,
}


def _onnx_file(source: TorchSource, images: np.ndarray) -> bytes:
    from train.export.torch import save_onnx

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "network.onnx"
        save_onnx(file, source, images, any_number=False)
        return file.read_bytes()


def _num_threads() -> int:
    return len(os.sched_getaffinity(0))
