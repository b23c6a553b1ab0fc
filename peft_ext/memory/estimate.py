"""``estimate_memory``: checks its arguments, prepares the model without its data and traces one training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
from torch import nn

from .. import methods
from ..ops import checks
from ..sources.model import AUTO_CLASSES, base_model
from ..weights.quantizers import PACKED_FORMATS
from .adapt import adapt_on_meta, is_checkpointing, name_of, put_on_ops, quantization_of, set_checkpointing
from .optimizers import OPTIMIZERS
from .profile import MemoryEstimate, Profile
from .stand_ins import build_model, copy_to_meta, quantize_stand_ins, replace_tensors, stand_in
from .trace import VALUES_WANTED, Step

METHODS = ("full", *methods.METHODS)
QUANTIZATIONS = ("nf4", *PACKED_FORMATS, "int8")

_MOST_TOKENS = 2**40  # most tokens of a batch; with more, a tensor's byte count may not fit in 64 bits


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
    """Estimates the memory of one training step, ``max_t Σ bytes alive at t``, without allocating that memory.

    The step is traced (see the module ``peft_ext.memory``), in a second or two for 7 billion parameters, without a GPU.
    A trace does not see the scratch memory of PyTorch's operators: a few MB a thread on the CPU, the workspace of
    cuBLAS on CUDA. The estimate assumes that attention saves q, k, v, its output and the log-sum-exp, as PyTorch's CPU
    kernel and its flash and memory-efficient CUDA kernels do. The estimate counts the scratch memory into which
    peft_ext's operators dequantize weights. As in transformers' Trainer, the states of an nn.Embedding's weight are
    float32 under an 8-bit optimizer.

    Args:
        model: a model of transformers, a PeftModel over a model of transformers, or any module (then with ``inputs``),
            on any device, the meta device included; or a transformers configuration, from which a model is built on
            the meta device. The model is not changed, and its data is not read.
        config: a PEFT configuration to adapt the model with, or a name that ``method`` accepts. With config None and
            method None, the parameters that require a gradient are trained.
        method: one of :data:`peft_ext.methods.METHODS`, with the settings of that table: "lora", "rslora", "dora" (r
            16, all linear layers), "qlora" ("lora" over NF4), "adalora" (init_r 12), "ia3" (PEFT's layers), "prefix",
            "prompt" (20 virtual tokens), "bitfit" (every bias), "bottleneck" (after attention and feed-forward),
            "diff-pruning" (all linear layers, before it prunes), "partial" (the last two layers); or "full".
        batch_size, sequence_length: size of the inputs, which have batch_size · sequence_length tokens.
        dtype: dtype of the base model's floating-point parameters; default: the model's own, or the configuration's.
            Trainable parameters of an adapter that ``model`` has already keep their dtype.
        optimizer: "adamw", "adam", "adamw_torch_fused", "adamw_8bit", "adafactor", "adagrad", "lion_32bit",
            "lion_8bit", "rmsprop", "sgd", or None, which counts as "sgd": an optimizer without states.
        gradient_checkpointing: True: each layer that transformers can checkpoint saves only its input, and the
            backward computes the layer again. If ``gradient_checkpointing`` is False, a model that has checkpointing on
            already keeps it.
        quantization: "nf4": as :func:`peft_ext.quantize_nf4` with ``blocksize`` and ``double_quant``; "mxfp4", "nvfp4",
            "fp8", "int4": as :func:`peft_ext.quantize_packed`; "int8": as bitsandbytes' Linear8bitLt. Heads stay dense.
            Layers of a model in memory that are packed already count with their packed bytes.
        accelerated: True: the step runs the layers that :func:`peft_ext.accelerate` makes. With ``accelerated`` False,
            the step runs PEFT's own layers, over bitsandbytes' Linear4bit for an NF4 base, which dequantizes a weight
            on each use.
        autocast: dtype of autocast around the forward, as in the Trainer with ``bf16=True``; None: no autocast.
        padding: True: the sequences have unequal lengths, so that attention gets a mask; False: attention gets no mask.
        device: device of the step, "cuda" or "cpu"; default: the model's device, "cuda" for a model on the meta device.
        task_type: PEFT's task, for the head of a model built from a configuration and for ``method``; default:
            ``config.task_type``, or the task of the first class in ``architectures`` of the transformers configuration,
            or language modelling.
        inputs: keyword arguments of the model's forward, instead of batch_size and sequence_length; only shapes and
            dtypes of the tensors are used. The loss is the ``loss`` in the forward's output, or the sum of the output's
            first tensor where the output has no ``loss``.

    Raises: TypeError or ValueError that names the argument, what came and what was wanted.

    Sources: memory of saved activations: Korthikanti et al., arXiv 2205.05198; checkpointing: Chen et al., arXiv
    1604.06174; 8-bit optimizer states: Dettmers et al., arXiv 2110.02861; NF4: QLoRA, arXiv 2305.14314.
    """
    if isinstance(config, str):
        if method is not None:
            raise ValueError(f"estimate_memory: config is {config!r} and method {method!r}, wanted one of them")
        config, method = None, config
    if config is not None and method is not None:
        raise ValueError(f"estimate_memory: config is a {type(config).__name__} and method {method!r}, wanted one")
    if method == "qlora" and quantization is None:
        quantization = "nf4"
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
    """Traces a step as :func:`estimate_memory` does; returns the profile, and a description of the traced step."""
    if not isinstance(model, nn.Module):
        model, dtype = build_model(model, task_type, dtype)
    place = _device(model, device)
    model = copy_to_meta(model, dtype, accelerated)
    adapted = adapt_on_meta(model, config, method, task_type, gradient_checkpointing).train()
    if not any(p.requires_grad for p in adapted.parameters()):
        raise ValueError(f"estimate_memory: no parameter of {type(model).__name__} requires a gradient, wanted a "
                         "config, a method, or a model that trains")  # fmt: skip
    set_checkpointing(adapted, gradient_checkpointing)
    replace_tensors(adapted, stand_in)
    if quantization is not None:
        quantize_stand_ins(adapted, quantization, blocksize, double_quant, accelerated)
    put_on_ops(adapted, accelerated)
    step = Step(adapted, optimizer, place.type)
    try:
        step.run(inputs, batch_size, sequence_length, padding, autocast)
    except VALUES_WANTED as error:
        raise ValueError(f"estimate_memory: the forward of {type(model).__name__} depends on the values of its "
                         f"tensors, at {error}, which no trace without data can follow") from error  # fmt: skip
    tokens = "inputs as given" if inputs is not None else f"{batch_size} x {sequence_length} tokens"
    names = [type(base_model(adapted)).__name__, name_of(adapted, method), quantization_of(adapted)]
    what = [*names, tokens, optimizer or "no optimizer"]
    what += ["checkpointing"] * is_checkpointing(adapted) + ["not accelerated"] * (not accelerated)
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
    if optimizer is not None and (not isinstance(optimizer, str) or optimizer not in OPTIMIZERS):
        raise ValueError(f"{op}: optimizer is {optimizer!r}, wanted one of {tuple(OPTIMIZERS)} or None")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"{op}: quantization is {quantization!r}, wanted one of {QUANTIZATIONS} or None")
    if quantization is not None and (method == "full" or method and not methods.METHODS[method].can_quantize):
        raise ValueError(
            f"{op}: quantization is {quantization!r} and method {method!r}, but quantized weights don't train"
        )
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
