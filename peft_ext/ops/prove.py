"""Proves kernels on the hardware on which the kernels first run, and drops the families of kernels that fail.

The proof of a family calls the family's operators with small inputs (on a GPU also with large ones) and compares the
results with the reference in float64. A family fails if its kernels differ from the reference by more than rounding, or
raise an error while memory suffices. A failed family's operators run the reference (for a packed format: only for
weights of the format). A warning, ``peft-ext explain`` and ``peft-ext doctor`` name failed families.

When a family is proved:
    Until a family is proved, a gate (a Python function) replaces each of its kernels in PyTorch's dispatcher, so that
    no call reaches an unproved kernel, neither from compiled code nor from ``torch.ops``. A packed format has no gate:
    the first weight of the format on a device starts the proof. A family is proved, and its gates are removed, by the
    first call of one of its operators, by the first check of an accelerated layer that needs the family, or by
    :func:`peft_ext.accelerate` of a model that needs the family. A family's proof takes milliseconds on a CPU. On a
    GPU, a family's first proof takes seconds, because the kernels are compiled (:mod:`peft_ext.device_code`); a line on
    stderr names each family. While a CUDA graph is captured, a call of an unproved operator raises RuntimeError.

In several processes:
    When training begins, ``PeftExtCallback`` or the user's own loop (:func:`peft_ext.agree`) calls :func:`agree`, which
    makes all ranks of the default process group drop the families that failed on any rank. :func:`peft_ext.accelerate`
    calls :func:`agree` for a model whose layers transformers' tensor parallelism splits; otherwise one rank alone may
    call ``peft_ext.accelerate`` or an operator. A family that fails outside of :func:`agree` is dropped on the rank on
    which it failed, and the warning says that the other ranks may use the family's kernels, which round in another way.

The proof changes neither the process's precision of products nor its random generators, warnings filter or environment.

Environment:
    ``PEFT_EXT_PROVE``: ``1`` (the default) proves a family once for each CPU path on each model of CPU, and once on
        each model of GPU, and again for another build of peft_ext, of torch or of torch's CUDA. The families that
        passed are saved in ``$XDG_CACHE_HOME/peft_ext/proved.json`` (default: ``~/.cache``). A family whose kernels
        ended a process by a fault of the GPU is saved as failed, and stays dropped; a family that failed otherwise is
        proved again by the next process, because an error may have a temporary cause. ``always`` proves every family in
        every process and reads no saved result. With ``PEFT_EXT_PROVE=0``, no family is proved and no result exchanged;
        a GPU that is too old still runs the reference, and without NVRTC all CUDA kernels are still dropped. Any other
        value of PEFT_EXT_PROVE raises ValueError.
    ``PEFT_EXT_REQUIRE=1``: a family that fails raises RuntimeError instead of a warning.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Optional

import filelock
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701  no public name for it

from .. import _cpu, _native, device_code
from .._version import __version__
from ..files import atomic_file, cache_folder
from ..weights import packed
from . import cards, format_proofs
from .library import NAMESPACE, OPERATORS, PROOFS, has_kernel, is_eager
from .proof_inputs import ProofInputs, widened

__all__ = ["DROPPED", "agree", "arm", "families", "prove", "proved", "proved_eagerly", "report", "settle", "settle_by"]

KEYS = ("CPU", "CUDA")  # dispatch keys for which the native library has kernels

# Maps a dispatch key with an operator, or with a packed format's family, to the reason why its kernels were dropped in
# this process. A dropped operator runs the reference.
DROPPED: dict[tuple[str, str], str] = {}
_FAULTS = " | faults"  # suffix of those keys in proved.json that list families whose kernels ended a process

# Numbers of tokens, input features and output features of a proof's inputs, by dispatch key. On a GPU a family's first
# call is repeated with inputs of the size LARGE, for which other kernels and more blocks run.
SMALL, LARGE = {"CPU": (34, 64, 40), "CUDA": (130, 192, 136)}, (1024, 1024, 1024)

# Largest ‖kernel - reference‖ / ‖reference‖ that rounding explains, the rounding of intermediate values included.
WITHIN = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 6e-3}

# Texts in the errors of PyTorch, of peft_ext and of cuBLAS (which needs a workspace) that say that memory is lacking.
_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")

QUIET_SECONDS = 1.0  # Seconds after which proofs on a CPU print a line before each further family.
PEERS_SECONDS = 600  # Seconds after which a rank that waits for another rank's result raises RuntimeError.

_ops = getattr(torch.ops, NAMESPACE)
# Maps a dispatch key, a model of CPU or GPU and a family to "", or to the reason why the family failed there.
_found: dict[str, dict[str, dict[str, str]]] = {key: {} for key in KEYS}
# Maps a dispatch key and an unproved family to the object that registers the family's gates; None for packed formats.
_gates: dict[str, dict[str, Optional[torch.library.Library]]] = {key: {} for key in KEYS}
_kernels: dict[tuple[str, str], Any] = {}  # Maps a dispatch key and an operator to the operator's native kernel.
_overriding: list[torch.library.Library] = []  # Each object keeps alive the registrations that replace kernels.
_lock = threading.RLock()
_proving = threading.local()  # .depth: running proofs of this thread; during a proof, a new weight starts no other


class Place(NamedTuple):
    """A model of CPU or GPU, on which kernels are proved. ``cpu_path``: the CPU path in use; "" for a GPU."""

    key: str
    model: str
    device: torch.device
    cpu_path: str = ""

    @property
    def name(self) -> str:
        return f"{self.model} ({self.cpu_path})" if self.cpu_path else self.model


# --- gates ------------------------------------------------------------------------------------------------------------


@functools.cache
def families(key: str) -> dict[str, list[str]]:
    """Returns a dict from each family to the names of its operators that have kernels for a dispatch key."""
    found: dict[str, list[str]] = {}
    for op in OPERATORS.values():
        if op.cuda if key == "CUDA" else has_kernel(op.name, key):
            found.setdefault(op.family, []).append(op.name)
    return found


def arm() -> None:
    """Replaces each native kernel by a gate, whose first call proves the kernel's family."""
    if hasattr(os, "register_at_fork"):  # os.register_at_fork does not exist on Windows
        os.register_at_fork(after_in_child=_after_fork)
    with warnings.catch_warnings():  # PyTorch would warn that the gates override kernels
        warnings.simplefilter("ignore")
        for key in KEYS:
            for family, names in families(key).items():
                if all(has_kernel(name, key) for name in names):
                    _arm_family(key, family, names)
            if all((key, name) in _kernels for name in format_proofs.CALLED):
                _gates[key].update(dict.fromkeys(format_proofs.FAMILIES))
    packed.when_made(_meet)


def _arm_family(key: str, family: str, names: list[str]) -> None:
    gates = torch.library.Library(NAMESPACE, "IMPL")
    for name in names:
        _kernels[key, name] = torch.library.get_kernel(f"{NAMESPACE}::{name}", key)
        gates.impl(name, _gate(key, family, name), key, allow_override=True)
    _gates[key][family] = gates


def _gate(key: str, family: str, name: str) -> Callable[..., Any]:
    def gate(*args: Any) -> Any:
        settle(key, [family])
        return (OPERATORS[name].reference if (key, name) in DROPPED or cards.on_old(args) else native_op(key, name))(
            *args
        )

    return gate


def _meet(weight: packed.PackedWeight) -> None:
    """Proves the format of a new weight, which may be the first of this format on the weight's device."""
    gates, family = _gates.get(weight.device.type.upper(), {}), format_proofs.family_of(weight.format.name)
    if family in gates and is_eager(weight.parts[0]) and not getattr(_proving, "depth", 0):
        if not torch._C._len_torch_dispatch_stack():
            settle(weight.device.type.upper(), [family])


def native_op(key: str, name: str) -> Callable[..., Any]:
    """Returns a function that calls an operator's native kernel without the gate."""
    kernel, keys = _kernels[key, name], torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return lambda *args: kernel.call_boxed(keys, *args)


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # a thread of the parent may have held the old lock, and does not exist in the child


@functools.cache
def _families_of(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(OPERATORS[name].family if name in OPERATORS else name for name in names)


def proved(device: str, *names: str) -> Optional[str]:
    """Returns why the kernels of one of the operators ``names`` were dropped on the device type ``device``; None if the
    kernels of all these operators are in use. ``names`` may also contain the family of a packed format, which
    :func:`.format_proofs.family_of` returns. Families of ``names`` that are not proved yet are proved first, except
    under torch.compile and with fake tensors. In compiled code, the operators' gates prove the families, and a packed
    format is proved when its first weight is made."""
    return _dropped(device, names) if torch.compiler.is_compiling() else proved_eagerly(device, *names)


def proved_eagerly(device: str, *names: str) -> Optional[str]:
    """Returns the result of :func:`proved`, for a caller that torch.compile never compiles."""
    unproved = _gates.get(device.upper())  # torch.compile never traces this line, and so puts no guard on _gates
    if unproved and not unproved.keys().isdisjoint(wanted := _families_of(names)):
        if not torch._C._len_torch_dispatch_stack():
            settle(device.upper(), wanted)
    return _dropped(device, names) if DROPPED else None


def _dropped(device: str, names: tuple[str, ...]) -> Optional[str]:
    key = device.upper()
    return next((DROPPED[key, name] for name in names if (key, name) in DROPPED), None)


def report(key: str) -> dict[str, dict[str, str]]:
    """Returns a dict that maps each place to a dict that maps each proved family to "" if it passed, or to the
    reason of its failure. A place is a model of GPU, or a model of CPU with the CPU path in parentheses."""
    return {place: dict(found) for place, found in _found[key].items()}


def settle(key: str, wanted: Optional[Iterable[str]] = None) -> None:
    """Proves the families ``wanted`` for a dispatch key, removes their gates, and drops the families that fail. By
    default, ``wanted`` is all families, on a GPU without the families of packed formats.

    Raises: RuntimeError if a family is unproved and a CUDA graph is captured, or if a family fails and PEFT_EXT_REQUIRE
    is set; ValueError for a wrong value of PEFT_EXT_PROVE; KernelFault if a kernel makes the GPU unusable;
    torch.OutOfMemoryError if memory does not suffice. After an error, the families ``wanted`` are still unproved.
    """
    asked = _asked()
    with _lock:  # while one thread holds the lock, other threads that need the family wait for its proof
        gates = _gates[key]
        every = gates if key == "CPU" else families(key)  # not the packed formats, whose kernels compile for minutes
        left = [family for family in (every if wanted is None else wanted) if family in gates]
        if not left:
            return
        results = {place.name: _of_place(place, left, asked) for place in _places(key)}
        settled: dict[str, dict[str, str]] = dict.fromkeys(left, {}) if asked == "0" else {}
        for family in gates:
            by_place = {place: found[family] for place, found in results.items() if family in found}
            if results and len(by_place) == len(results):
                settled[family] = by_place
        failed = {family: why for family, by_place in settled.items() for why in by_place.values() if why}
        if failed and os.environ.get("PEFT_EXT_REQUIRE", "") not in ("", "0"):
            family, why = next(iter(failed.items()))
            raise RuntimeError(f"peft_ext: {family}: its {key} kernels failed: {why} (PEFT_EXT_REQUIRE is set)")
        for family, by_place in settled.items():
            for place_name, why in by_place.items():
                _found[key].setdefault(place_name, {})[family] = why
        _drop_all(key, settled)
        if key == "CUDA" and cards.OLD:
            _reroute(settled)
        for family in settled:
            _open(key, family)


def settle_by(ask: Callable[[], object]) -> None:
    """Calls ``ask``, which proves families by :func:`settle`, if any family is not proved yet."""
    if any(_gates.values()):
        ask()


def _open(key: str, family: str) -> None:
    if (gates := _gates[key].pop(family, None)) is not None:
        gates._destroy()


def _of_place(place: Place, wanted: list[str], asked: str) -> dict[str, str]:
    """Returns a dict that maps wanted families, and those with a saved result, to "" (passed) or a failure's reason."""
    if place.key == "CUDA" and (why := cards.too_old(place.device.index) or device_code.missing()):
        return dict.fromkeys(_gates[place.key], why)
    if asked == "0":
        return {}
    known = {} if asked == "always" else _recall(place)
    unknown = [family for family in wanted if family not in known]
    if unknown and place.key == "CUDA" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"peft_ext: {unknown[0]}: its kernels are unproved on {place.name}, and nothing can be proved while a CUDA "
            "graph is captured. Call peft_ext.accelerate(model), or run one step, before the capture"
        )
    if not unknown:
        return known
    if place.key == "CUDA":
        device_code.prepare(cards.capability(place.device.index), _say)
    start, found = time.perf_counter(), {}
    for count, family in enumerate(unknown):
        if place.key == "CUDA" or time.perf_counter() - start > QUIET_SECONDS:
            _say(f"peft_ext: proving {family}'s kernels on {place.name}, once ({count + 1} of {len(unknown)})")
        _wait(place.device)  # waits for the GPU, because a fault of kernels that ran earlier is no fault of this family
        try:
            found[family] = prove(place.device, [family])[family]
        except KernelFault as fault:
            _save(place, faulted={fault.family: fault.why})
            raise
    _save(place, [family for family, why in found.items() if not why])
    return known | found


def _say(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _asked() -> str:
    asked = os.environ.get("PEFT_EXT_PROVE") or "1"
    if asked not in ("0", "1", "always"):
        raise ValueError(f"PEFT_EXT_PROVE is {asked!r}, wanted 0, 1 or always")
    return asked


def _places(key: str) -> list[Place]:
    """Returns a list: for "CPU" the CPU with its path, for "CUDA" one GPU of each model that the process sees."""
    if key == "CPU":
        return [Place(key, _cpu.model_facts(), torch.device("cpu"), _native.STATE.isa)]
    return [Place(key, card, device) for card, device in cards.models().items()]


def _reroute(settled: Iterable[str]) -> None:
    """Makes the operators of families that were not dropped run the reference for tensors on GPUs of ``cards.OLD``."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    for family, names in families("CUDA").items():
        for name in names if family in settled and ("CUDA", names[0]) not in DROPPED else ():
            library.impl(name, _by_arguments("CUDA", family, name), "CUDA", allow_override=True)
    _overriding.append(library)


def _drop_all(key: str, settled: dict[str, dict[str, str]]) -> None:
    """Drops the families that failed, with one warning for each combination of a place and a reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for family, by_place in settled.items():
        for place, why in by_place.items():
            if why:
                reasons.setdefault((place, why), []).append(family)
    others = "" if _world() == 1 else (
        f" (on rank {torch.distributed.get_rank()}; the other ranks may use the kernels, which round in another way, "
        "until PeftExtCallback makes all ranks drop them when training begins)"
    )  # fmt: skip
    for (place, why), dropped in reasons.items():
        its = "its" if len(dropped) == 1 else "their"
        drop(dropped, f"{its} {key} kernels were dropped on {place}: {why}{others}", key)


def drop(dropped: list[str], why: str, key: str = "CUDA") -> None:
    """Makes the operators of the families ``dropped`` run the reference for the dispatch key ``key`` (for a packed
    format's family: only for weights of the format), and warns."""
    warnings.warn(
        f"peft_ext: {format_proofs.listed(dropped)}: {why}. The reference, plain PyTorch, is used.",
        RuntimeWarning,
        stacklevel=4,
    )
    library = torch.library.Library(NAMESPACE, "IMPL")
    operators = families(key)
    for family in dropped:
        for name in operators.get(family, ()):
            DROPPED[key, name] = why
            library.impl(name, OPERATORS[name].reference, key, allow_override=True)
    if formats := [family for family in dropped if family in format_proofs.FAMILIES]:
        if not any((key, family) in DROPPED for family in format_proofs.FAMILIES):
            for family, name in ((family, name) for family, names in operators.items() for name in names):
                if format_proofs.takes_weights(name) and (key, name) not in DROPPED:
                    library.impl(name, _by_arguments(key, family, name), key, allow_override=True)
        DROPPED.update(((key, family), why) for family in formats)
    _overriding.append(library)


def _by_arguments(key: str, family: str, name: str) -> Callable[..., Any]:
    """Returns a function that calls the kernel, or, for a dropped operator or format and on GPUs of cards.OLD, the
    reference."""

    def call(*args: Any) -> Any:
        settle(key, [family])  # proves the family, because this function may have replaced the family's gate
        failed = any((key, of) in DROPPED for of in (name, *format_proofs.families_in(args))) or cards.on_old(args)
        return (OPERATORS[name].reference if failed else native_op(key, name))(*args)

    return call


# --- ranks ------------------------------------------------------------------------------------------------------------


def agree(ask: Callable[[], object]) -> None:
    """Calls ``ask`` if a family is not proved yet, and makes all ranks drop the families that failed on any rank.

    All ranks of the default process group have to call ``agree``, each rank for its own device. The ranks exchange
    their results through the group's store, so that the exchange needs no device. Nothing is exchanged without a
    process group of several ranks, or with ``PEFT_EXT_PROVE=0``.

    Raises: RuntimeError if another rank does not call ``agree`` within ``PEERS_SECONDS``; the errors of ``ask``.
    """
    settle_by(ask)
    if _world() == 1 or _asked() == "0":
        return
    held = {key: families(key) | {family: [family] for family in format_proofs.FAMILIES if families(key)}
            for key in KEYS}  # fmt: skip
    own = {key: {family: DROPPED[key, name] for family, names in held[key].items()
                 for name in names if (key, name) in DROPPED} for key in KEYS}  # fmt: skip
    if cards.OLD and (why := cards.OLD.get(torch.cuda.current_device())):
        own["CUDA"] = dict.fromkeys(held["CUDA"], why)  # this rank's old GPU runs the reference, and so must all ranks
    for rank, theirs in enumerate(_exchange(own)):
        for key, failed in theirs.items():
            has = held[key]
            lost = [family for family in failed if family in has and (key, has[family][0]) not in DROPPED]
            if lost:
                with _lock:
                    drop(lost, f"dropped on rank {rank}, and so on all ranks: {failed[lost[0]]}", key)
                    for family in lost:
                        _open(key, family)


def _world() -> int:
    """Returns the number of ranks of the default process group; 1 without a group."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _exchange(own: dict[str, dict[str, str]]) -> list[dict[str, dict[str, str]]]:
    store, world = torch.distributed.distributed_c10d._get_default_store(), _world()
    me = torch.distributed.get_rank()
    # The store counts this rank's exchanges, because torchrun's store outlives a process group.
    turn = store.add(f"peft_ext/exchanges/{world}/{me}", 1)
    names = [f"peft_ext/dropped/{world}/{turn}/{rank}" for rank in range(world)]
    store.set(names[me], json.dumps(own))
    for rank, name in enumerate(names):
        try:
            store.wait([name], timedelta(seconds=PEERS_SECONDS))
        except RuntimeError as error:
            raise RuntimeError(
                f"peft_ext: rank {rank} has not begun to train within {PEERS_SECONDS} s. When training begins, the "
                "ranks agree on the kernels in use (with PEFT_EXT_PROVE=0 they do not)"
            ) from error
    return [json.loads(value) for value in store.multi_get(names)]


# --- what is saved ----------------------------------------------------------------------------------------------------


def _cache() -> Path:
    return cache_folder() / "proved.json"


def _held() -> dict[str, Any]:
    try:
        held = json.loads(_cache().read_text())
    except (OSError, ValueError, RuntimeError):
        return {}
    return held if isinstance(held, dict) else {}


def _key(place: Place) -> str:
    card = place.key
    if place.key == "CUDA":
        major, minor = torch.cuda.get_device_capability(place.device.index)
        code = "" if device_code.missing() else device_code.folder(device_code.architecture(10 * major + minor)).name
        card = f"{major}.{minor} {code}"
    return " | ".join([place.name, card, f"peft_ext {__version__}", _native.build_identity(),
                       f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"])  # fmt: skip


def _recall(place: Place) -> dict[str, str]:
    """Returns a dict with the saved results of a CPU or GPU: "" for a family that passed, and the reason for a family
    whose kernels made the GPU unusable."""
    held, key = _held(), _key(place)
    passed, faulted = held.get(key), held.get(key + _FAULTS)
    found = dict.fromkeys(map(str, passed), "") if isinstance(passed, list) else {}
    return found | ({family: str(why) for family, why in faulted.items()} if isinstance(faulted, dict) else {})


def _save(place: Place, passed: Iterable[str] = (), faulted: Optional[dict[str, str]] = None) -> None:
    """Adds results to the saved results of a CPU or GPU, under a file lock: no process overwrites another's results."""
    key, path = _key(place), _cache()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock"), timeout=10):
            held = _held()
            before, faults = held.get(key), held.get(key + _FAULTS)
            held[key] = sorted({*(before if isinstance(before, list) else ()), *passed})
            if faulted:
                held[key + _FAULTS] = {**(faults if isinstance(faults, dict) else {}), **faulted}
            with atomic_file(path) as file:
                json.dump(held, file, indent=1)
    except (OSError, RuntimeError):  # On a file system without locks, filelock raises NotImplementedError.
        pass  # The results are not saved, and the next process proves the kernels again.


# --- the proof --------------------------------------------------------------------------------------------------------


class KernelFault(RuntimeError):
    """A kernel fault that leaves the GPU unusable for the rest of the process."""

    def __init__(self, family: str, device: torch.device, why: str):
        super().__init__(
            f"peft_ext: {family}'s kernels faulted on {device}, which no process survives: {why}. The next process "
            "drops them and says so. Please report it"
        )
        self.family, self.why = family, f"they faulted in an earlier process: {why}"


def prove(
    device: torch.device, wanted: Optional[Iterable[str]] = None, *, key: str = "", large: bool = True
) -> dict[str, str]:
    """Compares families' kernels with the reference on a device. Returns a dict that maps each family to "", or to the
    reason why the family failed.

    The caller's default device, autograd mode, autocast and precision of products do not influence the proof. The proof
    sets thread-local state only, and restores it. Raises KernelFault if a kernel makes the GPU unusable, and
    torch.OutOfMemoryError if the memory does not suffice.

    Args:
        wanted: the families whose kernels are compared; default: all families that have kernels.
        key: the dispatch key whose kernels run; default: the device's key.
        large: whether to prove CUDA kernels with inputs of the size ``LARGE`` too.
    """
    key = key or device.type.upper()
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    _proving.depth = getattr(_proving, "depth", 0) + 1  # the proof of a family may call operators of another family
    try:
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast(), current:
            return {
                family: _prove_family(family, device, key, large and key == "CUDA")
                for family in (families(key) if wanted is None else wanted)
            }
    finally:
        _proving.depth -= 1


def calls(
    family: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], key: str
) -> Iterator[tuple[str, tuple]]:
    """Yields the calls that prove a family's kernels, except calls of operators without a kernel for the dispatch key.
    The inputs have ``shape``: the numbers of tokens, input features and output features."""
    names = families(key).get(family, format_proofs.CALLED)
    for name, arguments in (PROOFS | format_proofs.FAMILIES)[family](ProofInputs(device, dtype, shape)):
        if name in names:
            yield name, arguments


def _prove_family(family: str, device: torch.device, key: str, large: bool) -> str:
    try:
        for dtype in WITHIN:
            for name, arguments in calls(family, device, dtype, SMALL[key], key):
                if why := _disagrees(name, arguments, dtype, key):
                    return why
        if large:
            dtype = torch.bfloat16
            name, arguments = next(calls(family, device, dtype, LARGE, key))
            if why := _disagrees(name, arguments, dtype, key):
                return f"{why}, of {' x '.join(map(str, LARGE))}"
    except torch.OutOfMemoryError:
        raise  # A lack of memory is no fault of the kernels.
    except Exception as error:  # A kernel that fails may raise an error of any type.
        if any(text in str(error) for text in _NO_MEMORY):
            raise torch.OutOfMemoryError(str(error)) from error
        said = str(error).strip().splitlines()
        why = f"{type(error).__name__}: {said[0] if said else 'no message'}"
        try:
            _wait(device)
        except Exception as lost:
            raise KernelFault(family, device, why) from lost
        return why
    return ""


def _disagrees(name: str, arguments: tuple, dtype: torch.dtype, key: str) -> str:
    ours = _called(native_op(key, name), name, arguments)
    with _References():
        plain = _called(OPERATORS[name].reference, name, widened(arguments, dtype))
    why = _differs(ours, plain, dtype, name == "nf4_dequantize")
    return why and f"{name} in {str(dtype).removeprefix('torch.')} {why}"


class _References(TorchDispatchMode):
    """Makes the operators that a reference calls run their references, in this thread alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        with self:
            return OPERATORS[func._opname].reference(*args, **(kwargs or {}))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _called(function: Callable[..., Any], name: str, arguments: tuple) -> list[Tensor]:
    """Calls ``function`` with copies of the arguments that the operator changes. Returns the results and the copies."""
    written = [argument.is_write for argument in getattr(_ops, name).default._schema.arguments]
    arguments = tuple(value.clone() if write else value for value, write in zip(arguments, written, strict=True))
    found = function(*arguments)
    found = [found] if isinstance(found, Tensor) else list(found)
    return found + [value for value, write in zip(arguments, written, strict=True) if write]


def _differs(found: list[Tensor], plain: list[Tensor], dtype: torch.dtype, each: bool = False) -> str:
    """Returns how the kernel's results ``found`` differ from the reference's ``plain`` by more than rounding, or "".
    ``each``: whether every element is also compared alone, as in decoded weights."""
    for index, (got, want) in enumerate(zip(found, plain, strict=True)):
        if got.shape != want.shape or got.is_floating_point() != want.is_floating_point():
            return f"gives {got.dtype} {tuple(got.shape)} as result {index}, wanted {want.dtype} {tuple(want.shape)}"
        if not want.is_floating_point():
            if (got != want).any():
                return f"differs in {(got != want).sum().item()} of {want.numel()} elements of result {index}"
            continue
        error, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
        normal = torch.finfo(dtype).smallest_normal  # subnormal values have fewer bits and larger relative errors
        wrong = each and ((got.double() - want).abs() > WITHIN[dtype] * want.abs().clamp(min=normal)).any()
        if wrong or not error <= WITHIN[dtype] * size + 1e-30:
            return f"is off by {error / (size or 1):.2g} of result {index}, wanted at most {WITHIN[dtype]}"
    return ""
