"""Loads the native libraries, warns once about a failure, and reports the libraries in use.

There are two libraries: ``_C`` (CPU kernels, and the pybind11 part) and ``_C_cuda`` (CUDA kernels, loaded where torch
is a CUDA build). Both libraries register kernels for the operators declared in ``peft_ext.ops``. Without the libraries
the operators run the reference implementation, which is correct and slow.

Environment:
    ``PEFT_EXT_CPU_ISA``: force a CPU path (scalar, avx2, avx512, avx512_bf16, amx; amx_emulated for tests; on 64-bit
        Arm scalar, neon, neon_bf16); an unknown or unsupported path is an error.
    ``PEFT_EXT_REQUIRE=1``: a native library that is missing or does not match, and kernels that fail their proof
        (:mod:`peft_ext.ops.prove`), are an error instead of a warning.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sysconfig
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Optional

import torch

from ._version import __version__

# The CPU paths on x86-64 whose kernels multiply bfloat16 matrices with bfloat16 instructions, or emulate the
# instructions.
TILE_PATHS = ("avx512_bf16", "amx", "amx_emulated")

MEND = "pip install --force-reinstall --no-deps peft_ext   (in a checkout: pip install -e .)"


@dataclass
class NativeState:
    """The native libraries found at import, and the reason why a library was not loaded."""

    module: Optional[ModuleType] = None
    cpu_error: Optional[str] = None
    cuda_loaded: bool = False
    cuda_error: Optional[str] = None
    build: dict[str, Any] = field(default_factory=dict)

    @property
    def isa(self) -> str:
        """The CPU path in use; "reference" without the native library."""
        return "reference" if self.module is None else self.module.isa()


STATE = NativeState()


def build_identity() -> str:
    """Returns a digest of the names, sizes and times of change of the native libraries that exist."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*folder.glob("_C*"), *folder.glob("_kernels*")]):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _fail(message: str) -> None:
    if os.environ.get("PEFT_EXT_REQUIRE", "") not in ("", "0"):
        raise ImportError(f"{message} (PEFT_EXT_REQUIRE is set)")
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _running() -> str:
    return f"running: peft_ext {__version__}, torch {torch.__version__}"


def _describe(build: dict[str, Any]) -> str:
    return f"built: peft_ext {build.get('version')}, torch {build.get('torch')} (needs >= {build.get('torch_target')})"


def _load_cpu() -> None:
    try:
        module = importlib.import_module("peft_ext._C")
    except ImportError as error:
        STATE.cpu_error = str(error).strip().splitlines()[0]
        missing = isinstance(error, ModuleNotFoundError)
        what = "was not built" if missing else f"does not load ({STATE.cpu_error})"
        _fail(f"peft_ext: the native library {what}; {_running()}. The slow reference is used. To mend: {MEND}")
        return
    build = dict(module.build_info())
    if build["version"] != __version__:
        STATE.cpu_error = f"{_describe(build)}; {_running()}"
        _fail(f"peft_ext: the native library does not match: {STATE.cpu_error}. It was loaded all the same. "
              f"To mend: {MEND}")  # fmt: skip
    STATE.module, STATE.build = module, build
    if forced := os.environ.get("PEFT_EXT_CPU_ISA"):
        if forced not in module.isas():
            raise ImportError(
                f"peft_ext: PEFT_EXT_CPU_ISA is {forced!r}, wanted one that this library and this CPU have: "
                f"{', '.join(module.isas())}"
            )
        module.set_isa(forced)


def _load_cuda() -> None:
    if torch.version.cuda is None:
        return
    path = Path(__file__).with_name("_C_cuda" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
    if not path.exists():
        STATE.cuda_error = "not built"
        if torch.cuda.is_available():
            _fail(f"peft_ext: a GPU is here and the CUDA library was not built; {_running()}. CUDA tensors take the "
                  f"slow reference. To mend: FORCE_CUDA=1 {MEND}")  # fmt: skip
        return
    try:
        torch.ops.load_library(str(path))
        STATE.cuda_loaded = True
    except OSError as error:
        STATE.cuda_error = str(error).strip().splitlines()[0]
        _fail(f"peft_ext: the CUDA library does not load ({STATE.cuda_error}); {_describe(STATE.build)}; {_running()}. "
              f"CUDA tensors take the slow reference. To mend: FORCE_CUDA=1 {MEND}")  # fmt: skip


def load() -> NativeState:
    """Loads the native libraries that exist. ``import peft_ext`` calls this function once."""
    _load_cpu()
    _load_cuda()
    return STATE
