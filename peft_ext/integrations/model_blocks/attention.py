"""Attention within a model's own forward on a CPU: :func:`peft_ext.ops.scaled_dot_product_attention`.

An attention of transformers asks a registry, ``ALL_ATTENTION_FUNCTIONS`` of its module, for the function of the model's
implementation. The forward finds another one under this name (:mod:`.names`), which asks the module's and gives, for
transformers' ``sdpa``, a function that takes the calls that the operator takes; the others go to transformers' own,
which is tried on random numbers first. What others registered is called as ever, and on a GPU PyTorch's own kernels.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import types
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _native, ops
from ...ops.checks import autocast_dtype
from ..adapter_layers.reasons import accepts_input, kernel_reason
from .names import named

__all__ = ["NAME", "asks", "interfaces", "reason"]

NAME = "ALL_ATTENTION_FUNCTIONS"
_OPERATOR = "scaled_dot_product_attention"
_OF_PYTORCH = torch._C._nn.scaled_dot_product_attention
# The paths on which it was timed against PyTorch's own, and is ahead.
_PATHS = ("avx2", "avx512", "avx512_bf16", "amx")
# On AMX PyTorch's multiplies bfloat16 on tiles, but for dropout, and is ahead from more keys on: of causal attention
# without a mask or a bias, and of any other.
_MOST_KEYS_ON_AMX = {True: 512, False: 128}
# A block of it has lanes for 64 queries: of fewer than so many PyTorch's own is faster.
_LEAST_QUERIES = 16
# What a thread holds of a block grows with a head's size; one of more is no attention over tokens.
_LARGEST_HEAD = 512
_NUMBERS = (int, float)
# Whether a registry's function computes what the operator does: tried as a model is accelerated, or unpickled, not in
# its forward.
_TRIED: dict[Any, bool] = {}
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-5}  # of a trial, of the largest value


def asks(forward: Callable) -> bool:
    """Returns whether a forward asks a registry whose ``sdpa`` is transformers' own and computes what the operator
    does, by trial. Not under a mode of others, which would see the trial."""
    function = _get(named(forward, NAME), "sdpa")
    if function is not None and function not in _TRIED and not torch._C._len_torch_dispatch_stack():
        _TRIED[function] = _is_of_transformers(function) and _is_attention(function)
    return _TRIED.get(function, False)


@functools.cache
def interfaces(inner: types.FunctionType) -> Any:
    """Returns the registry that a forward's inner function is to find."""
    return _Interfaces(inner)


def reason(module: nn.Module, forward: Callable) -> Optional[str]:
    """Returns why a module's calls would go to the model's own function."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if not _TRIED.get(_get(named(forward, NAME), implementation)):
        return f"its attention implementation is {implementation}" + (", of others" if implementation == "sdpa" else "")
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    return _device_reason(device)


def _device_reason(device: str) -> Optional[str]:
    if F.scaled_dot_product_attention is not _OF_PYTORCH:
        return "torch.nn.functional.scaled_dot_product_attention was replaced"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "PyTorch is told to take its formula (torch.nn.attention.sdpa_kernel)"
    if device == "cuda":
        return "on a GPU PyTorch's own kernels are used"
    if _native.STATE.isa not in _PATHS:
        return f"PyTorch's own is used on this CPU path ({_native.STATE.isa})"
    return kernel_reason(_OPERATOR, device)


def _get(registry: Any, implementation: Any) -> Optional[types.FunctionType]:
    """Returns a registry's function of an implementation; None: it has none, or is no registry."""
    try:
        function = registry[implementation]
    except (KeyError, TypeError):
        return None
    return function if isinstance(function, types.FunctionType) else None


class _Interfaces:
    """A module's registry, as it is when it is asked, but for functions that the operator can take the place of."""

    def __init__(self, inner: types.FunctionType) -> None:
        self._names = inner.__globals__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._names[NAME], name)

    def __contains__(self, implementation: Any) -> bool:
        return implementation in self._names[NAME]

    def __getitem__(self, implementation: Any) -> Any:
        return _fused_or_own(self._names[NAME][implementation])

    def get_interface(self, *args: Any, **kwargs: Any) -> Any:
        return _fused_or_own(self._names[NAME].get_interface(*args, **kwargs))


def _fused_or_own(function: Any) -> Any:
    return _fused(function) if isinstance(function, types.FunctionType) and _TRIED.get(function) else function


@functools.cache
def _fused(function: Callable) -> Callable:
    """Returns ``function`` with the calls that the operator takes going to it."""
    knows_bias = _knows_bias(function)

    def sdpa_attention_forward(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: Optional[float] = None,
        is_causal: Optional[bool] = None,
        **kwargs: Any,
    ) -> Any:
        bias = kwargs.get("position_bias")
        if (
            not _fits(module, query, key, value, attention_mask, dropout, scaling, kwargs)
            or not (bias is None or (knows_bias and _fits_bias(bias, query, key, attention_mask)))
            or _tiles_are_ahead(query, key, dropout, bias is None and _causal(module, attention_mask, is_causal))
        ):
            return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                            is_causal=is_causal, **kwargs)  # fmt: skip
        return _by_operator(module, query, key, value, attention_mask, dropout, scaling, is_causal, bias)

    return functools.update_wrapper(sdpa_attention_forward, function)


def _by_operator(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], dropout: float = 0.0,
    scaling: Optional[float] = None, is_causal: Optional[bool] = None, position_bias: Optional[Tensor] = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers' ``sdpa_attention_forward`` returns of a call that fits."""
    causal = _causal(module, mask, is_causal)
    if position_bias is not None and (dtype := autocast_dtype(q)) is not None:
        position_bias = position_bias.to(dtype)
    if causal and k.shape[2] > (queries := q.shape[2]):
        # No query sees a key behind them: an empty static cache's, or those that a recomputation adds to a cache again,
        # which has to save what was saved before.
        k, v = k[:, :, :queries], v[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    out = ops.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scaling, dropout_p=dropout, training=True, bias=position_bias
    )
    return out.transpose(1, 2).contiguous(), None


def _causal(module: Any, mask: Optional[Tensor], is_causal: Optional[bool]) -> bool:
    return mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _fits(
    module: Any, q: Any, k: Any, v: Any, mask: Any, dropout: float, scaling: Any, others: dict[str, Any]
) -> bool:  # fmt: skip
    """Returns whether the operator takes a call, and is to."""
    if not all(map(accepts_input, (q, k, v))) or (q.dim(), k.dim(), v.dim()) != (4, 4, 4):
        return False
    if not q.device == k.device == v.device or _device_reason(q.device.type):
        return False
    if not q.dtype is k.dtype is v.dtype and autocast_dtype(q) is None:
        return False
    if type(dropout) not in _NUMBERS or not 0 <= dropout < 1:
        return False
    if scaling is not None and (type(scaling) not in _NUMBERS or not 0 < scaling < math.inf):
        return False
    if others.get("output_attentions") or others.get("softcap") is not None:
        return False
    batch, heads, queries, size = q.shape
    _, kv_heads, keys, _ = k.shape
    if (
        queries < _LEAST_QUERIES
        or max(size, v.shape[3]) > _LARGEST_HEAD
        or k.shape != (batch, kv_heads, keys, size)
        or v.shape[:3] != k.shape[:3]
    ):
        return False
    if heads != kv_heads * max(getattr(module, "num_key_value_groups", 1), 1):
        return False
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.dim() == 4 and mask.device == q.device
        and all(size in (1, of) for size, of in zip(mask.shape, (batch, heads, queries, keys), strict=True))
    ):  # fmt: skip
        return False
    # Whoever forbids PyTorch's fused kernels wants its formula.
    return torch.backends.cuda.flash_sdp_enabled()


def _fits_bias(bias: Any, q: Tensor, k: Tensor, mask: Optional[Tensor]) -> bool:
    """Returns whether the operator adds what a call wants added to the scores: of T5's relative positions, which no
    gradient is asked of. A query that sees nothing has the mean of all values there, as what hides a key is finite."""
    if not accepts_input(bias) or bias.dim() != 4 or bias.device != q.device:
        return False
    if bias.dtype not in (q.dtype, torch.float32):
        return False
    scores = (*q.shape[:3], k.shape[2])
    if any(size not in (1, of) for size, of in zip(bias.shape, scores, strict=True)):
        return False
    if bias.requires_grad and torch.is_grad_enabled():
        return False
    return type(mask) is not Tensor or bool(mask.any(-1).all())


def _tiles_are_ahead(q: Tensor, k: Tensor, dropout: float, causal: bool) -> bool:
    """Returns whether PyTorch's own is faster, on AMX."""
    if _native.STATE.isa != "amx" or dropout > 0 or (autocast_dtype(q) or q.dtype) is not torch.bfloat16:
        return False
    return k.shape[2] > _MOST_KEYS_ON_AMX[causal]


# --- the trial --------------------------------------------------------------------------------------------------------


def _is_of_transformers(function: types.FunctionType) -> bool:
    """Returns whether it is transformers' code, and no wrapper's, which may do more than the trial sees."""
    module = sys.modules.get("transformers.integrations.sdpa_attention")
    return module is not None and function.__code__.co_filename == module.__file__


def _knows_bias(function: Callable) -> bool:
    return "position_bias" in inspect.signature(function).parameters


def _is_attention(function: Callable) -> bool:
    """Returns whether a registry's function computes what the operator does, by its values and gradients."""
    # Neither the moment's device and mode nor whoever watches what is saved, as checkpointing, is a part of it.
    with torch.device("cpu"), torch.inference_mode(False), torch.autocast("cpu", enabled=False), \
            torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):  # fmt: skip
        try:
            return all(
                _alike(function, dtype, case, biased)
                for dtype in _TOLERANCE for case in _cases() for biased in {False, _knows_bias(function)}
            )  # fmt: skip
        except Exception:  # whatever another function raises
            return False


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _cases() -> list[tuple[bool, Optional[Tensor], Optional[float]]]:
    """Returns whether a module is causal, a mask or none, and a scale."""
    mask = torch.ones(2, 1, 18, 18, dtype=torch.bool).tril()
    mask[0, :, :, :5] = mask[1, :, 9:, :9] = False
    return [(True, None, 0.3), (False, None, None), (True, mask, 0.3)]


def _alike(
    function: Callable, dtype: torch.dtype, case: tuple[bool, Optional[Tensor], Optional[float]], biased: bool
) -> bool:
    causal, mask, scaling = case
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, 18, heads, 8, generator=generator, dtype=torch.float32).to(dtype).transpose(1, 2)
             for heads in (4, 2, 2)]  # fmt: skip
    module = types.SimpleNamespace(num_key_value_groups=2, is_causal=causal)
    how = {"dropout": 0.0, "scaling": scaling}
    if biased:
        # Each query sees a key: of one that does not, the operator is not asked.
        how["position_bias"] = torch.randn(1, 4, 18, 18, generator=generator, dtype=torch.float32).to(dtype)
        mask = None if mask is None else mask | torch.eye(18, dtype=torch.bool)
    weights = torch.linspace(-1, 1, 2 * 18 * 4 * 8, dtype=torch.float32).view(2, 18, 4, 8)

    def run(called: Callable) -> list[Tensor]:
        with torch.enable_grad():
            q, k, v = (value.detach().requires_grad_() for value in drawn)
            out, _ = called(module, q, k, v, mask, **how)
            return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), (q, k, v))]

    found, wanted = run(_by_operator), run(function)
    return found[0].stride() == wanted[0].stride() and all(
        a.shape == b.shape and a.dtype is b.dtype and (a - b).abs().max() <= _TOLERANCE[dtype] * b.abs().max()
        for a, b in zip(found, wanted, strict=True)
    )
