"""Calls the functions of the native library by ctypes, in place of the pybind11 module of the same name, which would
work with one release of Python only. ``csrc/common/api.h`` declares the functions."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: F401  the library links with torch's libraries

_LIBRARY = ctypes.CDLL(str(Path(__file__).with_name("_kernels.so")))
_INT, _TEXT = ctypes.c_int, ctypes.c_char_p


class _Image(ctypes.Structure):
    """The struct PeftExtImage of csrc/common/api.h: the machine code of a kernel, or an error."""

    _fields_ = [("symbol", _TEXT), ("data", ctypes.c_void_p), ("error", _TEXT)]


_IMAGE_SOURCE = ctypes.CFUNCTYPE(None, _TEXT, _TEXT, _INT, ctypes.POINTER(_Image))
# For each function of csrc/common/api.h, without the prefix of its name: the type of its result, and the types of its
# arguments.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "version": (_TEXT,),
    "built_for_torch": (_TEXT,),
    "oldest_torch": (_TEXT,),
    "compiler": (_TEXT,),
    "source_digest": (_TEXT,),
    "isa_count": (_INT,),
    "isa_name": (_TEXT, _INT),
    "isa_compiled": (_INT, _INT),
    "isa_available": (_INT, _INT),
    "isa": (_INT,),
    "set_isa": (None, _INT),
    "kernel_count": (_INT,),
    "kernel_name": (_TEXT, _INT),
    "kernel_file": (_TEXT, _INT),
    "source_count": (_INT,),
    "source_path": (_TEXT, _INT),
    "source_text": (_TEXT, _INT),
    "set_image_source": (None, _IMAGE_SOURCE),
    "register_operators": (None, _TEXT, _TEXT),
    "kept_scratch": (ctypes.c_uint64,),
    "release_scratch": (ctypes.c_uint64,),
    "parallel_loops": (ctypes.c_uint64,),
    "forget_plan": (None, ctypes.c_int64),
}

# For each thread: the machine code of the kernel that the thread last asked for, or the text of the error. The library
# may read these bytes until the thread asks for the machine code of another kernel (see :func:`set_image_source`).
_held = threading.local()
_callback: Any = None


def _call(name: str, *args: Any) -> Any:
    value = getattr(_LIBRARY, f"peft_ext_{name}")(*args)
    return value.decode() if isinstance(value, bytes) else value


for _name, (_result, *_arguments) in _SIGNATURES.items():
    _function = getattr(_LIBRARY, f"peft_ext_{_name}")
    _function.restype, _function.argtypes = _result, _arguments


def _paths(accept: str) -> list[str]:
    return [_call("isa_name", isa) for isa in range(_call("isa_count")) if _call(accept, isa)]


def build_info() -> dict[str, Any]:
    """Returns the versions of peft_ext and of torch, the compiler, the digest of the sources, and the CPU paths of the
    library's build."""
    return {
        "version": _call("version"),
        "torch": _call("built_for_torch"),
        "torch_target": _call("oldest_torch"),
        "compiler": _call("compiler"),
        "sources": _call("source_digest"),
        "isas": _paths("isa_compiled"),
    }


def isa() -> str:
    """Returns the name of the CPU path that the kernels use."""
    return _call("isa_name", _call("isa"))


def isas() -> list[str]:
    """Returns the CPU paths that the library has and this CPU supports."""
    return _paths("isa_available")


def set_isa(name: str) -> None:
    """Switches to a CPU path, one of :func:`isas`."""
    if name not in isas():
        raise ValueError(f"set_isa: name is {name!r}, wanted one of isas()")
    _call("set_isa", [_call("isa_name", isa) for isa in range(_call("isa_count"))].index(name))


def kernels() -> list[tuple[str, str]]:
    """Returns a pair for each CUDA kernel: the C++ expression that names the kernel with its template arguments, and
    the path of the kernel's source."""
    return [(_call("kernel_name", at), _call("kernel_file", at)) for at in range(_call("kernel_count"))]


def sources() -> dict[str, str]:
    """Returns the texts of the CUDA kernels' sources, by path."""
    return {_call("source_path", at): _call("source_text", at) for at in range(_call("source_count"))}


def set_image_source(function: Callable[[str, str, int], tuple[bytes, bytes]]) -> None:
    """Sets the function that compiles CUDA kernels: ``(kernel, file, capability) -> (symbol, machine code)``."""
    global _callback

    def source(name: bytes, file: bytes, capability: int, image: Any) -> None:
        try:
            _held.image = symbol, code = function(name.decode(), file.decode(), capability)
            image[0].symbol = symbol
            image[0].data = ctypes.cast(ctypes.c_char_p(code), ctypes.c_void_p)
        except BaseException as error:  # a Python exception cannot pass through the native library
            _held.image = (str(error) or type(error).__name__).encode()
            image[0].error = _held.image

    _callback = _IMAGE_SOURCE(source)
    _call("set_image_source", _callback)


def register_operators(key: str, namespace: str) -> None:
    """Registers the operators' functions for a dispatch key, "CPU" or "CUDA", in a namespace of ``torch.ops``."""
    _call("register_operators", key.encode(), namespace.encode())


def kept_scratch() -> int:
    """Returns the scratch memory that threads keep between calls of CPU operators, in bytes."""
    return _call("kept_scratch")


def release_scratch() -> int:
    """Releases the scratch memory of all threads that are in no call. Returns the number of released bytes."""
    return _call("release_scratch")


def parallel_loops() -> int:
    """Returns the number of parallel loops of CPU operators that woke other threads since the library was loaded."""
    return _call("parallel_loops")


def forget_plan(plan: int) -> None:
    """Forgets the lists that the operator decoder_layer keeps under the number ``plan``."""
    _call("forget_plan", plan)
