"""Compiles CUDA kernels with NVRTC for the GPU in use, and keeps the machine code in a cache folder.

The native library carries the sources of its CUDA kernels (``_C.sources()``) and asks ``image`` for a kernel's machine
code when the kernel is first launched on a GPU. NVRTC, NVIDIA's compiler as a library, comes with each CUDA build of
torch, and so does the package ``cuda-bindings``, by which Python calls NVRTC. No CUDA toolkit is needed. NVRTC compiles
a kernel in 0.1 to 0.3 seconds.

The cache has a folder for each combination of compiler, sources and architecture, and the folder has a file for each
kernel. A file of machine code is written whole or not at all. If several processes need the same kernel, one of them
compiles the kernel, and the others wait for the kernel's file, at most two minutes.

Environment:
    ``XDG_CACHE_HOME``: the cache is ``$XDG_CACHE_HOME/peft_ext/kernels`` (default: ``~/.cache/peft_ext/kernels``). If
        the cache's folder can't be written, every process compiles the kernels that it needs.
    ``PEFT_EXT_NVRTC_FLAGS``: options that NVRTC gets in addition to peft_ext's own, such as ``-lineinfo``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch

from . import _native
from .files import atomic_file, cache_folder

# Seconds that a process waits for a kernel that another process compiles, before it compiles the kernel itself.
LOCK_SECONDS = 120

# Least number of cores with which ``prepare`` compiles the kernels that the cache lacks; with fewer cores, ``prepare``
# does nothing.
WARM_CORES = 8

# NVRTC has no standard headers. The texts below replace the standard headers, and declare only the names that the
# kernels use.
_INTEGERS = """#pragma once
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long uintptr_t;
"""
_TYPE_TRAITS = """#pragma once
namespace std {
template <class A, class B>
inline constexpr bool is_same_v = false;
template <class A>
inline constexpr bool is_same_v<A, A> = true;
template <bool kCondition, class A, class B>
struct conditional {
  using type = A;
};
template <class A, class B>
struct conditional<false, A, B> {
  using type = B;
};
template <bool kCondition, class A, class B>
using conditional_t = typename conditional<kCondition, A, B>::type;
}  // namespace std
"""
_MATH = """#pragma once
#define INFINITY __int_as_float(0x7f800000)
"""
HEADERS = {
    "math.h": _MATH,
    "stdint.h": _INTEGERS,
    "type_traits": _TYPE_TRAITS,
    # NVRTC itself declares the names of cuda_runtime.h and string.h that the kernels use.
    **dict.fromkeys(("cuda_runtime.h", "string.h"), "#pragma once\n"),
}


def missing() -> Optional[str]:
    """Returns why kernels can't be compiled on this machine; None if they can."""
    found = None
    try:
        found = importlib.util.find_spec("cuda")
        # The search for cuda.bindings imports cuda. If cuda is a module of the user's, its code must not be run.
        is_package = found is not None and found.submodule_search_locations is not None
        lacks = not is_package or importlib.util.find_spec("cuda.bindings") is None
    except Exception:  # a package of the user's named cuda may raise any error when it is imported
        lacks = True
    if lacks:
        # The package cuda-bindings must have the major CUDA release that torch is built for: a newer cuda-bindings
        # looks for a newer NVRTC than the one that torch has.
        major = (torch.version.cuda or "").partition(".")[0]
        named = f'"cuda-bindings=={major}.*"' if major else "cuda-bindings"
        why = f"the package cuda-bindings is missing: pip install {named}"
        file = getattr(found, "origin", None)  # the package cuda of cuda-bindings is a namespace and has no file
        if file is not None and not {"site-packages", "dist-packages"}.intersection(Path(file).parts):
            why = f"{file} hides the package cuda of cuda-bindings: rename this module. If then {why}"
        return why
    try:
        version()
    except Exception as error:  # cuda-bindings raises errors of many types if NVRTC is missing or does not load
        return f"NVRTC does not load ({type(error).__name__}: {error}): pip install --force-reinstall torch"
    return None


def kernels() -> list[tuple[str, str]]:
    """Returns, for each kernel that the native library launches, the C++ expression and the path of the source file."""
    return [] if _native.STATE.module is None else sorted(set(_native.STATE.module.kernels()))


class Image(NamedTuple):
    """A kernel's machine code, and the kernel's name in this machine code."""

    symbol: bytes
    code: bytes


def image(kernel: str, file: str, capability: int) -> Image:
    """Returns a kernel's machine code from the cache; if the cache lacks the kernel, compiles the kernel first.

    ``kernel``: the C++ expression that names an instance of a kernel template. ``file``: the path of the file in csrc
    that defines the kernel. ``capability``: 10 · major + minor of the GPU's compute capability. Raises RuntimeError if
    NVRTC or cuda-bindings is missing, if NVRTC has no target for the GPU, or, with NVRTC's messages, if the kernel does
    not compile.
    """
    if why := missing():
        raise RuntimeError(why)
    arch = architecture(capability)
    path = folder(arch) / _name(kernel)
    if (found := _read(path)) is not None:
        return found
    with _alone(path):
        if (found := _read(path)) is None:
            found, _ = compile_kernel(kernel, file, arch)
            _write(path, found)
    return found


def warm(capability: int, progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, count: items) -> int:
    """Compiles all kernels for a compute capability into the cache, on all cores. Returns the number of all kernels,
    also of those that the cache had before.

    ``progress(iterable, length)`` yields the items of ``iterable`` and may show how many of them are done. Raises
    OSError if the cache's folder can't be written, or if the folder does not hold all kernels at the end.
    """
    place, wanted = folder(architecture(capability)), kernels()
    if not _can_write(place):
        raise OSError(f"no files can be written into the folder {place}")
    count = _compile(wanted, capability, progress)
    if lost := sum(_read(place / _name(kernel)) is None for kernel, _ in wanted):
        raise OSError(f"{lost} of {count} compiled kernels could not be written into the folder {place}")
    return count


def _can_write(place: Path) -> bool:
    """Makes the folder, and returns whether files can be written into the folder."""
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o755, parents=True, exist_ok=True)
    return os.access(place, os.W_OK)


def _compile(wanted: list[tuple[str, str]], capability: int, progress: Callable[..., Iterable[Any]]) -> int:
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for _ in progress(pool.map(lambda kernel: image(*kernel, capability), wanted), len(wanted)):
            pass
    return len(wanted)


@functools.cache
def prepare(capability: int, say: Callable[[str], None]) -> None:
    """Compiles the kernels that the cache lacks for a compute capability, on all cores, before the kernels are needed.

    Does nothing if the machine has fewer than ``WARM_CORES`` cores, if the cache's folder can't be written, or if the
    native library or NVRTC is missing. A first training step needs about a hundred kernels, which one core compiles in
    about the time in which many cores compile all kernels. The kernels of packed formats other than NF4 are left out: a
    model has weights of one or two formats, and the few kernels of these formats are compiled at their first launch.
    Before the compilation, ``prepare`` calls ``say`` with a line for the user. If a kernel does not compile,
    ``prepare`` raises no error; the first launch of the kernel raises the error.
    """
    cores = len(os.sched_getaffinity(0))
    if cores < WARM_CORES or _native.STATE.module is None or missing():
        return
    arch = architecture(capability)
    if not _can_write(folder(arch)):
        # The machine code can't be kept for later runs, so each kernel is compiled at its first launch.
        return
    held = {path.name for path in folder(arch).glob("*.image")}
    lacking = [kernel for kernel in kernels() if "packed/cuda/" not in kernel[1] and _name(kernel[0]) not in held]
    if lacking:
        say(f"peft_ext: compiling {len(lacking)} CUDA kernels for {arch} on {cores} cores, once")
        with contextlib.suppress(RuntimeError):
            _compile(lacking, capability, lambda items, count: items)


# --- the compiler -----------------------------------------------------------------------------------------------------


def compile_kernel(kernel: str, file: str, arch: str, *options: str) -> tuple[Image, str]:
    """Compiles a kernel with NVRTC. Returns an Image of the machine code, and NVRTC's messages as one text.

    The docstring of :func:`image` describes ``kernel`` and ``file``. ``arch`` is, for example, ``sm_90`` for a GPU's
    machine code, or ``compute_90`` for PTX, which the driver translates. ``options`` are further options for NVRTC.
    """
    nvrtc = _nvrtc()
    headers = HEADERS | _sources()
    texts, names = [text.encode() for text in headers.values()], [name.encode() for name in headers]
    source = f'#include "{file.rpartition("csrc/")[2]}"\n'.encode()
    (program,) = _checked(nvrtc.nvrtcCreateProgram(source, b"peft_ext.cu", len(names), texts, names))
    try:
        _checked(nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
        own = [*_options_of(file), *options]
        asked = [f"--gpu-architecture={arch}".encode(), *_options(), *(option.encode() for option in own)]
        if nvrtc.nvrtcCompileProgram(program, len(asked), asked)[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"NVRTC does not compile {kernel} for {arch}:\n{_log(program)}")
        get = ("CUBIN", "PTX")[arch.startswith("compute_")]
        (size,) = _checked(getattr(nvrtc, f"nvrtcGet{get}Size")(program))
        code = bytearray(size)
        _checked(getattr(nvrtc, f"nvrtcGet{get}")(program, code))
        (symbol,) = _checked(nvrtc.nvrtcGetLoweredName(program, kernel.encode()))
        return Image(symbol, bytes(code)), _log(program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@functools.cache
def _nvrtc() -> Any:
    """Returns the Python module of NVRTC. Loads torch's own NVRTC first, because another package may have installed an
    NVRTC of a newer release, whose machine code an older driver would refuse.
    """
    # CDLL raises OSError if torch is a CPU build, which has no libcaffe2_nvrtc.so, or if NVIDIA's driver is not
    # installed.
    with contextlib.suppress(OSError):
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libcaffe2_nvrtc.so"))
    return importlib.import_module("cuda.bindings.nvrtc")


def _checked(results: tuple[Any, ...]) -> tuple[Any, ...]:
    error, *values = results
    if error != 0:
        raise RuntimeError(f"NVRTC: {error}")
    return tuple(values)


def _log(program: Any) -> str:
    nvrtc = _nvrtc()
    (size,) = _checked(nvrtc.nvrtcGetProgramLogSize(program))
    log = bytearray(size)
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    return log.decode(errors="replace").strip("\0\n")


def _options() -> list[bytes]:
    asked = os.environ.get("PEFT_EXT_NVRTC_FLAGS", "").split()
    # -default-device compiles functions that are marked neither __host__ nor __device__ as device functions. Functions
    # of headers that g++ compiles for the host too have no such mark.
    return [option.encode() for option in ("-std=c++17", "-default-device", *asked)]


def _options_of(file: str) -> list[str]:
    """Returns the options for NVRTC that a source file asks for, in a line ``// NVRTC options: ...``."""
    return " ".join(re.findall(r"^// NVRTC options: (.+)$", _sources()[file.rpartition("csrc/")[2]], re.M)).split()


@functools.cache
def version() -> str:
    """Returns NVRTC's release, such as "13.0"."""
    return ".".join(map(str, _checked(_nvrtc().nvrtcVersion())))


def _known_architectures() -> list[int]:
    return list(_checked(_nvrtc().nvrtcGetSupportedArchs())[0])


@functools.cache
def architecture(capability: int) -> str:
    """Returns NVRTC's target for a GPU: ``sm_...`` (machine code) if NVRTC knows the GPU, else ``compute_...`` (PTX) of
    the newest older GPU."""
    known = _known_architectures()
    if capability in known:
        return f"sm_{capability}"
    older = [arch for arch in known if arch < capability]
    if not older:
        raise RuntimeError(f"NVRTC {version()} has no architecture for compute capability {capability / 10}")
    return f"compute_{max(older)}"


@functools.cache
def _sources() -> dict[str, str]:
    return _native.STATE.module.sources()


# --- the cache --------------------------------------------------------------------------------------------------------


def cache() -> Path:
    """Returns the folder of the cache of compiled kernels; the function :func:`folder` returns its subfolders."""
    return cache_folder() / "kernels"


def folder(arch: str) -> Path:
    """Returns the folder in the cache for an architecture, the native library's sources, and NVRTC's release and
    options."""
    told = "\0".join([version(), *map(bytes.decode, _options()), *HEADERS.values(), *_sources(), *_sources().values()])
    return cache() / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}-{arch}"


def _name(kernel: str) -> str:
    """Returns the name of a kernel's file in the cache."""
    return hashlib.sha256(kernel.encode()).hexdigest()[:32] + ".image"


def _read(path: Path) -> Optional[Image]:
    """Returns the kernel that ``_write`` wrote into the file; None if the file is missing, can't be read, or is
    damaged."""
    try:
        digest, symbol, code = path.read_bytes().split(b"\0", 2)
    except (OSError, ValueError):
        return None
    found = Image(symbol, code)
    return found if digest == _digest(found) else None


def _write(path: Path, found: Image) -> None:
    with contextlib.suppress(OSError), atomic_file(path, "wb") as file:  # without a cache, each process compiles
        file.write(b"\0".join([_digest(found), *found]))


def _digest(found: Image) -> bytes:
    return hashlib.sha256(b"\0".join(found)).hexdigest().encode()


def _alone(path: Path) -> AbstractContextManager[Any]:
    """Returns a context manager that holds a lock for the file ``path``, which one thread of one process can hold at a
    time. If the folder can't be written, or if the lock is not free within LOCK_SECONDS, the context manager holds no
    lock.
    """
    from filelock import FileLock

    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        return FileLock(path.with_suffix(".lock"), timeout=LOCK_SECONDS).acquire()
    except (OSError, RuntimeError):  # filelock's Timeout is an OSError
        return nullcontext()
