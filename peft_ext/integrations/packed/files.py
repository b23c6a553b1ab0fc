"""Names, dtypes and shapes of a checkpoint's tensors, read from the headers of safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ["Stored", "stored_tensors"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Name, file, dtype and shape of one tensor of a checkpoint, without the tensor's values."""

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> Tensor:
        """Reads the values of the tensor from the file. Call ``read`` only for small tensors that say how a weight is
        stored."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.name)


def stored_tensors(files: Optional[Sequence[str]]) -> dict[str, Stored]:
    """Returns a dict from the name of each tensor of a checkpoint to its Stored. Raises ValueError if a file is no
    safetensors file, if a dtype is not supported, or if there is no tensor."""
    found: dict[str, Stored] = {}
    for path in files or ():
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"PackedConfig: the checkpoint has the file {path}, wanted safetensors files alone")
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                if (dtype := _DTYPES.get(part.get_dtype())) is None:
                    raise ValueError(f"PackedConfig: {name} has the dtype {part.get_dtype()}, which is not supported")
                found[name] = Stored(name, str(path), dtype, tuple(part.get_shape()))
    if not found:
        raise ValueError("PackedConfig: no safetensors files came (a state_dict or a model without a checkpoint?)")
    return found
