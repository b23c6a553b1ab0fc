"""Memory of one training step, from a trace of that very step without memory.

    total = max over time of Σ bytes of the tensors alive:
            weights + quantization + adapters + optimizer          all the time
          + activations + logits                                   from the forward to their use in the backward
          + gradients                                              from their backward to the optimizer's step
          + temporary                                              inside an operator, a layer, a loss

The model is copied without its data, adapted by PEFT, quantized, put on the fused operators, and then runs forward,
backward and the optimizer's part under PyTorch's FakeTensorMode: shapes, dtypes, views and autograd are those of the
real step, of every operator of PyTorch, PEFT, transformers and this package, but no tensor has data. A dispatch mode
notes when each storage is made and when it dies. So what a layer saves for its backward, what checkpointing drops and
computes again, what is shared, and at which moment all of it is largest is read off, for any architecture and any PEFT
method, rather than modelled.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (  # noqa: PLC2701  tracing without data has no public names
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701  as above
from torch.utils._pytree import tree_iter, tree_map_only  # noqa: PLC2701  as above

from ._meta import (
    Dequantized,
    build_model,
    copy_to_meta,
    fake,
    make_config,
    method_config,
    quantize_stand_ins,
    replace_tensors,
    stand_in,
)
from ._native import STATE, TILE_PATHS
from .nn import NF4Linear
from .ops import checks
from .ops.library import NAMESPACE
from .sources.model import AUTO_CLASSES, output_head, task_of

__all__ = ["KINDS", "METHODS", "MemoryEstimate", "estimate_memory"]

KINDS = ("weights", "quantization", "adapters", "gradients", "optimizer", "activations", "logits", "temporary")
METHODS = ("full", "bitfit", "bottleneck", "lora", "rslora", "dora", "adalora", "ia3", "prefix", "prompt")
QUANTIZATIONS = ("nf4", "int8")

_GIB = 2**30
_MOST_TOKENS = 2**40  # beyond it the bytes of a tensor would be more than 64 bits hold
_UNITS = ((_GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training step; prints as a table.

    Each kind is the most that there is of it at any moment; ``peak`` is what there is of each at the moment when the
    sum is largest, and ``total`` is that sum. So a kind may be larger than its part of the peak: while the loss is
    computed there are no gradients yet.

    Attributes:
        weights: parameters of the base model, packed where they are quantized, and its buffers.
        quantization: scales of quantized weights and what decodes them.
        adapters: trainable parameters of a model that is partly frozen, and the adapters that are not active.
        gradients: of every trainable parameter.
        optimizer: the optimizer's states, and the importance scores that AdaLoRA keeps beside them.
        activations: what the forward saves for the backward, without logits.
        logits: from the language model's head to the loss, and back: logits, their float32 copies and gradients.
        temporary: what lives within a layer, an operator or the optimizer's step alone.
        total: the peak.
        peak: bytes by kind at the peak.
        parameters, trainable: how many there are.
        about: what was traced, in one line.
    """

    weights: int
    quantization: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    temporary: int
    total: int
    peak: Mapping[str, int]
    parameters: int
    trainable: int
    about: str

    def fits(self, gpu_memory_gb: float, *, headroom: float = 0.1) -> bool:
        """Whether ``total`` is at most ``1 - headroom`` of a card's memory.

        Args:
            gpu_memory_gb: in GiB, as cards are sold ("24 GB").
            headroom: the part that tensors don't get: CUDA's context (0.3 to 0.6 GiB), the workspaces of cuBLAS, and
                what PyTorch's allocator loses between blocks.

        Raises: ValueError where gpu_memory_gb is not positive, or headroom not in ``[0, 1)``.
        """
        if not gpu_memory_gb > 0:
            raise ValueError(f"fits: gpu_memory_gb is {gpu_memory_gb}, wanted more than 0")
        if not 0 <= headroom < 1:
            raise ValueError(f"fits: headroom is {headroom}, wanted 0 <= headroom < 1")
        return self.total <= (1 - headroom) * gpu_memory_gb * _GIB

    def __str__(self) -> str:
        unit, name = next(((u, n) for u, n in _UNITS if self.total >= 4 * u), _UNITS[-1])
        rows = [(name, "most", "at the peak")]
        rows += [(kind, f"{getattr(self, kind) / unit:,.1f}", f"{self.peak[kind] / unit:,.1f}") for kind in KINDS]
        rows.append(("total", "", f"{self.total / unit:,.1f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join((a.ljust(widths[0]), b.rjust(widths[1]), c.rjust(widths[2]))) for a, b, c in rows]
        trained = f"{self.trainable:,} of {self.parameters:,} parameters train"
        return "\n".join([self.about, trained, *table])


def estimate_memory(
    model: Any,
    config: Any = None,
    *,
    method: Optional[str] = None,
    batch_size: Optional[int] = None,
    sequence_length: Optional[int] = None,
    dtype: Optional[torch.dtype] = None,
    optimizer: Optional[str] = "adamw",
    gradient_checkpointing: bool = False,
    quantization: Optional[str] = None,
    blocksize: int = 64,
    double_quant: bool = True,
    accelerated: bool = True,
    autocast: Optional[torch.dtype] = None,
    padding: bool = False,
    device: Union[str, torch.device, None] = None,
    task_type: Optional[str] = None,
    inputs: Optional[Mapping[str, Any]] = None,
) -> MemoryEstimate:
    """Bytes of one training step, ``max_t Σ bytes alive at t``, without allocating any of them.

    Traced, not modelled, see the module: a second or two for 7 billion parameters, on a machine without a GPU. What is
    not seen is memory that an operator takes for itself: a few MB a thread on the CPU; on CUDA the workspace of cuBLAS,
    and attention is taken to save q, k, v, its output and the log-sum-exp, as the CPU's kernel and both of CUDA's do.
    The dequantized weight that this package's operators need there is counted.

    Args:
        model: a model of transformers, a PeftModel over one, or any module (then with ``inputs``), on any device, the
            meta device included; or a transformers configuration, from which the model is built on the meta device.
            It is not changed, and its data is not read.
        config: a PEFT configuration to adapt it with, or one of the ``METHODS``, as in ``method``; None: the model
            trains what requires a gradient.
        method: "lora", "rslora", "dora" (r 16, all linear layers), "adalora" (the same, init_r 12), "ia3" (PEFT's
            layers), "prefix", "prompt" (20 virtual tokens), "bitfit" (every bias), "bottleneck" (after attention and
            feed-forward), "full".
        batch_size, sequence_length: of the inputs: tokens are their product.
        dtype: of the frozen weights; default: the model's own, or its configuration's.
        optimizer: "adamw", "adam", "adamw_torch_fused", "adamw_8bit", "adafactor", "adagrad", "lion_32bit",
            "lion_8bit", "rmsprop", "sgd", or None.
        gradient_checkpointing: layers save their input alone, and are computed again in the backward. A model on which
            it is on already keeps it.
        quantization: "nf4": as :func:`peft_ext.quantize_nf4` with ``blocksize`` and ``double_quant``; "int8": as
            bitsandbytes' Linear8bitLt. Heads stay dense.
        accelerated: as :func:`peft_ext.accelerate` leaves the model; False: PEFT's own layers, over bitsandbytes'
            Linear4bit where it is quantized, which dequantizes a weight on each use.
        autocast: dtype of autocast around the forward, as Trainer's ``bf16=True`` has it.
        padding: sequences of unequal length, so that attention takes a mask; False: without one.
        device: "cuda" or "cpu", where it is to run; default: where the model is, "cuda" for one on the meta device.
        task_type: PEFT's, for the head of a model built from a configuration and for ``method``; default: config's, or
            what the configuration's ``architectures`` says, or language modelling.
        inputs: keyword arguments for the model's forward, instead of batch_size and sequence_length; only shapes and
            dtypes of tensors are used. The loss is the output's ``loss``, or else the sum of the output.

    Raises: TypeError or ValueError that names the argument, what came and what was wanted.

    Sources: activations by what is saved: Korthikanti et al., arXiv 2205.05198; checkpointing: Chen et al., arXiv
    1604.06174; 8-bit optimizer states: Dettmers et al., arXiv 2110.02861; NF4: QLoRA, arXiv 2305.14314.
    """
    if isinstance(config, str):
        if method is not None:
            raise ValueError(f"estimate_memory: config is {config!r} and method {method!r}, wanted one of them")
        config, method = None, config
    if config is not None and method is not None:
        raise ValueError(f"estimate_memory: config is a {type(config).__name__} and method {method!r}, wanted one")
    check_arguments(method, batch_size, sequence_length, dtype, optimizer, quantization, blocksize, autocast, inputs)
    task_type = _check_task_type(task_type if task_type is not None else getattr(config, "task_type", None))
    profile, about = profile_step(
        model, config, method=method, batch_size=batch_size, sequence_length=sequence_length, dtype=dtype,
        optimizer=optimizer, gradient_checkpointing=gradient_checkpointing, quantization=quantization,
        blocksize=blocksize, double_quant=double_quant, accelerated=accelerated, autocast=autocast, padding=padding,
        device=device, task_type=task_type, inputs=inputs,
    )  # fmt: skip
    return profile.estimate(about)


def profile_step(
    model: Any, config: Any = None, *, method: Optional[str] = None, batch_size: Optional[int] = None,
    sequence_length: Optional[int] = None, dtype: Optional[torch.dtype] = None, optimizer: Optional[str] = "adamw",
    gradient_checkpointing: bool = False, quantization: Optional[str] = None, blocksize: int = 64,
    double_quant: bool = True, accelerated: bool = True, autocast: Optional[torch.dtype] = None, padding: bool = False,
    device: Union[str, torch.device, None] = None, task_type: Optional[str] = None,
    inputs: Optional[Mapping[str, Any]] = None,
) -> tuple[Profile, str]:  # fmt: skip
    """See :func:`estimate_memory`; and what was traced, in words."""
    if not isinstance(model, nn.Module):
        model, dtype = build_model(model, task_type, dtype)
    place = _device(model, device)
    model = copy_to_meta(model, dtype, accelerated)
    adapted = adapt_on_meta(model, config, method, task_type, gradient_checkpointing).train()
    if not any(p.requires_grad for p in adapted.parameters()):
        raise ValueError(f"estimate_memory: no parameter of {type(model).__name__} requires a gradient, wanted a "
                         "config, a method, or a model that trains")  # fmt: skip
    _checkpoint(adapted, gradient_checkpointing)
    replace_tensors(adapted, stand_in)
    if quantization is not None:
        quantize_stand_ins(adapted, quantization, blocksize, double_quant, accelerated)
    _put_on_ops(adapted, accelerated)
    step = _Step(adapted, optimizer, place.type)
    try:
        step.run(inputs, batch_size, sequence_length, padding, autocast)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(f"estimate_memory: the forward of {type(model).__name__} depends on the values of its "
                         f"tensors, at {error}, which no trace without data can follow") from error  # fmt: skip
    tokens = "inputs as given" if inputs is not None else f"{batch_size} x {sequence_length} tokens"
    what = [_base(adapted), _name_of(adapted, method), _quantization_of(adapted), tokens, optimizer or "no optimizer"]
    what += ["checkpointing"] * _is_checkpointing(adapted) + ["not accelerated"] * (not accelerated)
    return step.profile(), ", ".join(filter(None, what))


# --- arguments --------------------------------------------------------------------------------------------------------


def check_positive(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{op}: {argument} is {value!r}, wanted a positive integer")


def check_arguments(
    method: Optional[str], batch_size: Any, sequence_length: Any, dtype: Any, optimizer: Any, quantization: Any,
    blocksize: int, autocast: Any, inputs: Any, op: str = "estimate_memory",
) -> None:  # fmt: skip
    if method is not None and method not in METHODS:
        raise ValueError(f"{op}: method is {method!r}, wanted one of {METHODS} or a PEFT configuration")
    if inputs is None:
        check_positive(op, "batch_size", batch_size)
        check_positive(op, "sequence_length", sequence_length)
        if batch_size * sequence_length > _MOST_TOKENS:
            raise ValueError(f"{op}: batch_size times sequence_length is {batch_size * sequence_length}, wanted at "
                             f"most {_MOST_TOKENS}")  # fmt: skip
    elif batch_size is not None or sequence_length is not None:
        raise ValueError(f"{op}: inputs are given, wanted no batch_size and no sequence_length beside them")
    elif not isinstance(inputs, Mapping):
        raise TypeError(f"{op}: inputs is {type(inputs).__name__}, wanted a mapping of the forward's arguments")
    if dtype is not None:
        checks.check_dtype(op, dtype)
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"{op}: autocast is {autocast}, wanted torch.bfloat16, torch.float16 or None")
    if optimizer is not None and (not isinstance(optimizer, str) or optimizer not in _OPTIMIZERS):
        raise ValueError(f"{op}: optimizer is {optimizer!r}, wanted one of {tuple(_OPTIMIZERS)} or None")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"{op}: quantization is {quantization!r}, wanted one of {QUANTIZATIONS} or None")
    if quantization is not None and method == "full":
        raise ValueError(f"{op}: quantization is {quantization!r} and method 'full', but quantized weights don't train")
    checks.check_blocksize(op, blocksize)


def _check_task_type(task_type: Any) -> Optional[str]:
    if task_type is None:
        return None
    name = str(getattr(task_type, "value", task_type))
    if name not in AUTO_CLASSES:
        raise ValueError(f"estimate_memory: task_type is {name!r}, wanted one of {tuple(AUTO_CLASSES)}")
    return name


def _device(model: nn.Module, device: Union[str, torch.device, None]) -> torch.device:
    if device is None:
        held = next((t.device for t in model.parameters()), torch.device("meta"))
        device = held if held.type != "meta" else "cuda"
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"estimate_memory: device is {str(device)!r}, wanted 'cpu' or 'cuda'")
    return device


# --- PEFT -------------------------------------------------------------------------------------------------------------


def adapt_on_meta(
    model: nn.Module, config: Any, method: Optional[str], task_type: Optional[str], wants_checkpointing: bool
) -> nn.Module:
    if config is None and method in (None, "full"):
        return model.requires_grad_(True) if method else model
    import peft

    from .model import freeze_ranknum

    if isinstance(model, peft.PeftModel):
        raise ValueError("estimate_memory: model is a PeftModel already, wanted no config and no method beside it")
    if config is None:
        config = make_config(*method_config(method, task_type or task_of(model)))
    if not isinstance(config, peft.PeftConfig):
        raise TypeError(f"estimate_memory: config is {type(config).__name__}, wanted a PEFT configuration or one of "
                        f"{METHODS}")  # fmt: skip
    if wants_checkpointing and config.peft_type == peft.PeftType.PREFIX_TUNING:
        raise ValueError("estimate_memory: gradient_checkpointing is True, but prefix tuning does not work with it")
    config = copy.deepcopy(config)
    config.inference_mode = False
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # another start, of the same shapes
    if hasattr(config, "prompt_tuning_init"):
        config.prompt_tuning_init = peft.PromptTuningInit.RANDOM
    with torch.device("meta"):
        adapted = peft.get_peft_model(model, config)
    freeze_ranknum(adapted)
    return adapted


def _name_of(model: nn.Module, method: Optional[str]) -> str:
    held = getattr(model, "peft_config", None)
    if not isinstance(held, dict):
        return method or "as it is"
    config = held[model.active_adapter]
    name = str(getattr(config.peft_type, "value", config.peft_type))
    if getattr(config, "use_dora", False):
        name = "DORA"
    rank = getattr(config, "init_r", None) or getattr(config, "r", None)
    return f"{name} r={rank}" if isinstance(rank, int) else name


def _quantization_of(model: nn.Module) -> Optional[str]:
    layers = [module for module in model.modules() if isinstance(module, (NF4Linear, Dequantized))]
    return None if not layers else "int8" if "CB" in layers[0]._buffers else "nf4"


def _is_checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _checkpoint(model: nn.Module, wanted: bool) -> None:
    """Turn checkpointing on where it is wanted, or on already; the generator's state can't be kept in a trace."""
    if not wanted and not _is_checkpointing(model):
        return
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    for what in ("activation", "gradient"):  # transformers' newer name, and the older one
        enable = getattr(model, f"{what}_checkpointing_enable", None)
        if enable is not None:
            enable(**{f"{what}_checkpointing_kwargs": kwargs})
            return
    raise ValueError(f"estimate_memory: gradient_checkpointing is True, but {type(model).__name__} has no "
                     "gradient_checkpointing_enable")  # fmt: skip


# --- the fused layers -------------------------------------------------------------------------------------------------


def _put_on_ops(model: nn.Module, accelerated: bool) -> None:
    """accelerate or restore."""
    from .integrations import peft as integration
    from .integrations.fused.base import STOCK

    if not accelerated:
        integration.restore(model)
    elif not any(type(module) in STOCK for module in model.modules()):  # else its dora_dropout would be forgotten
        integration.accelerate(model)


# --- the optimizer ----------------------------------------------------------------------------------------------------


def _plain(states: int) -> Callable[[Tensor], list[int]]:
    """torch.optim's: states like the parameter."""
    return lambda p: [p.numel() * p.element_size()] * states


def _wide(states: int) -> Callable[[Tensor], list[int]]:
    return lambda p: [4 * p.numel()] * states


def _eight_bit(states: int) -> Callable[[Tensor], list[int]]:
    """bitsandbytes': a byte an element and a float32 for each 256; float32 below 4096 elements."""
    return lambda p: [p.numel() + 4 * -(-p.numel() // 256) if p.numel() >= 4096 else 4 * p.numel()] * states


def _adafactor(p: Tensor) -> list[int]:
    if p.dim() < 2:
        return [4 * p.numel()]
    return [4 * p[..., 0].numel(), 4 * p[..., 0, :].numel()]


# By name: the states of one parameter, in bytes, and tensors like all parameters that a step makes on the way, on CUDA,
# where torch.optim takes all of them at once (on the CPU it is one parameter after the other).
_OPTIMIZERS: dict[str, tuple[Callable[[Tensor], list[int]], int]] = {
    "adamw": (_plain(2), 1),
    "adam": (_plain(2), 1),
    "adamw_torch_fused": (_plain(2), 0),
    "adamw_8bit": (_eight_bit(2), 0),
    "adafactor": (_adafactor, 0),
    "adagrad": (_plain(1), 1),
    "lion_32bit": (_wide(1), 0),
    "lion_8bit": (_eight_bit(1), 0),
    "rmsprop": (_plain(1), 1),
    "sgd": (_plain(0), 0),
}


# --- the traced step --------------------------------------------------------------------------------------------------


@dataclass
class _Storage:
    """When a storage was made and when it died, on the trace's clock."""

    size: int
    kind: str
    born: int
    died: Optional[int] = None


class _Storages(TorchDispatchMode):
    """Notes every storage that an operator returns, and its end."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.clock = 0
        self.kind = "temporary"
        self.all: list[_Storage] = []
        self._of: weakref.WeakKeyDictionary[Any, _Storage] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.clock += 1
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self.note(t)
        if func.namespace == NAMESPACE:
            workspace = self.add(_workspace_bytes(func, args, self.device), "temporary")
            workspace.died = self.mark()
        return out

    def add(self, size: int, kind: str) -> _Storage:
        self.all.append(_Storage(size, kind, self.clock))
        return self.all[-1]

    def note(self, t: Tensor, kind: Optional[str] = None) -> _Storage:
        """The storage of ``t``, noted as of ``kind`` where that is given."""
        storage = t.untyped_storage()
        found = self._of.get(storage)
        if found is None:
            found = self._of[storage] = self.add(storage.nbytes(), self.kind)
            weakref.finalize(storage, self._end, found)
        found.kind = kind or found.kind
        return found

    def _end(self, storage: _Storage) -> None:
        self.clock += 1
        storage.died = self.clock

    def mark(self) -> int:
        """Now, a moment at which what was made before is there."""
        self.clock += 1
        return self.clock


def _workspace_bytes(func: Any, args: Any, device: str) -> int:
    """What one of this package's operators takes for itself beside its results, at most.

    On CUDA, and on the CPU in float32, an NF4 weight in the dtype of what it is multiplied with. On the CPU in 16 bits
    the activations as they are multiplied: packed into strips where the package's own tiles multiply, which read the
    weight as it lies; else they, the product and a panel of the weight in float32. In the backward of a layer that
    scales its output, or its input, the scaled gradient.
    """
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
    by = given.get("grad", given.get("x"))
    if by is None or "shape" not in given:
        return 0
    out_features, in_features = given["shape"]
    size = 0
    if device == "cpu" and by.element_size() == 2:
        products = 2 if given.get("drop_base") and given.get("seed") is not None else 1
        if STATE.isa in TILE_PATHS and by.dtype is torch.bfloat16:
            size += products * 2 * by.numel()
        else:
            rows = by.numel() // max(1, by.shape[-1])
            size += products * 4 * (rows * (out_features + in_features) + 1024 * in_features)
    elif given.get("absmax") is not None:
        size += out_features * in_features * by.element_size()
    if "grad" in given and ("ia3_l" in given or "out_scale" in given):
        size += given["x" if given.get("feedforward") else "grad"].numel() * by.element_size()
    return size


def _timeline(storages: list[_Storage], end: int) -> Iterator[tuple[int, dict[str, int], int]]:
    """Bytes alive by kind, and their sum, at each moment at which they grow."""
    events = [(s.born, True, s) for s in storages]
    events += [(end if s.died is None else s.died, False, s) for s in storages]
    alive, total = dict.fromkeys(KINDS, 0), 0
    for at, made, s in sorted(events, key=lambda event: event[:2]):  # at one moment, ends come first
        alive[s.kind] += s.size if made else -s.size
        total += s.size if made else -s.size
        if made:
            yield at, alive, total


class _Step:
    """One training step over fake tensors."""

    def __init__(self, model: nn.Module, optimizer: Optional[str], device: str) -> None:
        self.model, self.device = model, device
        self.states, self.copies = _OPTIMIZERS["sgd" if optimizer is None else optimizer]
        self.storages = _Storages(device)
        self.forward_end = 0
        self.begins: list[tuple[int, str]] = []

    def run(
        self, inputs: Optional[Mapping[str, Any]], batch_size: Any, sequence_length: Any, padding: bool, autocast: Any
    ) -> None:
        # Not fake: what a module holds beside parameters and buffers, as PEFT's prompt methods their token numbers.
        from .integrations.fused.reasons import accepting

        with FakeTensorMode(allow_non_fake_inputs=True), _not_packed(), accepting(FakeTensor):
            replace_tensors(self.model, fake)
            if inputs is None:
                inputs = _inputs(self.model, batch_size, sequence_length, padding)
            inputs = tree_map_only(Tensor, fake, dict(inputs))
            with self.storages:
                self._note_resident()
                tree_map_only(Tensor, lambda t: self.storages.note(t, "activations"), inputs)
                self._forward_backward(inputs, autocast)
                self._optimize()

    def _note_resident(self) -> None:
        adapters = self._adapters()
        for module in self.model.modules():
            quantized = isinstance(module, (NF4Linear, Dequantized))
            for name, t in (*module._parameters.items(), *module._buffers.items()):
                if t is not None:
                    state = quantized and name in module._buffers and name not in ("packed", "CB")
                    kind = "quantization" if state else "adapters" if id(t) in adapters else "weights"
                    self.storages.note(t, kind)
        allocates = hasattr(getattr(self.model, "base_model", None), "rankallocator")
        for p in self.model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._note_gradient)
                for size in self.states(p) + [p.numel() * p.element_size()] * (3 * allocates):
                    self.storages.add(size, "optimizer")

    def _adapters(self) -> set[int]:
        """Parameters that count as adapters: what trains in a partly frozen model, and PEFT's inactive ones."""
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        if len(trained) == sum(1 for _ in self.model.parameters()):
            return set()
        for module in self.model.modules():
            for name in getattr(type(module), "adapter_layer_names", ()):
                trained |= {id(p) for p in getattr(module, name).parameters()}
        return trained

    def _note_gradient(self, p: Tensor) -> None:
        if p.grad is not None:
            self.storages.note(p.grad, "gradients")

    def _forward_backward(self, inputs: Mapping[str, Any], autocast: Optional[torch.dtype]) -> None:
        storages = self.storages

        def enter_head(_module: nn.Module, args: tuple[Any, ...]) -> None:
            storages.kind = "logits"
            if args and args[0].requires_grad:
                args[0].register_hook(leave_head)

        def leave_head(_grad: Tensor) -> None:
            storages.kind = "temporary"

        head = output_head(self.model)
        if head is not None:
            head.register_forward_pre_hook(enter_head)
        for stack, layers in enumerate(_stacks(self.model)):
            for index, layer in enumerate(layers):
                layer.register_forward_pre_hook(functools.partial(self._enter_layer, stack, index), with_kwargs=True)
        self._begin("forward")
        storages.kind = "activations"
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = _loss(self.model(**inputs))
        storages.note(loss, "logits")
        self.forward_end = storages.mark()
        self._begin("backward")
        if storages.kind == "activations":
            storages.kind = "temporary"
        loss.backward()
        storages.kind = "temporary"
        self._begin("optimizer")

    def _begin(self, phase: str) -> None:
        self.begins.append((self.storages.mark(), phase))

    def _enter_layer(self, stack: int, index: int, _module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Once the gradient of a layer's input is there, the backward is at the layer before it."""
        x = args[0] if args else kwargs.get("hidden_states")
        if len(self.begins) == 1 and isinstance(x, Tensor) and x.requires_grad:
            before = "before" if index == 0 else "first" if index == 1 else "between"
            x.register_hook(lambda _grad: self._begin(f"{before} {stack}"))

    def _optimize(self) -> None:
        sizes = [p.grad.numel() * p.grad.element_size() for p in self.model.parameters() if p.grad is not None]
        on_cpu = 2 * max(sizes) if self.copies else 0
        self.storages.add(self.copies * sum(sizes) if self.device == "cuda" else on_cpu, "temporary")

    def profile(self) -> Profile:
        storages, end = self.storages.all, self.storages.mark()
        for s in storages:  # what the forward made and did not hold for the backward
            if s.kind == "activations" and s.died is not None and s.died <= self.forward_end:
                s.kind = "temporary"
        begins = [*self.begins, (end + 1, "")]
        current, peaks, most, totals = 0, {}, {}, {}
        for at, alive, total in _timeline(storages, end):
            while at >= begins[current + 1][0]:
                current += 1
            phase = begins[current][1]
            largest = most.setdefault(phase, dict.fromkeys(KINDS, 0))
            for kind, size in alive.items():
                if size > largest[kind]:
                    largest[kind] = size
            if total > totals.get(phase, -1):
                totals[phase], peaks[phase] = total, dict(alive)
        parameters = list(self.model.parameters())
        # A quantized weight's parameter, or buffer, holds two elements a byte.
        packed = [m for m in self.model.modules() if isinstance(m, (NF4Linear, Dequantized))]
        count = sum(p.numel() for p in parameters) + sum(m.out_features * m.in_features for m in packed)
        count -= sum(m.weight.numel() for m in packed if isinstance(m, NF4Linear))
        return Profile(peaks, most, count, sum(p.numel() for p in parameters if p.requires_grad))


@dataclass(frozen=True)
class Profile:
    """Bytes by kind in each phase of the step: at its peak, and the most of each kind.

    The phases are the forward; the backward of the head and the last layer of a stack, of the layers between, of its
    first layer, of what is before it; and the optimizer's step. In all but those between, the peak grows linearly with
    the number of equal layers, which the largest of the peaks does not.
    """

    peaks: dict[str, dict[str, int]]
    most: dict[str, dict[str, int]]
    parameters: int
    trainable: int

    def estimate(self, about: str) -> MemoryEstimate:
        peak = max(self.peaks.values(), key=lambda phase: sum(phase.values()))
        most = {kind: max(phase[kind] for phase in self.most.values()) for kind in KINDS}
        return MemoryEstimate(
            **most, total=sum(peak.values()), peak=types.MappingProxyType(dict(peak)),
            parameters=self.parameters, trainable=self.trainable, about=about,
        )  # fmt: skip

    def extrapolate(self, other: Profile, steps: float) -> Profile:
        """``self + steps · (other - self)``: of more layers, from two profiles of few.

        A peak between first and last layer is no larger than both of theirs, and may be missing.
        """

        shared = [name for name in self.peaks if name in other.peaks]

        def line(a: int, b: int) -> int:
            return round(a + steps * (b - a))

        def lines(a: dict[str, dict[str, int]], b: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
            return {name: {kind: max(0, line(a[name][kind], b[name][kind])) for kind in KINDS} for name in shared}

        return Profile(
            lines(self.peaks, other.peaks), lines(self.most, other.most), line(self.parameters, other.parameters),
            line(self.trainable, other.trainable),
        )  # fmt: skip


@contextlib.contextmanager
def _not_packed() -> Iterator[None]:
    """transformers takes every fake batch for a packed one, and makes a mask for it, since it can't look inside."""
    masks = sys.modules.get("transformers.masking_utils")
    find = getattr(masks, "find_packed_sequence_indices", None)
    if find is None:
        yield
        return

    @functools.wraps(find)
    def found(position_ids: Tensor) -> Optional[Tensor]:
        return None if isinstance(position_ids, FakeTensor) else find(position_ids)

    masks.find_packed_sequence_indices = found
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = find


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The stacks of layers of one class that a model consists of; lists within a layer, as of experts, are none."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in found) or not isinstance(module, nn.ModuleList):
            continue
        if len(module) > 1 and len({type(layer) for layer in module}) == 1:
            found[name] = module
    return list(found.values())


def _base(model: nn.Module) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__


def _loss(out: Any) -> Tensor:
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if loss is None:
        loss = next(t for t in tree_iter(out) if isinstance(t, Tensor)).sum()
    return loss


def _inputs(model: nn.Module, batch_size: int, sequence_length: int, padding: bool) -> dict[str, Any]:
    """Token numbers and labels as the model's head takes them."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = inspect.signature(base.forward).parameters
    if "input_ids" not in takes:
        raise ValueError(f"estimate_memory: {type(base).__name__} takes no input_ids, wanted inputs")

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64)

    tokens = (batch_size, sequence_length)
    inputs: dict[str, Any] = {"input_ids": numbers(*tokens)}
    if padding:
        inputs["attention_mask"] = numbers(*tokens)
    if "start_positions" in takes:
        inputs |= {"start_positions": numbers(batch_size), "end_positions": numbers(batch_size)}
    elif "labels" in takes:
        inputs["labels"] = numbers(*tokens)
        if "SequenceClassification" in type(base).__name__:
            labels = numbers(batch_size)
            inputs["labels"] = labels.float() if base.config.num_labels == 1 else labels
            if base.config.pad_token_id is None:  # any number does, in the copy
                base.config.pad_token_id = 0
    elif "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = numbers(*tokens)
    if "decoder_input_ids" in takes and getattr(base.config, "decoder_start_token_id", None) is None:
        base.config.decoder_start_token_id = 0
    if "use_cache" in takes:
        inputs["use_cache"] = False
    return inputs
