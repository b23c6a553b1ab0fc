"""Proves the CUDA kernels at their first use on a model of GPU, and drops the families of kernels that fail.

The proof runs before the first eager call of an operator on a GPU, or before the first layer is accelerated there.
Small inputs go through each family's operators, forward and backward, twice: through the kernels and through the
reference, which is plain PyTorch. A family is dropped if its kernels differ from the reference by more than rounding,
raise an error, or take more than ``SLOWER`` times the reference's time. The operators of a dropped family run the
reference. A warning, ``peft-ext explain`` and ``peft-ext doctor`` name the dropped families.

Environment:
    ``PEFT_EXT_PROVE``: ``1`` (the default) proves a model of GPU once for each build of peft_ext, of torch and of
        torch's CUDA. The result is saved in ``$XDG_CACHE_HOME/peft_ext/proved.json`` (default: ``~/.cache``) only if no
        family failed; otherwise the next process proves again. A family whose kernels ended a process by a fault is
        saved too, and stays dropped. ``always`` proves in every process and reads no saved result, ``0`` never proves.
        Any other value of ``PEFT_EXT_PROVE`` raises ValueError.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from .. import _native
from .._version import __version__
from ..files import atomic_file
from .library import NAMESPACE, OPERATORS, PROOFS, cuda_families
from .proof_inputs import ProofInputs

__all__ = ["DROPPED", "first_use", "prove", "proved", "report"]

# The operators whose CUDA kernels the proof dropped in this process, and the reason for each. These operators run the
# reference.
DROPPED: dict[str, str] = {}

CAPABILITY = (8, 0)  # compute capability of the oldest GPUs for which the library has kernels
_FAULTS = " | faults"  # suffix of the cache key of the families whose kernels ended a process

# Numbers of tokens, input features and output features of the inputs. Calls with the inputs of LARGE are timed.
SMALL, LARGE = (130, 192, 136), (1024, 1024, 1024)

SLOWER = 1.25  # a family is dropped if its kernel takes more than this many times the reference's time
# Largest ‖kernel - reference‖ / ‖reference‖ that rounding explains. Intermediate values in 16 bits are rounded too.
WITHIN = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 6e-3}

_ops = getattr(torch.ops, NAMESPACE)
_found: dict[str, dict[str, str]] = {}  # by GPU name and family: "", or the reason why the family was dropped
_overriding: list[torch.library.Library] = []  # each object keeps a registration that replaces kernels
_done = False
_lock = threading.Lock()


def first_use() -> None:
    """Proves the kernels on this machine's GPUs, once in a process.

    Does nothing under torch.compile, with fake tensors, or while a CUDA graph is captured.
    """
    if torch.compiler.is_compiling() or _done:  # in this order, compiled code has no guard on _done
        return
    _prove_here()


def proved(*names: str) -> Optional[str]:
    """Returns why the proof dropped the CUDA kernels of one of these operators, or None."""
    first_use()
    return next((DROPPED[name] for name in names if name in DROPPED), None) if DROPPED else None


def report() -> dict[str, dict[str, str]]:
    """Returns, by GPU name and family, "" if the family's kernels passed the proof, or why they were dropped."""
    return {card: dict(families) for card, families in _found.items()}


def _prove_here() -> None:
    global _done
    _asked()
    if not (_native.STATE.cuda_loaded and torch.cuda.is_available()):
        _done = True
        return
    if torch._C._len_torch_dispatch_stack() or torch.cuda.is_current_stream_capturing():
        return  # fake tensors run no kernel, and a captured graph would replay the proof
    with _lock:
        if _done:
            return
        # Set before the proof, so that other threads use the operators meanwhile and do not wait for the proof. The
        # proof itself calls no public function, which would ask for the proof again.
        _done = True
        here = torch.cuda.current_device()
        for index in sorted(range(torch.cuda.device_count()), key=lambda index: index != here):
            card = torch.cuda.get_device_name(index)
            if card not in _found and (found := _of_card(card, index)):
                _found[card] = found
                _drop_all(card, "CUDA")


def _of_card(card: str, index: int) -> dict[str, str]:
    """Returns the result of a GPU's proof by family.

    A GPU that is too old, or whose saved result is read, gets no CUDA context.
    """
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < CAPABILITY:
        wanted = ".".join(map(str, CAPABILITY))
        return dict.fromkeys(cuda_families(), f"its compute capability is {major}.{minor}, wanted {wanted} or more")
    if _asked() == "0":
        return {}
    if (found := _recall(card, index)) is None:
        with torch.cuda.device(index):
            try:
                found = _remember(card, index, prove(torch.device("cuda", index), faulted=_faulted(card, index)))
            except torch.OutOfMemoryError:
                return {}  # without enough memory there is no result, and a later process proves this GPU
            except KernelFault as fault:
                _remember_fault(card, index, fault)
                raise
    return found


def _asked() -> str:
    asked = os.environ.get("PEFT_EXT_PROVE") or "1"
    if asked not in ("0", "1", "always"):
        raise ValueError(f"PEFT_EXT_PROVE is {asked!r}, wanted 0, 1 or always")
    return asked


def _drop_all(card: str, key: str) -> None:
    reasons: dict[str, list[str]] = {}
    for family, why in _found[card].items():
        if why:
            reasons.setdefault(why, []).append(family)
    for why, families in reasons.items():
        drop(families, f"{'its' if len(families) == 1 else 'their'} {key} kernels were dropped on {card}: {why}", key)


def drop(families: list[str], why: str, key: str = "CUDA") -> None:
    """Makes the operators of ``families`` run the reference for the dispatch key ``key``, and warns."""
    named = ", ".join(families)
    warnings.warn(f"peft_ext: {named}: {why}. The reference, plain PyTorch, is used.", RuntimeWarning, stacklevel=4)
    library = torch.library.Library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that a kernel is overridden, which is the purpose here
        for name in (name for family in families for name in cuda_families()[family]):
            DROPPED[name] = why
            library.impl(name, OPERATORS[name].reference, key, allow_override=True)
    _overriding.append(library)


# --- what is remembered -----------------------------------------------------------------------------------------------


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "peft_ext", "proved.json")


def _held() -> dict[str, Any]:
    try:
        held = json.loads(_cache().read_text())
    except (OSError, ValueError, RuntimeError):
        return {}
    return held if isinstance(held, dict) else {}


def _key(card: str, index: int) -> str:
    library = Path(_native.__file__).parent.glob("_C_cuda*")
    built = [f"{path.stat().st_size}.{path.stat().st_mtime_ns}" for path in sorted(library)]
    capability = torch.cuda.get_device_capability(index)
    return " | ".join([card, str(capability), f"peft_ext {__version__}", f"torch {torch.__version__}",
                       f"CUDA {torch.version.cuda}", *built])  # fmt: skip


def _recall(card: str, index: int) -> Optional[dict[str, str]]:
    known = _asked() != "always" and _held().get(_key(card, index)) == sorted(cuda_families())
    return dict.fromkeys(cuda_families(), "") if known else None


def _faulted(card: str, index: int) -> dict[str, str]:
    """Returns the families whose kernels ended an earlier process by a fault, and the fault of each."""
    found = {} if _asked() == "always" else _held().get(_key(card, index) + _FAULTS)
    return {family: str(why) for family, why in found.items()} if isinstance(found, dict) else {}


def _remember(card: str, index: int, found: dict[str, str]) -> dict[str, str]:
    if not any(found.values()):  # a failure is not saved: other users of the GPU may have made a family slow
        _put(_key(card, index), sorted(cuda_families()))
    return found


def _remember_fault(card: str, index: int, fault: KernelFault) -> None:
    _put(_key(card, index) + _FAULTS, _faulted(card, index) | {fault.family: fault.why})


def _put(key: str, value: Any) -> None:
    try:
        _cache().parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(_cache()) as file:
            json.dump(_held() | {key: value}, file, indent=1)
    except (OSError, RuntimeError):
        pass  # the cache folder can't be written: the next process proves again


# --- the proof --------------------------------------------------------------------------------------------------------


class KernelFault(RuntimeError):
    """A kernel fault that leaves the GPU unusable for the rest of the process."""

    def __init__(self, family: str, device: torch.device, why: str):
        super().__init__(
            f"peft_ext: {family}'s kernels faulted on {device}, which no process survives: {why}. The next process "
            "drops them and says so. Please report it"
        )
        self.family, self.why = family, f"they faulted in an earlier process: {why}"


def prove(device: torch.device, *, timed: bool = True, faulted: Optional[dict[str, str]] = None) -> dict[str, str]:
    """Proves every family on a device. Returns, by family, "" or the reason why the family failed.

    ``timed``: whether a slow kernel fails too. ``faulted``: families that are not run again, and the reason for each.
    The caller's default device, autograd mode, autocast and matmul precision have no influence.
    """
    matmul = torch.backends.cuda.matmul
    precision = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        with (
            torch.inference_mode(False), torch.no_grad(), torch.device("cpu"),
            torch.autocast(device.type, enabled=False),
        ):  # fmt: skip
            known = faulted or {}
            return {family: known.get(family) or _prove_family(family, device, timed) for family in cuda_families()}
    finally:
        matmul.fp32_precision = precision


def calls(
    family: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> Iterator[tuple[str, tuple]]:
    """Yields the calls that prove a family's CUDA kernels; leaves out operators without a CUDA kernel.

    ``shape``: the numbers of tokens, input features and output features of the inputs.
    """
    for name, arguments in PROOFS[family](ProofInputs(device, dtype, shape)):
        if OPERATORS[name].cuda:
            yield name, arguments


def _prove_family(family: str, device: torch.device, timed: bool) -> str:
    try:
        for dtype in WITHIN:
            for name, arguments in calls(family, device, dtype, SMALL):
                if why := _disagrees(name, arguments, dtype):
                    return why
        if timed:
            dtype = torch.bfloat16
            name, arguments = next(calls(family, device, dtype, LARGE))
            if why := _disagrees(name, arguments, dtype):  # large inputs use several blocks and other kernels
                return f"{why}, of 1024 x 1024 x 1024"
            ours, plain = _seconds([_native_op(name), OPERATORS[name].reference], arguments, device)
            if ours > SLOWER * plain:
                return f"{name} takes {ours / plain:.1f} times the reference's time"
    except torch.OutOfMemoryError:
        raise  # a lack of memory is no fault of the kernels
    except Exception as error:  # a kernel may raise anything on a GPU that the kernel does not fit
        if "out of memory" in str(error).lower():
            raise torch.OutOfMemoryError(str(error)) from error
        said = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {said[0] if said else 'no message'}"
        try:
            _wait(device)
        except Exception as lost:
            raise KernelFault(family, device, why) from lost
        return why
    return ""


def _disagrees(name: str, arguments: tuple, dtype: torch.dtype) -> str:
    ours, plain = (_called(function, name, arguments) for function in (_native_op(name), OPERATORS[name].reference))
    why = _differs(ours, plain, dtype)
    return why and f"{name} in {str(dtype).removeprefix('torch.')} {why}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _native_op(name: str) -> Callable[..., Any]:
    return getattr(_ops, name).default


def _called(function: Callable[..., Any], name: str, arguments: tuple) -> list[Tensor]:
    """Returns the results and the arguments that the operator writes to. These arguments are copied before the call."""
    written = [argument.is_write for argument in getattr(_ops, name).default._schema.arguments]
    arguments = tuple(value.clone() if write else value for value, write in zip(arguments, written, strict=True))
    found = function(*arguments)
    found = [found] if isinstance(found, Tensor) else list(found)
    return found + [value for value, write in zip(arguments, written, strict=True) if write]


def _differs(found: list[Tensor], plain: list[Tensor], dtype: torch.dtype) -> str:
    for index, (got, want) in enumerate(zip(found, plain, strict=True)):
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"gives {got.dtype} {tuple(got.shape)} as result {index}, wanted {want.dtype} {tuple(want.shape)}"
        if not want.is_floating_point():
            if (got != want).any():
                return f"differs in {(got != want).sum().item()} of {want.numel()} elements of result {index}"
            continue
        error, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
        if not error <= WITHIN[dtype] * size + 1e-30:
            return f"is off by {error / (size or 1):.2g} of result {index}, wanted at most {WITHIN[dtype]}"
    return ""


def _seconds(calls: list[Callable[..., Any]], arguments: tuple, device: torch.device) -> list[float]:
    """Returns the median seconds of each call. The calls alternate, so that other users of the GPU slow all calls."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(9):
        for call, taken in zip(calls, times, strict=True):
            _wait(device)
            start = time.perf_counter()
            call(*arguments)
            _wait(device)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[2:]) for taken in times]
