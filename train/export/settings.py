"""The names of the formats of exported networks."""

from typing import Literal

Format = Literal["ijx", "stablehlo", "onnx", "torch", "safetensors"]
