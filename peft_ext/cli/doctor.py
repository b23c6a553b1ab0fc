"""``peft-ext doctor``: prints versions, native libraries, CPU path, operators, packages and environment variables."""

from __future__ import annotations

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated, Optional

import torch
import typer
from rich.progress import track

from .. import __version__, _cpu, _native, device_code
from .._torch_build import torch_build
from ..machine import versions
from ..ops import cards, library, prove
from ..run.errors import RunError
from ..text import dtype_name

_PEERS = ("transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl", "liger-kernel")
_ENVIRONMENT = (
    "PEFT_EXT_CPU_ISA", "PEFT_EXT_REQUIRE", "PEFT_EXT_PROVE", "PEFT_EXT_NVRTC_FLAGS", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
    "HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME",
)  # fmt: skip

# MEASURED: numbers of tokens, input features and output features of the calls that --measure times. ROUNDS: number of
# calls of each timed operator and of its reference; the time of the first call is not used.
MEASURED, ROUNDS = (512, 1024, 1024), 6


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Also time each family of kernels and its reference, on each device.")
    ] = False,
    warm: Annotated[bool, typer.Option("--warm", help="First compile all CUDA kernels into the cache.")] = False,
    capability: Annotated[
        Optional[list[str]],
        typer.Option(help="With --warm: a compute capability, such as 9.0 (default: those of this machine's GPUs)."),
    ] = None,
) -> int:
    """Show versions, the native library, the CPU path in use and which operators have kernels."""
    # The exit code is 1 where the native library can't be loaded, or where the proof of the kernels raises an error.
    if warm or capability:
        _warm(capability or [])
    state = _native.STATE
    _section("versions")
    _row("peft_ext", __version__)
    build = torch_build()
    _row("torch", torch.__version__)
    _row("torch is built for", str(build))
    _row("python", f"{platform.python_version()} ({sys.executable})")
    _row("system", f"{platform.system()} {platform.machine()}")

    _section("native library, CPU")
    if state.module is None:
        _row("loaded", f"no: {state.cpu_error}")
        if sys.platform != "win32":
            _row("mend", _native.mend())
    else:
        _row("loaded", "yes" if state.cpu_error is None else f"yes, but {state.cpu_error}")
        if state.cpu_error is not None:
            _row("mend", _native.mend())
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

    errors = {key: _settled(key) for key in prove.KEYS}
    _section("native library, CUDA")
    why = device_code.missing() if state.cuda_loaded else state.cuda_error or build.why_no_kernels
    _row("loaded", "yes" if state.cuda_loaded else f"no: {why}")
    devices = build.devices()
    _row("GPUs", ", ".join(devices) or "none")
    _row("tensors on the CPU run", "the CPU kernels" if state.module is not None else "the slow reference")
    if devices:
        _row("tensors on a GPU run", f"the slow reference: {why}" if why else _on_gpus(errors["CUDA"]))
    _row("kernels", f"{len(device_code.kernels())}, compiled at the first use by NVRTC")
    if build.name == "CUDA":
        _row("compiler", device_code.missing() or f"NVRTC {device_code.version()}")
        _row("compiled kernels", f"{len(list(device_code.cache().glob('*/*.image')))} in {device_code.cache()}")
    for key, error in errors.items():
        _proofs(key, error, measure)

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
    return 1 if state.module is None or any(errors.values()) else 0


def _warm(capabilities: list[str]) -> None:
    """Compiles all CUDA kernels into the cache, for the given compute capabilities, or for those of this machine's GPUs
    if none is given."""
    if _native.STATE.module is None:
        raise RunError(f"--warm: the native library is not loaded: {_native.STATE.cpu_error}")
    if why := device_code.missing():
        raise RunError(f"--warm: {why}")
    least = cards.CAPABILITY / 10
    for named in capabilities:
        if not re.fullmatch(r"\d+\.\d", named):
            raise RunError(f"--capability is {named!r}, wanted a number such as 9.0")
        if int(named.replace(".", "")) < cards.CAPABILITY:
            raise RunError(f"--capability is {named}, wanted {least} or more, for which there are kernels")
    wanted = {int(named.replace(".", "")) for named in capabilities}
    if not capabilities and torch.cuda.is_available():
        found = {cards.capability(index) for index in range(torch.cuda.device_count())}
        wanted = {number for number in found if number >= cards.CAPABILITY}
    if not wanted:
        raise RunError(
            f"--warm: torch finds no GPU of compute capability {least} or more; --capability names one, such as "
            "--capability 9.0"
        )
    for number in sorted(wanted):
        title = f"kernels for {device_code.architecture(number)}"
        try:
            device_code.warm(number, lambda items, length, title=title: track(items, title, total=length))
        except OSError as error:
            raise RunError(f"--warm: {error}") from error


def _settled(key: str) -> str:
    """Proves the kernels of a dispatch key ("CPU" or "CUDA"). Returns the message of the RuntimeError that the proof
    raises, or "" if the proof raises none.

    The cause of the RuntimeError is a kernel's fault that leaves the GPU unusable, a lack of memory, or, with
    PEFT_EXT_REQUIRE, a family of kernels that failed its proof.
    """
    try:
        prove.settle(key)
    except RuntimeError as error:
        return str(error) or type(error).__name__
    return ""


def _on_gpus(error: str) -> str:
    """Returns in words which code computes the operators on GPUs. ``error`` is the text that :func:`_settled`
    returned."""
    if error:
        return "no operator: the proof of the CUDA kernels raised an error, see below"
    dropped = {family: prove.proved("cuda", *names) for family, names in prove.families("CUDA").items()}
    kept = [family for family, why in dropped.items() if why is None]
    if not kept:
        return f"the slow reference: {next(iter(dropped.values()))}"
    lost = [family for family in dropped if family not in kept]
    old = [found for index in range(torch.cuda.device_count()) if (found := cards.why_old(torch.device("cuda", index)))]
    by_family = f", and for {', '.join(lost)} the slow reference" if lost else ""
    return "; ".join([f"the CUDA kernels{by_family}", *old])


def _proofs(key: str, error: str, measure: bool) -> None:
    """Prints, for each family of a dispatch key's kernels, whether the family passed its proof.

    ``error`` is the text that :func:`_settled` returned. With ``measure``, the text of :func:`_times` is printed for
    each family that passed.
    """
    if error:
        _section(f"proof of the {key} kernels")
        _row("error", error)
    for place, found in prove.report(key).items():
        _section(f"proof on {place}")
        for family, why in found.items():
            times = _times(family, key) if measure and not why else ""
            _row(family, f"dropped: {why}" if why else f"agrees with the reference{times}")


def _times(family: str, key: str) -> str:
    """Returns the median times of the first operator in a family's proof and of this operator's reference, as text.

    Calls of the operator and of its reference alternate, so that other programs slow down the operator and the
    reference alike.
    """
    device = torch.device(key.lower())
    dtype = torch.bfloat16 if key == "CUDA" else _cpu.compute_dtype()
    name, arguments = next(prove.calls(family, device, dtype, MEASURED, key))
    runs: dict[Callable, list[float]] = {prove.native_op(key, name): [], library.OPERATORS[name].reference: []}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for run, seconds in runs.items():
                start = time.perf_counter()
                run(*arguments)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - start)
    ours, plain = (statistics.median(seconds[1:]) for seconds in runs.values())
    return f"; {name} in {dtype_name(dtype)} takes {ours * 1e3:.3g} ms, the reference {plain * 1e3:.3g} ms"


def _section(title: str) -> None:
    print(f"\n{title}")


def _row(name: str, value: str) -> None:
    print(f"  {name:<26} {value}")
