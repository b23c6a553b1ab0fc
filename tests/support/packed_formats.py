"""The formats of quantize_packed as test parameters, and models in these formats."""

from __future__ import annotations

import pytest
import torch

from peft_ext.weights.quantizers import PACKED_FORMATS, quantized


def decodes(format: str) -> bool:
    """Returns whether the built library decodes the format."""
    try:
        quantized(torch.zeros(1, 32), format).dequantize()
    except RuntimeError:
        return False
    return True


FORMATS = tuple(format for format in PACKED_FORMATS if decodes(format))
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS)
