"""Loads the native library, warns once about a failure, and reports the library in use.

The library ``_kernels.so`` has CPU kernels for the operators declared in ``peft_ext.ops``, and CUDA functions, which
are registered where torch is a CUDA build. On a ROCm build no CUDA functions are registered, because tensors on AMD
GPUs have the dispatch key CUDA too. The pybind11 module ``_C`` holds the library's other functions. Without the library
the operators run the reference implementation, which is correct and slow.

Environment:
    ``PEFT_EXT_CPU_ISA``: force a CPU path (scalar, avx2, avx512, avx512_bf16, amx; amx_emulated for tests; on 64-bit
        Arm scalar, neon, neon_bf16); an unknown or unsupported path is an error. Without the library,
        ``PEFT_EXT_CPU_ISA`` is ignored.
    ``PEFT_EXT_REQUIRE=1``: a native library that is missing, does not load or does not match the package or the module
        ``_C``, and kernels that fail their proof (:mod:`peft_ext.ops.prove`), are an error instead of a warning. If
        the sources beside the package have changed since the library was built, the import only warns, also with
        ``PEFT_EXT_REQUIRE=1``.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Optional
from urllib.parse import unquote, urlsplit

import torch

from ._ops import NAMESPACE
from ._source_digest import has_changed, source_digest
from ._torch_build import torch_build
from ._version import __version__

# The CPU paths on x86-64 whose kernels multiply bfloat16 matrices with bfloat16 instructions, or emulate the
# instructions.
TILE_PATHS = ("avx512_bf16", "amx", "amx_emulated")

OLDEST_TORCH = (2, 11)  # the oldest release of torch that the native library runs on
INSTALL = "pip install --force-reinstall --no-deps"


@dataclass
class NativeState:
    """The native library found at import, and the reason why the library, or its CUDA part, is not in use.

    ``cpu_error`` is also set for a library that is in use although it does not match the package, ``_C`` or the
    sources. ``changed``: the digest of the sources beside the package if the library was built from other sources, else
    "".
    """

    module: Optional[ModuleType] = None
    cpu_error: Optional[str] = None
    changed: str = ""
    cuda_loaded: bool = False
    cuda_error: Optional[str] = None
    build: dict[str, Any] = field(default_factory=dict)

    @property
    def isa(self) -> str:
        """The CPU path in use; "reference" without the native library."""
        return "reference" if self.module is None else self.module.isa()


STATE = NativeState()


def build_identity() -> str:
    """Returns a digest of the names, sizes and modification times of the native libraries in the package's folder.

    If the sources beside the package have changed since the library was built, the digest depends on the sources too,
    so that the kernels are proved again after each change of the sources.
    """
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*folder.glob("_C*"), *folder.glob("_kernels*")]):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    digest.update(STATE.changed.encode())
    return digest.hexdigest()[:16]


def _fail(message: str) -> None:
    if os.environ.get("PEFT_EXT_REQUIRE", "") not in ("", "0"):
        raise ImportError(f"{message} (PEFT_EXT_REQUIRE is set)")
    _warn(message)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def _installed(file: str) -> str:
    """Returns the text of a file in the .dist-info folder of the installed package; "" if there is none."""
    try:
        return importlib.metadata.distribution("peft_ext").read_text(file) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _is_pure() -> bool:
    """Returns whether pip installed the pure Python wheel, which fits every system and has no native library."""
    return "Root-Is-Purelib: true" in _installed("WHEEL") and '"dir_info"' not in _installed("direct_url.json")


def _checkout() -> Optional[Path]:
    """Returns the folder of the checkout, or of the unpacked source distribution, that has this package; None if this
    package is in neither."""
    folder = Path(__file__).parents[1]
    # Another package may have installed a folder csrc beside this package.
    return folder if (folder / "csrc").is_dir() and (folder / "setup.py").is_file() else None


def _torch_is_old() -> bool:
    return tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH


def mend() -> str:
    """Returns the command that installs the native library, or, if torch is too old, the command that installs the
    torch that the library needs."""
    if _torch_is_old():
        return f'pip install "torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"'
    if checkout := _checkout():
        return f"pip install -e {shlex.quote(str(checkout))}   (for a .venv that make has created: make setup)"
    if _is_pure():
        return f"{INSTALL} --no-binary peft_ext {_source()}   (needs a C++ compiler)"
    return f"{INSTALL} {_source()}"


def _source() -> str:
    """Returns the argument of ``pip install`` that names the place from which the package was installed: a folder, a
    file, an address, or the package index."""
    index = f"peft_ext=={__version__}"
    try:
        told = json.loads(_installed("direct_url.json"))
        address = told["url"]
        if vcs := told.get("vcs_info"):
            folder = f"#subdirectory={told['subdirectory']}" if told.get("subdirectory") else ""
            return shlex.quote(f"peft_ext @ {vcs['vcs']}+{address}@{vcs['commit_id']}{folder}")
    except (ValueError, KeyError):  # no direct_url.json: the package came from an index
        return index
    place = Path(unquote(urlsplit(address).path))
    is_local = address.startswith("file:")
    if place.name.endswith("-none-any.whl"):  # this pure wheel has no C++ sources; the source distribution has them
        place = place.with_name(f"peft_ext-{__version__}.tar.gz")
        return shlex.quote(str(place)) if is_local and place.exists() else index
    editable = "-e " if told.get("dir_info", {}).get("editable") else ""
    return editable + shlex.quote(str(place) if is_local else address)


def _running() -> str:
    return f"running: peft_ext {__version__}, torch {torch.__version__}"


def _describe(build: dict[str, Any]) -> str:
    return f"built: peft_ext {build.get('version')}, torch {build.get('torch')} (needs >= {build.get('torch_target')})"


def _load_cpu() -> None:
    if _torch_is_old():
        STATE.cpu_error = f"torch is {torch.__version__}, wanted {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer"
        _fail(f"peft_ext: the native library is not loaded: {STATE.cpu_error}. The slow reference is used. To mend: "
              f"{mend()}")  # fmt: skip
        return
    library = Path(__file__).with_name("_kernels.so")
    try:
        if not library.exists():
            raise ModuleNotFoundError(f"no file {library.name} in {library.parent}")
        # In a copy of peft_ext for Hugging Face's kernels hub, the module _C.py opens the library.
        if not library.with_name("_C.py").exists():
            # RTLD_GLOBAL, because the extension module _C finds the library's functions by name.
            ctypes.CDLL(str(library), mode=os.RTLD_GLOBAL)
        module = importlib.import_module("._C", __package__)
        build = dict(module.build_info())
        module.register_operators("CPU", NAMESPACE)
    # An AttributeError says that the module _C was built from other sources than these Python files.
    except (ImportError, OSError, AttributeError) as error:
        STATE.cpu_error = str(error).strip().splitlines()[0]
        missing = isinstance(error, ModuleNotFoundError)
        what = "was not built" if missing else f"does not load ({STATE.cpu_error})"
        repair = f" To mend: {mend()}"
        if sys.platform == "win32":
            what, repair = "is not built on Windows", ""
            STATE.cpu_error = f"the native library {what}"
        elif missing and _is_pure():
            what = "is not in the installed wheel: no wheel with the library fits this system and this Python"
        _fail(f"peft_ext: the native library {what}; {_running()}. The slow reference is used.{repair}")
        return
    STATE.module, STATE.build = module, build
    _compare(library)
    if forced := os.environ.get("PEFT_EXT_CPU_ISA"):
        if forced not in module.isas():
            raise ImportError(
                f"peft_ext: PEFT_EXT_CPU_ISA is {forced!r}, wanted one that this library and this CPU have: "
                f"{', '.join(module.isas())}"
            )
        module.set_isa(forced)


def _compare(library: Path) -> None:
    """Warns if the loaded library is of another version than the package, or of other sources than the module ``_C`` or
    the folder csrc beside the package. With PEFT_EXT_REQUIRE, another version or another ``_C`` is an ImportError."""
    build, warn = STATE.build, _fail
    digest = build.get("sources", "")
    if build["version"] != __version__:
        STATE.cpu_error = f"{_describe(build)}; {_running()}"
    elif digest != getattr(STATE.module, "_sources", digest):
        STATE.cpu_error = (
            f"the module {Path(STATE.module.__file__).name} was built from other sources than {library.name}"
        )
    elif (checkout := _checkout()) and (changed := _changed(checkout / "csrc", digest, library)):
        STATE.changed, warn = changed, _warn
        STATE.cpu_error = f"the sources in {checkout / 'csrc'} have changed since the library was built"
    if STATE.cpu_error is not None:
        warn(f"peft_ext: the native library does not match: {STATE.cpu_error}. It was loaded all the same. To mend: "
             f"{mend()}")  # fmt: skip


def _changed(sources: Path, digest: str, library: Path) -> str:
    """Returns the digest of the folder ``sources`` if this digest differs from ``digest``; "" if the digests are equal,
    or if a source can't be read."""
    try:
        if has_changed(sources, digest, library.stat().st_mtime):
            return source_digest(sources)
    except OSError:  # a source that can't be read, or that another process has just removed
        pass
    return ""


def _register_cuda(image: Callable[[str, str, int], tuple[bytes, bytes]]) -> None:
    build = torch_build()
    if build.name != "CUDA":
        STATE.cuda_error = build.why_no_kernels
        if build.name != "CPU" and build.has_gpu():
            warnings.warn(
                f"peft_ext: a GPU is here, and its tensors take the slow reference: {build.why_no_kernels}. No other "
                "installation of peft_ext changes this. Tensors on the CPU run the CPU kernels.",
                RuntimeWarning,
                stacklevel=3,
            )
    elif STATE.module is None:
        STATE.cuda_error = STATE.cpu_error
    else:
        STATE.module.set_image_source(image)
        STATE.module.register_operators("CUDA", NAMESPACE)
        STATE.cuda_loaded = True


def release_scratch() -> int:
    """Releases the scratch memory that threads keep between calls of CPU operators. The return value is the number of
    released bytes.

    A thread keeps at most six blocks of up to 32 MiB each, one for each use of scratch memory; most threads of a
    parallel loop keep at most two blocks. The blocks of a thread that is inside an operator's call are not released.
    """
    return 0 if STATE.module is None else STATE.module.release_scratch()


def load(image: Callable[[str, str, int], tuple[bytes, bytes]]) -> NativeState:
    """Loads the native library, if its file exists, and registers the library's operators. The function ``load`` is
    called once, by ``import peft_ext``.

    The argument ``image`` is a function: ``image(kernel, file, capability)`` returns the machine code of a CUDA kernel,
    see ``device_code.image``.
    """
    _load_cpu()
    _register_cuda(image)
    return STATE
