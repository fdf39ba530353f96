"""Networks in ONNX Runtime and OpenVINO, for benchmarks."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from inertia_jax.calls import Network
from inertia_jax.torch_source.module import torch_source
from train.errors import UsageError

RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}


def runtime_call(
    runtime: str, network: Network, images: np.ndarray
) -> Callable[[], np.ndarray]:
    """Returns a network's evaluation of these images by another program.

    The file is of the images' shape, and the program has as many threads as this
    process has processors; all else is its own choice.

    Args:
        runtime: The program, `onnx` or `openvino`.
        network: Model and variables.
        images: Images [n, h, w, c].

    Raises:
        UsageError: It is not installed.
    """
    try:
        if runtime == "openvino":
            import openvino
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401

        from train.export.torch import save_onnx
    except ImportError as error:
        raise UsageError(
            f"`--against {runtime}` needs {error.name}: pip install '.[{runtime}]' in "
            f"the checkout."
        ) from error
    model, variables = network
    call: Any = lambda variables, x: model.apply(variables, x)  # noqa: E731
    source = torch_source(call, variables, image_shape=images.shape[1:])  # type: ignore[arg-type]  # three axes
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "network.onnx"
        save_onnx(file, source, images, any_number=False)
        content = file.read_bytes()
    if runtime == "openvino":
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        core = openvino.Core()
        request = core.compile_model(core.read_model(content), "CPU", settings)
        return lambda: request([images])[0]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"images": images})[0]
