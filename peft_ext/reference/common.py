"""Functions that several modules of ``peft_ext.reference`` use."""

from __future__ import annotations

import threading
from typing import Optional, Union

import torch
from torch import Tensor

from ..weights.packed import PackedWeight
from .nf4 import nf4_dequantize
from .philox import dropout_keep_mask

# If the scale of an output is smaller than SMALLEST_SCALE, dividing the output by the scale would lose precision (a
# float16 output may be subnormal or 0). For an output with a scale below SMALLEST_SCALE, the backward computes the
# unscaled output again from x.
SMALLEST_SCALE = 2.0**-6

# PyTorch demands that the offset of a GPU's generator is a multiple of 4.
_OFFSETS_OF_A_SEED = 4
# Dropout of experts adds an expert's number to the second number of a seed (:func:`.experts.seed_of`). The second
# numbers of two seeds of a GPU's generator differ by at least _OFFSETS_OF_A_SEED << _EXPERT_BITS = 65,536, so that two
# calls with at most 65,536 experts share no second number.
_EXPERT_BITS = 14
_drawing = threading.Lock()
# PyTorch's modes that trace a call instead of computing the call: fake tensors, make_fx and functionalization. None if
# this version of PyTorch has them under another name; then the GPU draws.
_TRACERS = getattr(getattr(torch._C, "_TorchDispatchModeKey", None), "__members__", None)


def dense(weight: Union[Tensor, PackedWeight], dtype: torch.dtype) -> Tensor:
    """Returns a dense weight unchanged, and a packed weight decoded and rounded once to ``dtype``."""
    return nf4_dequantize(weight, dtype) if isinstance(weight, PackedWeight) else weight


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which products are summed: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def rows(value: Tensor) -> Tensor:
    """Returns ``value [..., F]`` reshaped to ``[T, F]``, where T is the product of the leading sizes."""
    return value.reshape(-1, value.shape[-1])


def dropped(x: Tensor, p: float, seed: Optional[Tensor]) -> Tensor:
    """Returns ``mask ∘ x / (1 - p)``, or ``x`` itself if ``seed`` is None. The seed is on x's device or on the CPU."""
    if seed is None:
        return x
    seed = seed.to(x.device, non_blocking=True)  # the host does not wait for a GPU
    return torch.where(dropout_keep_mask(seed, p, x.shape), x * (1.0 / (1.0 - p)), 0.0)


def dropout_seed(seed: Optional[Tensor], dropout_p: float, training: bool, device: torch.device) -> Optional[Tensor]:
    """Returns ``seed``, or a seed from PyTorch's generator of the device if ``seed`` is None. Returns None if no
    dropout is active."""
    if not training or dropout_p == 0.0:
        return None
    if seed is not None:
        return seed
    if (generator := host_generator(device)) is not None:
        return _drawn_by_host(generator, 1)[0]
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def drawn_seeds(count: int, device: torch.device) -> tuple[Tensor, ...]:
    """Returns ``count`` seeds from PyTorch's generator of the device: on a CPU, and on a GPU where the host draws (see
    :func:`host_generator`), the seeds that ``count`` calls of :func:`dropout_seed` would draw one after another.
    Otherwise one kernel launch draws all seeds.
    """
    if (generator := host_generator(device)) is not None:
        return _drawn_by_host(generator, count).unbind(0)
    return torch.randint(0, 2**63 - 1, (count, 2), dtype=torch.int64, device=device).unbind(0)


def _drawn_by_host(generator: torch.Generator, count: int) -> Tensor:
    """Returns seeds ``[count, 2]`` on the CPU for the state of a GPU's generator, and advances the state."""
    # Another draw of peft_ext must not read the offset before the offset is advanced. PyTorch's own draws do not take
    # this lock: if another thread starts one between these two calls, the next draw may repeat its numbers.
    with _drawing:
        offset = generator.get_offset()
        generator.set_offset(offset + count * _OFFSETS_OF_A_SEED)
    return torch.tensor(seeds_at(generator.initial_seed(), offset, count), dtype=torch.int64, device="cpu")


def host_generator(device: torch.device) -> Optional[torch.Generator]:
    """Returns the GPU's generator if the host may draw a seed from the generator's state. Returns None on a CPU, and
    where the GPU must draw.

    A seed that the host draws costs no kernel launch and no waiting. The GPU must draw while a CUDA graph is captured,
    while torch.compile or another tracer records the call, and under a transform of torch.func: a graph that is run
    again must draw new numbers. FakeTensorMode computes no numbers, and must not change the generator.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if _TRACERS is None or any(map(torch._C._get_dispatch_mode, _TRACERS.values())):
        return None
    if torch._C._are_functorch_transforms_active() or torch._ops._len_torch_dispatch_stack_pre_dispatch():
        return None
    if torch.cuda.is_current_stream_capturing():  # the generator's functions look at the stream of the current GPU
        return None
    with torch.cuda.device(device):  # a stream of this device may be captured
        if torch.cuda.is_current_stream_capturing():
            return None
    return torch.cuda.default_generators[device.index]


def seeds_at(initial_seed: int, offset: int, count: int) -> list[tuple[int, int]]:
    """Returns ``count`` seeds for the state of a GPU's generator, as pairs of signed 64-bit integers.

    The state is the seed of ``torch.manual_seed`` and the number of random numbers that each thread of the GPU has
    drawn since then (``get_offset``). Philox takes the pair as its key and as the upper half of its counter, so that
    the masks of different pairs are independent.
    """
    offsets = (offset + i * _OFFSETS_OF_A_SEED for i in range(count))
    return [(_signed(initial_seed), _signed(at << _EXPERT_BITS)) for at in offsets]


def _signed(value: int) -> int:
    """Returns the signed 64-bit integer with the lowest 64 bits of ``value``."""
    return (value + 2**63) % 2**64 - 2**63
