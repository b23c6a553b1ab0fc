"""The linear layers of a mixture of experts, over rows sorted by expert, with LoRA, with DoRA or without an adapter.

    x̃_t = mask/(1-p) ∘ x_t      S_t = x̃_t A_eᵀ      Z_t = x_t W_eᵀ + s · S_t B_eᵀ        t a row of expert e
    Y_t = Z_t + b_e,  or with DoRA  Y_t = g_e ∘ Z_t + b_e,  g_e = magnitude_e / ‖W_e + s · B_e A_e‖  per row

Backward, over the rows of each expert, with ``G = dY`` or with DoRA ``G = g_e ∘ dY``: ``P = s · G B_e``;
``dX = G W_e + mask/(1-p) ∘ (P A_e)``; ``dA_e = Pᵀ x̃``; ``dB_e = s · Gᵀ S``; ``dg_e = Σ dY ∘ Z``; ``db_e = Σ dY``.
Saved for the backward: x, S, the dropout's seed and, for the gradient of the output scale g, the unscaled result Z,
besides the weights, the adapters, g and the offsets. The kernels of this module's operators store no merged weight
``W_e + s · B_e A_e``. The operators that multiply rows do not read the weight of an expert without rows, unless a GPU
decodes the packed weights of all experts (in every packed format but NF4). :func:`dora_experts` does not compute the
norm of the weight of an expert without rows.

On the CPU, all threads together compute an expert with many rows, and one thread computes each expert with few rows.
On a GPU one kernel multiplies the rows of all experts, except in some calls with a dense bfloat16 weight. The CUDA
kernel that multiplies the rows decodes an NF4 weight itself, and adds the low-rank term and the bias before the result
is rounded. On a GPU, a weight in a packed format other than NF4 is decoded to a dense weight before the kernel runs.
For a dense bfloat16 weight and many rows, PyTorch's grouped product may multiply the rows with the weights, and a
kernel adds the other terms. The CUDA kernels read the number of an expert's rows on the device, so the host does not
wait.

Sources: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353); mixtures of experts (arXiv 1701.06538).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import common
from ..reference import experts as reference
from ..reference import nf4 as nf4_reference
from ..reference.dora import output_scale
from ..weights.nf4 import NF4Weight
from ..weights.packed import PackedWeight
from . import checks
from .library import NAMESPACE, WEIGHT, by_reference, define, proof, public, register_autograd
from .nf4 import refuse_double_backward

__all__ = ["dora_experts", "dora_experts_weight_norm", "experts_linear", "lora_experts"]

_ops = getattr(torch.ops, NAMESPACE)
_ADAPTERS = "Tensor offsets, Tensor? lora_A, Tensor? lora_B, Tensor? out_scale"
_SCALE = "float scaling, float dropout_p, Tensor? seed"


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _forward(x, *args):
    *weight, bias, offsets, lora_A, lora_B, out_scale, scaling, dropout_p, seed, want_z = args
    held = checks.unpack_weight(*weight, x.dtype)
    y = x.new_zeros(x.shape[0], weight[-1][1])
    s = x.new_zeros(0 if lora_A is None else (x.shape[0], lora_A.shape[1]), dtype=common.sum_dtype(x.dtype))
    z = torch.zeros_like(y) if want_z else x.new_empty(0)
    for expert, rows in reference.runs(offsets):
        own, b = reference.weight_of(held, expert), None if bias is None else bias[expert]
        own_args = () if lora_A is None else (*checks.weight_args(own), b, lora_A[expert].contiguous(),
                                              lora_B[expert].contiguous())  # fmt: skip
        scale = (scaling, dropout_p, reference.seed_of(seed, expert))
        if out_scale is not None:
            y[rows], s[rows], own_z = _ops.dora_linear(x[rows], *own_args, out_scale[expert], *scale, False, want_z)
            if want_z:
                z[rows] = own_z
        elif lora_A is not None:
            y[rows], s[rows] = _ops.lora_linear(x[rows], *own_args, None, *scale)
        elif isinstance(own, PackedWeight):
            y[rows] = _ops.nf4_linear(x[rows], *own.op_args(), b)
        else:
            y[rows] = F.linear(x[rows], own, b)
    return y, s, z


def _forward_fake(x, *args):
    *weight, _bias, _offsets, lora_A, _lora_B, _out_scale, _scaling, _dropout_p, _seed, want_z = args
    s = x.new_empty(0 if lora_A is None else (x.shape[0], lora_A.shape[1]), dtype=common.sum_dtype(x.dtype))
    y = x.new_empty(x.shape[0], weight[-1][1])
    return y, s, torch.empty_like(y) if want_z else x.new_empty(0)


def _backward_reference(grad, x, *args):
    *weight, offsets, lora_A, lora_B, out_scale, s, z, scaling, dropout_p, seed, needs_grad_x, needs_grad_scale = args
    held = checks.unpack_weight(*weight, x.dtype)
    grad_x = torch.zeros_like(x) if needs_grad_x else x.new_empty(0)
    none = x.new_empty(0, dtype=torch.float32)
    grads = [none.clone() if value is None else torch.zeros_like(value) for value in (lora_A, lora_B)]
    grad_scale = torch.zeros_like(out_scale) if needs_grad_scale else none.clone()
    for expert, rows in reference.runs(offsets):
        own = reference.weight_of(held, expert)
        own_args = () if lora_A is None else (grad[rows], x[rows], *checks.weight_args(own),
                                              lora_A[expert].contiguous(), lora_B[expert].contiguous())  # fmt: skip
        scale = (scaling, dropout_p, reference.seed_of(seed, expert))
        if out_scale is not None:
            own_z = z[rows] if needs_grad_scale else z
            found, grads[0][expert], grads[1][expert], of_scale = _ops.dora_linear_backward(
                *own_args, out_scale[expert], s[rows], own_z, False, *scale, False, needs_grad_x, needs_grad_scale
            )
            if needs_grad_scale:
                grad_scale[expert] = of_scale
        elif lora_A is not None:
            found, grads[0][expert], grads[1][expert], _ = _ops.lora_linear_backward(
                *own_args, None, s[rows], *scale, needs_grad_x
            )
        elif isinstance(own, PackedWeight):
            found = _ops.nf4_linear_backward(grad[rows], *own.op_args())
        else:
            found = grad[rows] @ own
        if needs_grad_x:
            grad_x[rows] = found
    return grad_x, *grads, grad_scale


def _backward_fake(_grad, x, *args):
    *_weight, _offsets, lora_A, lora_B, out_scale, _s, _z, _scaling, _p, _seed, needs_grad_x, needs_grad_scale = args
    none = x.new_empty(0, dtype=torch.float32)
    grads = [none.new_empty(0) if value is None else torch.empty_like(value) for value in (lora_A, lora_B)]
    grad_scale = torch.empty_like(out_scale) if needs_grad_scale else none.new_empty(0)
    return x.new_empty(x.shape) if needs_grad_x else x.new_empty(0), *grads, grad_scale


def _norm_reference(*args):
    *weight, offsets, lora_A, lora_B, scaling, dtype = args
    held = checks.unpack_weight(*weight, dtype)
    norm = lora_A.new_zeros(weight[-1][:2], dtype=common.sum_dtype(dtype))
    for expert in reference.wanted_experts(offsets, weight[-1][0]):
        own = reference.weight_of(held, expert)
        adapter = lora_A[expert].contiguous(), lora_B[expert].contiguous()
        norm[expert] = _ops.dora_weight_norm(*checks.weight_args(own), *adapter, scaling, dtype)[0]
    return norm


def _norm_fake(*args):
    *weight, _offsets, lora_A, _lora_B, _scaling, dtype = args
    return lora_A.new_empty(weight[-1][:2], dtype=common.sum_dtype(dtype))


define(
    "lora_experts",
    f"(Tensor x, {WEIGHT}, Tensor? bias, {_ADAPTERS}, {_SCALE}, bool want_z) -> (Tensor y, Tensor s, Tensor z)",
    reference=_forward,
    fake=_forward_fake,
    family="experts",
)
define(
    "lora_experts_backward",
    f"(Tensor grad, Tensor x, {WEIGHT}, {_ADAPTERS}, Tensor s, Tensor z, {_SCALE}, bool needs_grad_x,"
    " bool needs_grad_scale) -> (Tensor grad_x, Tensor grad_A, Tensor grad_B, Tensor grad_scale)",
    reference=_backward_reference,
    fake=_backward_fake,
    family="experts",
)
define(
    "dora_experts_weight_norm",
    f"({WEIGHT}, Tensor? offsets, Tensor lora_A, Tensor lora_B, float scaling, ScalarType dtype) -> Tensor",
    reference=_norm_reference,
    fake=_norm_fake,
    family="experts",
)


@proof("experts")
def _proof(inputs):
    x, t, k, n, draw = inputs.x, inputs.t, inputs.k, inputs.n, inputs.draw
    stack = [nf4_reference.nf4_quantize(draw(n, k, of=torch.float32, scale=k**-0.5), 64, True) for _ in range(3)]
    several = (draw(3, n, k, scale=k**-0.5), None, None, None, None, 0, [3, n, k])
    a, b = draw(3, 16, k, of=torch.float32, scale=k**-0.5), draw(3, n, 16, of=torch.float32, scale=0.25)
    ends = torch.tensor([t // 2, t // 2, t - 3], device=inputs.device)
    for weight, p in ((several, 0.1), (NF4Weight.stack(stack).op_args(), 0.0)):
        for g in (None, inputs.vector(3, n)):
            adapter, scale, trains = (ends, a, b, g), (0.5, p, inputs.seed if p else None), g is not None
            yield "lora_experts", (x, *weight, draw(3, n), *adapter, *scale, trains)
            _, s, z = _forward(x, *weight, None, *adapter, *scale, trains)
            yield "lora_experts_backward", (inputs.grad, x, *weight, *adapter, s, z, *scale, True, trains)
        yield "dora_experts_weight_norm", (*weight, ends, a, b, 0.5, inputs.dtype)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    x, *weight, bias, offsets, lora_A, lora_B, out_scale, scaling, dropout_p, seed, want_z = inputs
    _, s, z = output
    ctx.mark_non_differentiable(s, z)
    ctx.set_materialize_grads(False)
    ctx.blocksize_shape = weight[5:]
    ctx.scale = (scaling, dropout_p)
    ctx.save_for_backward(x, *weight[:5], offsets, lora_A, lora_B, out_scale, s, z if want_z else None, seed)


def _backward(ctx, grad, _grad_s, _grad_z):
    refuse_double_backward("lora_experts")
    if grad is None:
        return (None,) * 17
    x, *weight, offsets, lora_A, lora_B, out_scale, s, z, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_x = grad_a = grad_b = grad_g = grad_bias = None
    if needs[0] or any(needs[10:13]):
        z = x.new_empty(0) if z is None else z
        grad_x, grad_a, grad_b, grad_g = _ops.lora_experts_backward(
            grad, x, *weight, *ctx.blocksize_shape, offsets, lora_A, lora_B, out_scale, s, z, *ctx.scale, seed,
            needs[0], needs[12],
        )  # fmt: skip
    if needs[8]:
        grad_bias = _sums(grad, offsets)
    found = (grad_x, *(None,) * 7, grad_bias, None, grad_a, grad_b, grad_g, *(None,) * 4)
    return tuple(value if need else None for value, need in zip(found, needs, strict=True))


def _sums(grad: Tensor, offsets: Tensor) -> Tensor:
    """Returns the bias's gradient ``[E, N]``: each expert's rows of grad, added in float32 and in order, and
    rounded."""
    rows, wide = grad.shape[0], grad.to(common.sum_dtype(grad.dtype))
    if grad.is_cuda:  # index_add_ on a GPU adds in no fixed order
        ends = F.pad(offsets.long().clamp(0, rows).cummax(0).values, (1, 1))
        ends[-1] = rows  # the last sum is over the rows that belong to no expert, and is left out
        sums = torch.segment_reduce(wide, "sum", offsets=ends, axis=0, unsafe=True, initial=0)
    else:
        expert = torch.searchsorted(offsets.contiguous(), torch.arange(rows, device=grad.device), right=True)
        sums = wide.new_zeros(offsets.shape[0] + 1, grad.shape[1]).index_add_(0, expert, wide)
    return sums[:-1].to(grad.dtype)


_lora_experts = register_autograd("lora_experts", _backward, setup_context=_setup_context)


# --- public -----------------------------------------------------------------------------------------------------------


@public("lora_experts", "lora_experts_backward")
def lora_experts(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Optional[Tensor] = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """``Y_t = x_t W_eᵀ + scaling · (dropout(x_t) A_eᵀ) B_eᵀ + b_e`` for every row t of expert e, over frozen weights.

    Args:
        x: ``[S, K]``, float32, bfloat16 or float16: a row for each pair of a token and an expert that the token is
            routed to, sorted by expert.
        weight: frozen ``[E, N, K]``: a dense tensor of x's dtype and of any strides (the caller transposes a weight
            that is stored ``[E, K, N]``), or a PackedWeight ``[E, N, K]``, see :meth:`peft_ext.NF4Weight.stack`.
        offsets: int32 or int64 ``[E]`` on x's device: where each expert's rows end, ascending. Rows after the last
            expert's end belong to no expert: their outputs and their gradients are 0.
        lora_A: ``[E, R, K]``; lora_B: ``[E, N, R]``; each of any float dtype and of any strides.
        bias: the experts' biases b ``[E, N]`` of x's dtype, or None. scaling: the factor of the low-rank term, a finite
            number.
        dropout_p: probability to drop an element of x in the low-rank term, ``0 <= p < 1``, rounded to a multiple of
            2^-16.
        training: True: the dropout acts; False: no element of x is dropped.
        seed: int64 ``[2]`` on x's device or on the CPU for the masks; default: drawn from PyTorch's generator. The
            dropout mask of expert e is drawn for the rows of expert e alone, with e added to the seed's second number.

    Returns: ``[S, N]`` of x's dtype. Products are summed in float32. Gradients flow to x, lora_A, lora_B and bias, in
    their own dtypes; the gradients of an expert without rows are 0. Saved for backward, besides the weight, the offsets
    and the adapters: x, the product of dropout(x) with A ``[S, R]`` in float32, and the seed. Under autocast x, bias
    and a dense weight are cast to the autocast dtype, and the adapters are not cast.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Sources: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314); mixtures of experts (arXiv 1701.06538).
    """
    adapter = _Adapter(lora_A, lora_B, scaling, dropout_p, training, seed)
    return _call("lora_experts", x, weight, offsets, bias, adapter)


@public("lora_experts", "lora_experts_backward", "dora_experts_weight_norm")
def dora_experts(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Optional[Tensor] = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    weight_norm: Optional[Tensor] = None,
    seed: Optional[Tensor] = None,
) -> Tensor:
    """``Y_t = g_e ∘ (x_t W_eᵀ + scaling · (dropout(x_t) A_eᵀ) B_eᵀ) + b_e`` for every row t of expert e, with
    ``g_e = magnitude_e / ‖W_e + scaling · B_e A_e‖`` per output.

    Args:
        x, weight, offsets, lora_A, lora_B, bias, scaling, dropout_p, training, seed: as :func:`lora_experts`. The
            dropout acts on the low-rank term alone.
        magnitude: ``[E, N]``, of any float dtype: DoRA's learned magnitude of each output of each expert. Where the
            norm is 0, the output scale g is 0, and the gradients through g are 0.
        weight_norm: ``[E, N]``, of any float dtype: the norm, if the caller knows the norm already
            (:func:`dora_experts_weight_norm` in x's dtype); default: computed for the experts that have rows.

    Returns: ``[S, N]`` of x's dtype. Products are summed in float32. Gradients flow to x, lora_A, lora_B, magnitude and
    bias, in their own dtypes; the gradients of an expert without rows are 0. The backward treats the norm as a
    constant. Saved for backward, besides the weight, the offsets, the adapters and g: x, the product of dropout(x) with
    A ``[S, R]`` in float32, the seed and, where magnitude needs a gradient, the result before g and the bias ``[S, N]``
    in x's dtype. Autocast casts the same arguments as in :func:`lora_experts`.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Sources: DoRA (arXiv 2402.09353); mixtures of experts (arXiv 1701.06538).
    """
    adapter = _Adapter(lora_A, lora_B, scaling, dropout_p, training, seed, magnitude, weight_norm)
    return _call("dora_experts", x, weight, offsets, bias, adapter)


@public("dora_experts_weight_norm")
def dora_experts_weight_norm(
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    offsets: Optional[Tensor] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """``‖W_e + scaling · B_e A_e‖`` of each output of every expert. The kernels do not store ``W_e + scaling · B_e
    A_e``.

    Args:
        weight: frozen ``[E, N, K]``, as in :func:`lora_experts`. lora_A: ``[E, R, K]``; lora_B: ``[E, N, R]``; each of
            any float dtype and of any strides. scaling: the factor of B_e A_e, a finite number.
        offsets: int32 or int64 ``[E]``, as in :func:`lora_experts`: the norms of experts without rows are not computed
            and are 0; default: the norms of all experts are computed.
        dtype: dtype to which a PackedWeight is dequantized; default: the weight's own dtype. For a dense weight,
            ``dtype`` must be the weight's own dtype.

    Returns: ``[E, N]`` float32 (float64 of a float64 weight), 0 for an all-zero row. No gradient flows to lora_A and
    lora_B, because DoRA treats the norm as a constant.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: DoRA (arXiv 2402.09353).
    """
    op = "dora_experts_weight_norm"
    checks.check_experts_weight(op, weight)
    held = weight.parts[0] if isinstance(weight, PackedWeight) else weight
    checks.check_experts_lora(op, held, weight, lora_A, lora_B)
    checks.check_scale(op, scaling)
    if offsets is not None:
        checks.check_offsets(op, offsets, held, weight.shape[0])
        offsets = offsets.long()
    dtype = weight.dtype if dtype is None else dtype
    checks.check_dtype(op, dtype)
    if dtype != weight.dtype and not isinstance(weight, PackedWeight):
        raise TypeError(f"{op}: dtype is {dtype}, wanted a dense weight's own, {weight.dtype}")
    lora_A, lora_B = lora_A.detach(), lora_B.detach()
    if dtype is torch.float64 or checks.wants_reference(lora_A, lora_B):
        return by_reference(reference.dora_experts_weight_norm, weight, lora_A, lora_B, scaling, offsets=offsets,
                          dtype=dtype)  # fmt: skip
    return _ops.dora_experts_weight_norm(*checks.weight_args(weight), offsets, lora_A, lora_B, float(scaling), dtype)


@public("lora_experts", "lora_experts_backward")
def experts_linear(
    x: Tensor, weight: Union[Tensor, PackedWeight], offsets: Tensor, bias: Optional[Tensor] = None
) -> Tensor:
    """``Y_t = x_t W_eᵀ + b_e`` for every row t of expert e, over frozen weights: :func:`lora_experts` without adapters.

    The arguments, gradients and sources are those of :func:`lora_experts`, without those of the adapters.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.
    """
    return _call("experts_linear", x, weight, offsets, bias, _Adapter())


class _Adapter(NamedTuple):
    """The arguments of a call that concern the experts' adapters."""

    lora_A: Any = None
    lora_B: Any = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    training: bool = False
    seed: Optional[Tensor] = None
    magnitude: Any = None
    weight_norm: Optional[Tensor] = None


def _call(op: str, x: Any, weight: Any, offsets: Any, bias: Any, adapter: _Adapter) -> Tensor:
    lora_A, lora_B, scaling, dropout_p, training, seed, magnitude, weight_norm = adapter
    checks.check_float(op, "x", x)
    x, weight, bias = checks.cast_for_autocast(x, weight, bias)
    checks.check_experts(op, x, weight, offsets, bias)
    if op != "experts_linear":
        checks.check_experts_lora(op, x, weight, lora_A, lora_B)
    if op == "dora_experts":
        checks.check_vector(op, "magnitude", magnitude, x, tuple(weight.shape[:2]))
        if weight_norm is not None:
            checks.check_vector(op, "weight_norm", weight_norm, x, tuple(weight.shape[:2]))
    checks.check_scale(op, scaling, dropout_p)
    checks.check_seed(op, seed, x)
    offsets, scaling = offsets.long(), float(scaling)
    if checks.wants_reference(x, lora_A, lora_B, magnitude, weight_norm):
        scale = {"scaling": scaling, "dropout_p": dropout_p, "training": training, "seed": seed}
        if op == "dora_experts":
            return by_reference(reference.dora_experts, x, weight, offsets, lora_A, lora_B, magnitude, bias,
                              weight_norm=weight_norm, **scale)  # fmt: skip
        return by_reference(reference.lora_experts, x, weight, offsets, lora_A, lora_B, bias, **scale)
    held, out_scale, want_z = checks.weight_args(weight), None, False
    if op == "dora_experts":
        if weight_norm is None:
            factors = (lora_A.detach(), lora_B.detach())
            weight_norm = _ops.dora_experts_weight_norm(*held, offsets, *factors, scaling, x.dtype)
        out_scale = output_scale(magnitude, weight_norm.detach().to(common.sum_dtype(x.dtype)))
        want_z = torch.is_grad_enabled() and out_scale.requires_grad
    seed = common.dropout_seed(seed, dropout_p, training, x.device)
    args = (bias, offsets, lora_A, lora_B, out_scale, scaling, float(dropout_p), seed, want_z)
    return _lora_experts(x, *held, *args)[0]
