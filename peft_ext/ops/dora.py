"""DoRA over a frozen weight, dense or packed: LoRA in which each output feature is rescaled to a learned magnitude.

    g = magnitude / ‖W + s·B A‖  per row  [N]      S = x̃ Aᵀ      Z = x Wᵀ + s·S Bᵀ  [T, N]      Y = g∘Z + b
    dropout on the base too (PEFT's):  Z = x̃ Wᵀ + s·S Bᵀ,  Y = x Wᵀ + b + g∘Z - x̃ Wᵀ
    n² = ‖W‖² + 2 Σ_r U∘sB + Σ_r (sB A Aᵀ)∘sB  [N],  U = W Aᵀ  [N, R]          W + s·B A is never formed

Backward: ``G = g∘dY``; ``P = s·G B``; ``dB = s·Gᵀ S``; ``dA = Pᵀ x̃``; ``dX = G W + mask/(1-p) ∘ (P A)`` (with dropout
on the base: ``dY W + mask/(1-p) ∘ ((G - dY) W + P A)``); ``dg = Σ_t dY∘Z``; ``db = Σ dY``. Backward of the norm, with
``c = dn / n``: ``dB = c∘(s U + s² B A Aᵀ)``, ``dA = s (c∘B)ᵀ W + s² (c∘B)ᵀ B A``.
For the backward, the forward saves x, S = x̃ Aᵀ, the dropout's seed, W, A, B and the output scale g. If the gradient of
g is needed, the forward also saves Z, the result before g and the bias. On a CPU, without a bias and without dropout on
the base, the forward saves the result Y instead of Z (``Z = Y/g``) for a caller that promises not to change Y.
``dora_weight_norm`` saves W, A, B, its result and U = W Aᵀ for the norm's gradient.

Source: DoRA (arXiv 2402.09353), whose section 4.3 treats the norm as a constant in the backward.
"""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor

from ..reference import common
from ..reference import dora as reference
from ..weights.packed import PackedWeight
from . import checks
from .library import NAMESPACE, WEIGHT, by_reference, define, proof, public, register_autograd, tokens
from .nf4 import refuse_double_backward, sum_rows

__all__ = ["dora_linear", "dora_weight_norm"]

_ops = getattr(torch.ops, NAMESPACE)
_LORA = "Tensor lora_A, Tensor lora_B"
_DROPOUT = "float scaling, float dropout_p, Tensor? seed, bool drop_base"


# --- schema, reference, fake ------------------------------------------------------------------------------------------


def _norm_reference(*args):
    *weight, lora_A, lora_B, scaling, dtype = args
    return reference.dora_weight_norm_forward(checks.unpack_weight(*weight, dtype), lora_A, lora_B, scaling, dtype)


def _norm_fake(weight, *args):
    *_, shape, lora_A, _lora_B, _scaling, dtype = args
    wide = common.sum_dtype(dtype)
    return weight.new_empty(shape[0], dtype=wide), weight.new_empty((shape[0], lora_A.shape[0]), dtype=wide)


def _norm_backward_reference(grad, *args):
    *weight, lora_A, lora_B, norm, u, scaling, dtype = args
    return reference.dora_weight_norm_backward(
        grad, checks.unpack_weight(*weight, dtype), lora_A, lora_B, norm, u, scaling, dtype
    )


def _norm_backward_fake(grad, *args):
    *_weight, lora_A, lora_B, _norm, _u, _scaling, _dtype = args
    return lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape)


def _forward_reference(x, *args):
    *weight, bias, lora_A, lora_B, out_scale, scaling, dropout_p, seed, drop_base, want_z = args
    y, s, z = reference.dora_linear_forward(
        x, checks.unpack_weight(*weight, x.dtype), bias, lora_A, lora_B, out_scale, scaling, dropout_p, seed, drop_base
    )
    return y, s, z if want_z else x.new_empty(0)


def _forward_fake(x, *args):
    *weight, _bias, lora_A, _lora_B, _out_scale, _scaling, _dropout_p, _seed, _drop_base, want_z = args
    count, out_features = tokens(x), weight[-1][0]
    s = x.new_empty((count, lora_A.shape[0]), dtype=common.sum_dtype(x.dtype))
    z = x.new_empty((count, out_features) if want_z else 0)
    return x.new_empty((*x.shape[:-1], out_features)), s, z


def _backward_reference(grad, x, *args):
    *weight, lora_A, lora_B, out_scale, s, z, z_is_scaled, scaling, dropout_p, seed, drop_base, needs_x, needs_g = args
    grad_x, grad_a, grad_b, grad_g = reference.dora_linear_backward(
        grad, x, checks.unpack_weight(*weight, x.dtype), lora_A, lora_B, out_scale, s, z if needs_g else None,
        z_is_scaled, scaling, dropout_p, seed, drop_base,
    )  # fmt: skip
    return grad_x if needs_x else x.new_empty(0), grad_a, grad_b, grad_g if needs_g else s.new_empty(0)


def _backward_fake(grad, x, *args):
    *_weight, lora_A, lora_B, _out_scale, s, _z, _z_is_scaled, _scaling, _p, _seed, _drop_base, needs_x, needs_g = args
    grad_x = x.new_empty(x.shape if needs_x else 0)
    grad_g = s.new_empty(lora_B.shape[0] if needs_g else 0)
    return grad_x, lora_A.new_empty(lora_A.shape), lora_B.new_empty(lora_B.shape), grad_g


define(
    "dora_weight_norm",
    f"({WEIGHT}, {_LORA}, float scaling, ScalarType dtype) -> (Tensor norm, Tensor u)",
    reference=_norm_reference,
    fake=_norm_fake,
    family="dora",
)
define(
    "dora_weight_norm_backward",
    f"(Tensor grad, {WEIGHT}, {_LORA}, Tensor norm, Tensor u, float scaling, ScalarType dtype)"
    " -> (Tensor grad_A, Tensor grad_B)",
    reference=_norm_backward_reference,
    fake=_norm_backward_fake,
    family="dora",
)
define(
    "dora_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, {_LORA}, Tensor out_scale, {_DROPOUT}, bool want_z)"
    " -> (Tensor y, Tensor s, Tensor z)",
    reference=_forward_reference,
    fake=_forward_fake,
    family="dora",
)
define(
    "dora_linear_backward",
    f"(Tensor grad, Tensor x, {WEIGHT}, {_LORA}, Tensor out_scale, Tensor s, Tensor z, bool z_is_scaled, {_DROPOUT},"
    " bool needs_grad_x, bool needs_grad_scale) -> (Tensor grad_x, Tensor grad_A, Tensor grad_B, Tensor grad_scale)",
    reference=_backward_reference,
    fake=_backward_fake,
    family="dora",
)


@proof("dora")
def _proof(inputs):
    x, a, b, n, dense, dtype = inputs.x, inputs.a, inputs.b, inputs.n, inputs.dense, inputs.dtype
    g = inputs.vector(n)
    forward = (x, *dense, inputs.bias, a, b, g, 0.5, 0.0, None, False, True)
    yield "dora_linear", forward
    _, s, z = _forward_reference(*forward)
    yield "dora_linear_backward", (inputs.grad, x, *dense, a, b, g, s, z, False, 0.5, 0.0, None, False, True, True)
    for weight in (dense, inputs.nf4):
        norm = (*weight, a, b, 0.5, dtype)
        yield "dora_weight_norm", norm
        of_norm, u = _norm_reference(*norm)
        to_norm = inputs.draw(n, of=torch.float32)
        yield "dora_weight_norm_backward", (to_norm, *weight, a, b, of_norm, u, 0.5, dtype)
    yield "dora_linear", (x, *inputs.nf4, inputs.bias, a, b, g, 0.5, 0.1, inputs.seed, True, True)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _norm_setup_context(ctx, inputs, output):
    *weight, lora_A, lora_B, scaling, dtype = inputs
    norm, u = output
    ctx.set_materialize_grads(False)
    ctx.blocksize_shape = weight[5:]
    ctx.scale = (scaling, dtype)
    ctx.save_for_backward(*weight[:5], lora_A, lora_B, norm, u)


def _norm_backward(ctx, grad, *_):
    refuse_double_backward("dora_weight_norm")
    if grad is None:
        return (None,) * 11
    *weight, lora_A, lora_B, norm, u = ctx.saved_tensors
    grad_a, grad_b = _ops.dora_weight_norm_backward(
        grad, *weight, *ctx.blocksize_shape, lora_A, lora_B, norm, u, *ctx.scale
    )
    needs = ctx.needs
    return (*(None,) * 7, grad_a if needs[7] else None, grad_b if needs[8] else None, None, None)


def _setup_context(ctx, inputs, output):
    x, *weight, bias, lora_A, lora_B, out_scale, scaling, dropout_p, seed, drop_base, want_z = inputs
    y, s, z = output
    ctx.set_materialize_grads(False)
    ctx.blocksize_shape = weight[5:]
    ctx.scale = (scaling, dropout_p)
    ctx.drop_base = drop_base
    ctx.z_is_scaled = not want_z
    held = None
    if ctx.needs[11]:
        if not want_z and (drop_base or bias is not None):
            raise ValueError("dora_linear: want_z is False with a bias or the base dropped, where Y does not give Z")
        held = z if want_z else y
    ctx.save_for_backward(x, *weight[:5], lora_A, lora_B, out_scale, s, seed, held)


def _backward(ctx, grad, *_):
    refuse_double_backward("dora_linear")
    if grad is None:
        return (None,) * 17
    x, *weight, lora_A, lora_B, out_scale, s, seed, z = ctx.saved_tensors
    needs = ctx.needs
    grad_x = grad_a = grad_b = grad_g = grad_bias = None
    if needs[0] or any(needs[9:12]):
        z = x.new_empty(0) if z is None else z.reshape(-1, z.shape[-1])
        grad_x, grad_a, grad_b, grad_g = _ops.dora_linear_backward(
            grad, x, *weight, *ctx.blocksize_shape, lora_A, lora_B, out_scale, s, z, ctx.z_is_scaled, *ctx.scale, seed,
            ctx.drop_base, needs[0], needs[11],
        )  # fmt: skip
    if needs[8]:
        grad_bias = sum_rows(grad)
    found = (grad_x, *(None,) * 7, grad_bias, grad_a, grad_b, grad_g, *(None,) * 5)
    return tuple(value if need else None for value, need in zip(found, needs, strict=True))


_dora_weight_norm = register_autograd(
    "dora_weight_norm", _norm_backward, setup_context=_norm_setup_context, trained=(7, 8)
)
_dora_linear = register_autograd("dora_linear", _backward, setup_context=_setup_context, trained=(0, 8, 9, 10, 11))


# --- public -----------------------------------------------------------------------------------------------------------


@public("dora_weight_norm", "dora_weight_norm_backward")
def dora_weight_norm(
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """``‖W + scaling · B A‖`` of each row, without forming the sum.

    Args:
        weight: frozen ``[N, K]``: a dense tensor, or a PackedWeight. lora_A: ``[R, K]``; lora_B: ``[N, R]``; each of
            any float dtype. scaling: the factor of B A, a finite number.
        dtype: dtype to which a PackedWeight is dequantized; default: the weight's own dtype. For a dense weight,
            ``dtype`` must be the weight's own dtype.

    Returns: ``[N]`` float32 (float64 of a float64 weight), 0 for an all-zero row. Gradients flow to lora_A and
    lora_B, in their own dtypes, and are 0 through a norm of 0; saved for backward, besides the weight, lora_A and
    lora_B: the norm and ``U = W Aᵀ`` ``[N, R]``, float32.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: DoRA (arXiv 2402.09353).
    """
    op = "dora_weight_norm"
    checks.check_weight(op, weight)
    checks.check_lora(op, weight, lora_A, lora_B)
    checks.check_scale(op, scaling)
    dtype = weight.dtype if dtype is None else dtype
    checks.check_dtype(op, dtype)
    if dtype != weight.dtype and not isinstance(weight, PackedWeight):
        raise TypeError(f"{op}: dtype is {dtype}, wanted a dense weight's own, {weight.dtype}")
    if dtype is torch.float64 or checks.wants_reference(lora_A, lora_B):
        return by_reference(reference.dora_weight_norm, weight, lora_A, lora_B, scaling, dtype=dtype)
    return _dora_weight_norm(*checks.weight_args(weight), lora_A, lora_B, float(scaling), dtype)


@public("dora_linear", "dora_linear_backward", "dora_weight_norm")
def dora_linear(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Optional[Tensor] = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    dropout_mode: str = "lora",
    norm_grad: bool = False,
    weight_norm: Optional[Tensor] = None,
    seed: Optional[Tensor] = None,
    save_output: bool = False,
) -> Tensor:
    """``Y = g ∘ (x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ) + b`` with ``g = magnitude / ‖W + scaling · B A‖`` per row.

    Args:
        x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, seed: as :func:`peft_ext.ops.lora_linear`.
        magnitude: ``[N]``, of any float dtype: DoRA's learned magnitude of each output. Where the norm is 0, the output
            scale g is 0, and the gradients through g are 0.
        dropout_mode: "lora": the dropout acts on the low-rank term alone; "peft": the dropout acts as in PEFT, ``Y = x
            Wᵀ + b + (g - 1) ∘ x̃ Wᵀ + scaling · g ∘ x̃ Aᵀ Bᵀ``, which needs a second product with W. On a CPU (except
            in bfloat16 on AMX), for a small dropout and enough tokens, a product of W with the dropped elements alone
            mostly replaces the second product. Without dropout,
            dropout_mode "lora" and dropout_mode "peft" give the same result.
        norm_grad: True: the gradient flows through the norm too; False: the norm is constant, as in the paper and in
            PEFT.
        weight_norm: ``[N]``, of any float dtype: the norm, if the caller knows the norm already
            (:func:`dora_weight_norm` of the weight in x's dtype); default: computed.
        save_output: True: the caller promises not to change the result in place. With save_output, the forward saves
            the result Y instead of Z, the result before the scale g and the bias, if Z can be computed from Y (on a
            CPU, without a bias and without dropout on the base). Because the caller holds the result Y anyway, saving Y
            instead of Z takes T·N elements less memory. If Y was saved, the backward computes Z from x and the weights
            again for outputs with ``|g| < 2^-60`` (in float16 ``|g| < 2^-6``).

    Returns: ``[..., N]`` of x's dtype. Products are summed in float32. Gradients flow to x, lora_A, lora_B, magnitude
    and bias, in their own dtypes. Saved for backward: x, ``S = dropout(x) Aᵀ`` ``[T, R]`` in float32, the seed and the
    vector g ``[N]`` in float32, besides the weight and the adapter; if g needs a gradient, Z ``[T, N]`` of x's dtype,
    the result before g and the bias (with save_output Y, if Z can be computed from Y); with norm_grad ``U = W Aᵀ``
    ``[N, R]`` in float32. Under autocast x, bias and a dense weight are cast to the autocast dtype.

    Raises: TypeError or ValueError, whose text names the argument, what was passed and what was expected.

    Source: DoRA (arXiv 2402.09353).
    """
    op = "dora_linear"
    x, weight, bias = checks.adapted_operands(op, x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    checks.check_seed(op, seed, x)
    checks.check_vector(op, "magnitude", magnitude, x, (weight.shape[0],))
    if weight_norm is not None:
        checks.check_vector(op, "weight_norm", weight_norm, x, (weight.shape[0],))
    if dropout_mode not in ("lora", "peft"):
        raise ValueError(f"{op}: dropout_mode is {dropout_mode!r}, wanted 'lora' or 'peft'")
    if checks.wants_reference(x, lora_A, lora_B, magnitude, weight_norm):
        return by_reference(reference.dora_linear, x, weight, lora_A, lora_B, magnitude, bias, scaling=scaling,
                          dropout_p=dropout_p, training=training, dropout_mode=dropout_mode, norm_grad=norm_grad,
                          weight_norm=weight_norm, seed=seed, save_output=save_output)  # fmt: skip
    p, saves_y = float(dropout_p) if training else 0.0, save_output and x.device.type == "cpu"
    return checked_dora_linear(x, weight, bias, lora_A, lora_B, magnitude, float(scaling), p, dropout_mode, weight_norm,
                               norm_grad, seed, saves_y)  # fmt: skip


def checked_dora_linear(
    x: Tensor,
    weight: Union[Tensor, PackedWeight],
    bias: Optional[Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout_p: float,
    dropout_mode: str,
    weight_norm: Optional[Tensor],
    norm_grad: bool = False,
    seed: Optional[Tensor] = None,
    saves_y: bool = False,
) -> Tensor:
    """Computes :func:`dora_linear` for arguments that are known to pass its checks, without checking the arguments.

    The function has no argument ``training``: a dropout acts if ``dropout_p`` is above 0.
    """
    seed = common.dropout_seed(seed, dropout_p, True, x.device)
    held = checks.weight_args(weight)
    if weight_norm is None:
        adapter = (lora_A, lora_B) if norm_grad else (lora_A.detach(), lora_B.detach())
        weight_norm = _dora_weight_norm(*held, *adapter, scaling, x.dtype)
    else:
        weight_norm = (weight_norm if norm_grad else weight_norm.detach()).to(common.sum_dtype(x.dtype))
    out_scale = reference.output_scale(magnitude, weight_norm)
    drop_base = dropout_mode == "peft" and seed is not None
    y_gives_z = saves_y and bias is None and not drop_base
    want_z = torch.is_grad_enabled() and out_scale.requires_grad and not y_gives_z
    args = (bias, lora_A, lora_B, out_scale, scaling, dropout_p, seed, drop_base, want_z)
    return _dora_linear(x, *held, *args)
