"""``peft-ext doctor``: versions, native libraries, CPU path, operators, packages and environment."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable
from typing import Annotated, Any, Optional

import torch
import typer
from rich.progress import track

from .. import __version__, _cpu, _native, device_code
from ..machine import versions
from ..ops import library, prove
from ..text import dtype_name
from . import CliError

_PEERS = ("transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl", "liger-kernel")
_ENVIRONMENT = (
    "PEFT_EXT_CPU_ISA", "PEFT_EXT_REQUIRE", "PEFT_EXT_NVRTC_FLAGS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "HF_HOME",
    "HF_HUB_OFFLINE", "XDG_CACHE_HOME",
)  # fmt: skip


def doctor(
    warm: Annotated[bool, typer.Option("--warm", help="First compile all CUDA kernels into the cache.")] = False,
    capability: Annotated[
        Optional[list[str]],
        typer.Option(help="With --warm: a compute capability, such as 9.0 (default: those of this machine's GPUs)."),
    ] = None,
) -> int:
    """Show versions, the native library, the CPU path in use and which operators have kernels."""
    # The exit code is 1 where the native library can't be loaded.
    if warm or capability:
        _warm(capability or [])
    state = _native.STATE
    _section("versions")
    _row("peft_ext", __version__)
    _row("torch", torch.__version__)
    _row("python", f"{platform.python_version()} ({sys.executable})")
    _row("system", f"{platform.system()} {platform.machine()}")

    _section("native library, CPU")
    if state.module is None:
        _row("loaded", f"no: {state.cpu_error}")
        _row("mend", _native.mend())
    else:
        _row("loaded", "yes" if state.cpu_error is None else f"yes, but {state.cpu_error}")
        for name, value in state.build.items():
            _row(f"built: {name}", ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
        _row("usable here", ", ".join(state.module.isas()))
    _row("in use", state.isa)
    _row("threads", str(torch.get_num_threads()))
    _row("instruction sets", ", ".join(_cpu.instruction_sets()) or "unknown")
    _row("torch's CPU path", torch.backends.cpu.get_cpu_capability())
    for dtype in (torch.bfloat16, torch.float16):
        name = dtype_name(dtype)
        own = "; frozen layers of an accelerated model take the package's" * (dtype in _cpu.widened_dtypes())
        _row(f"{name} products", "with instructions" if _cpu.multiplies(dtype) else f"torch has no instructions{own}")
    why = _cpu.why_float32()
    _row("finetune computes in", f"float32: {why}" if why else "bfloat16")

    _section("native library, CUDA")
    _row("torch's CUDA", torch.version.cuda or "none: a CPU build of torch")
    found = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if found else []
    _row("devices", ", ".join(devices) or "none")
    _row("loaded", "yes" if state.cuda_loaded else f"no: {state.cuda_error or 'torch is a CPU build'}")
    _row("kernels", f"{len(device_code.kernels())}, compiled at the first use by NVRTC")
    if torch.version.cuda is not None:
        _row("compiler", device_code.missing() or f"NVRTC {device_code.version()}")
        _row("compiled kernels", f"{len(list(device_code.cache().glob('*/*.image')))} in {device_code.cache()}")
    prove.first_use()
    for card, families in prove.report().items():
        for family, why in families.items():
            _row(f"{family} on {card}", f"dropped: {why}" if why else "agrees with the reference")

    _section("operators")
    for name in library.OPERATORS:
        kernels = [key for key in ("CPU", "CUDA") if library.has_kernel(name, key)]
        _row(name, ", ".join(kernels) or "reference only")

    _section("packages")
    installed = versions(*_PEERS)
    for name in _PEERS:
        _row(name, installed.get(name, "not installed"))

    _section("environment")
    values = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    for name, value in values.items():
        _row(name, value)
    if not values:
        _row("nothing set", "of " + ", ".join(_ENVIRONMENT[:2]) + ", ...")
    return 1 if state.module is None else 0


def _warm(capabilities: list[str]) -> None:
    """Compiles all CUDA kernels for the compute capabilities, or for this machine's GPUs if there are none."""
    if _native.STATE.module is None:
        raise CliError(f"--warm: the native library is not loaded: {_native.STATE.cpu_error}")
    if why := device_code.missing():
        raise CliError(f"--warm: {why}")
    for named in capabilities:
        if not re.fullmatch(r"\d+\.\d", named):
            raise CliError(f"--capability is {named!r}, wanted a number such as 9.0")
    wanted = {int(named.replace(".", "")) for named in capabilities}
    if not capabilities and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            wanted.add(10 * major + minor)
    if not wanted:
        raise CliError("--warm: torch finds no GPU; --capability names one, such as --capability 9.0")
    for number in sorted(wanted):

        def progress(items: Iterable[Any], length: int, arch: str = device_code.architecture(number)) -> Iterable[Any]:
            return track(items, f"kernels for {arch}", total=length)

        device_code.warm(number, progress)


def _section(title: str) -> None:
    print(f"\n{title}")


def _row(name: str, value: str) -> None:
    print(f"  {name:<26} {value}")
