"""Cases of linear layers over a frozen weight with LoRA, DoRA and (IA)³."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from nf4_cases import dequantized, nf4_weight
from op_case import SEED, SHAPES, Case, Options, Sample, case_name, nothing, randn, shrunk_bytes, with_errors
from op_errors import errors
from packed_weights import KINDS, packed_weight
from torch import Tensor

from peft_ext import ops, reference

# --- lora -------------------------------------------------------------------------------------------------------------


def seed_beside(x: Any) -> Tensor:
    return SEED.to(x.device) if isinstance(x, Tensor) else SEED


def base_weight(base: str, n: int, k: int, dtype: torch.dtype) -> Any:
    """Returns a frozen weight.

    ``base``: "dense"; "nf4" or "nested" (double-quantized) with ":blocksize" or 64; or a key of packed_weights.KINDS.
    """
    kind, _, blocksize = base.partition(":")
    if kind in KINDS:
        return packed_weight(kind, n, k, torch.default_generator, dtype=dtype)
    if kind == "dense":
        return randn(n, k, dtype=dtype, scale=0.05)
    return nf4_weight(n, k, dtype, int(blocksize or 64), kind == "nested")


def dropped(x: Tensor, p: float) -> Tensor:
    return torch.where(reference.dropout_keep_mask(SEED, p, x.shape), x / (1 - p), 0.0) if p else x


def low_rank_inputs(base: str, dtype: torch.dtype, shape: tuple, adapters: torch.dtype, with_bias: bool) -> dict:
    tokens, k, n, r = shape
    return {
        "x": randn(*tokens, k, dtype=dtype),
        "weight": base_weight(base, n, k, dtype),
        "lora_A": randn(r, k, dtype=adapters, scale=0.1),
        "lora_B": randn(n, r, dtype=adapters, scale=0.1),
        "bias": randn(n, dtype=dtype) if with_bias else None,
        "compute": dtype,
    }


def lora_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None, rank_scale: bool = False
) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        adapters = adapter_dtype or dtype
        inputs = low_rank_inputs(base, dtype, shape, adapters, with_bias)
        inputs["rank_scale"] = randn(shape[3], dtype=adapters) if rank_scale else None
        optional = (("bias",) if with_bias else ()) + (("rank_scale",) if rank_scale else ())
        return Sample(inputs, ("x", "lora_A", "lora_B", *optional))

    def call(x, weight, lora_A, lora_B, bias, compute, rank_scale, scaling=0.75, dropout_p=dropout_p, training=True,
             seed=None):  # fmt: skip
        seed = seed_beside(x) if seed is None else seed
        return ops.lora_linear(x, weight, lora_A, lora_B, bias, rank_scale=rank_scale, scaling=scaling,
                               dropout_p=dropout_p, training=training, seed=seed)  # fmt: skip

    def plain(x, weight, lora_A, lora_B, bias, compute, rank_scale):
        # PEFT, with a single dtype, computes dropout, two projections, a product and a sum, and rounds each result.
        y = F.linear(x, dequantized(weight, compute).to(x.dtype), bias)
        lora_A = lora_A.to(x.dtype) if rank_scale is None else lora_A.to(x.dtype) * rank_scale.to(x.dtype)[:, None]
        return y + F.linear(F.linear(dropped(x, dropout_p), lora_A), lora_B.to(x.dtype)) * 0.75

    name = case_name("lora_linear", base, dropout_p, adapter_dtype, bias=with_bias, rank_scale=rank_scale)
    return Case(name, "lora", make, call, plain, saved=shrunk_bytes(dropout_p))


_OTHER_SEED = SEED + 1


def lora_linears_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None, rank_scale: bool = False
) -> Case:
    """Returns a case of lora_linears: two layers with adapters of different ranks and masks, and one without adapter.

    The results are concatenated.
    """

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, r = shape
        adapters, second = adapter_dtype or dtype, r // 2 + 1
        inputs = low_rank_inputs(base, dtype, shape, adapters, with_bias)
        inputs["rank_scale"] = randn(r, dtype=adapters) if rank_scale else None
        inputs |= {"weight2": base_weight(base, n, k, dtype), "weight3": base_weight(base, n, k, dtype),
                   "A2": randn(second, k, dtype=adapters, scale=0.1), "B2": randn(n, second, dtype=adapters, scale=0.1),
                   "bias3": randn(n, dtype=dtype) if with_bias else None}  # fmt: skip
        optional = (("bias", "bias3") if with_bias else ()) + (("rank_scale",) if rank_scale else ())
        return Sample(inputs, ("x", "lora_A", "lora_B", "A2", "B2", *optional))

    def call(x, weight, lora_A, lora_B, bias, compute, rank_scale, weight2, weight3, A2, B2, bias3):
        seeds = [seed_beside(x), seed_beside(x) + 1, None]
        ys = ops.lora_linears(
            x, [weight, weight2, weight3], [lora_A, A2, None], [lora_B, B2, None], [bias, None, bias3],
            rank_scales=[rank_scale, None, None], scalings=[0.75, -0.5, 1.0], dropout_ps=dropout_p, training=True,
            seeds=seeds,
        )  # fmt: skip
        return torch.cat(ys, dim=-1)

    def plain(x, weight, lora_A, lora_B, bias, compute, rank_scale, weight2, weight3, A2, B2, bias3):
        a = lora_A.to(x.dtype) if rank_scale is None else lora_A.to(x.dtype) * rank_scale.to(x.dtype)[:, None]
        first, second, third = (dequantized(w, compute).to(x.dtype) for w in (weight, weight2, weight3))
        kept = torch.where(reference.dropout_keep_mask(_OTHER_SEED, dropout_p, x.shape), x / (1 - dropout_p), 0.0)
        other = kept if dropout_p else x
        return torch.cat([
            F.linear(x, first, bias) + F.linear(F.linear(dropped(x, dropout_p), a), lora_B.to(x.dtype)) * 0.75,
            F.linear(x, second) + F.linear(F.linear(other, A2.to(x.dtype)), B2.to(x.dtype)) * -0.5,
            F.linear(x, third, bias3),
        ], dim=-1)  # fmt: skip

    name = case_name("lora_linears", base, dropout_p, adapter_dtype, bias=with_bias, rank_scale=rank_scale)
    return Case(
        name, "lora", make, call, plain,
        result=lambda dtype, shape: (dtype, (*shape[0], 3 * shape[2])),
        saved=lambda t, k, n, r: t * (r + r // 2 + 1) * 4 + (2 * 16 if dropout_p else 0),
    )  # fmt: skip


def lora_residual_case(*, dropout_p: float = 0.0, adapter_dtype: Any = None, rank_scale: bool = False) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, r = shape
        adapters = adapter_dtype or dtype
        inputs = {
            "x": randn(*tokens, k, dtype=dtype),
            "residual": randn(*tokens, n, dtype=dtype),
            "lora_A": randn(r, k, dtype=adapters, scale=0.1),
            "lora_B": randn(n, r, dtype=adapters, scale=0.1),
            "rank_scale": randn(r, dtype=adapters) if rank_scale else None,
        }
        return Sample(inputs, tuple(name for name, value in inputs.items() if value is not None))

    def call(x, residual, lora_A, lora_B, rank_scale, scaling=0.75, dropout_p=dropout_p, training=True, seed=None):
        seed = seed_beside(x) if seed is None else seed
        return ops.lora_residual(x, residual, lora_A, lora_B, rank_scale=rank_scale, scaling=scaling,
                                 dropout_p=dropout_p, training=training, seed=seed)  # fmt: skip

    def plain(x, residual, lora_A, lora_B, rank_scale):
        lora_A = lora_A.to(x.dtype) if rank_scale is None else lora_A.to(x.dtype) * rank_scale.to(x.dtype)[:, None]
        return residual + F.linear(F.linear(dropped(x, dropout_p), lora_A), lora_B.to(x.dtype)) * 0.75

    name = case_name("lora_residual", "any", dropout_p, adapter_dtype, rank_scale=rank_scale)
    return Case(name, "lora", make, call, plain, saved=shrunk_bytes(dropout_p))


def gated_lora_case(
    base: str, activation: str = "silu", *, halves: bool = False, with_bias: bool = False, dropout_p: float = 0.0,
    adapter_dtype: Any = None, rank_scale: bool = False,
) -> Case:  # fmt: skip
    """Returns a case of gated_lora_linear. ``halves``: whether one tensor holds gate and up."""

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        adapters = adapter_dtype or dtype
        inputs = low_rank_inputs(base, dtype, shape, adapters, with_bias)
        tokens, k, *_ = shape
        inputs["gate"] = randn(*tokens, (1 + halves) * k, dtype=dtype, scale=2.0)
        inputs["up"] = None if halves else inputs["x"]
        del inputs["x"]
        inputs["rank_scale"] = randn(shape[3], dtype=adapters) if rank_scale else None
        optional = [name for name in ("up", "bias", "rank_scale") if inputs[name] is not None]
        return Sample(inputs, ("gate", "lora_A", "lora_B", *optional))

    def call(gate, up, weight, lora_A, lora_B, bias, compute, rank_scale, scaling=0.75, dropout_p=dropout_p,
             training=True, seed=None, activation=activation):  # fmt: skip
        seed = seed_beside(gate) if seed is None else seed
        return ops.gated_lora_linear(gate, up, activation, weight, lora_A, lora_B, bias, rank_scale=rank_scale,
                                     scaling=scaling, dropout_p=dropout_p, training=training, seed=seed)  # fmt: skip

    def activated(gate: Tensor, up: Tensor | None) -> Tensor:
        gate, up = gate.chunk(2, -1) if up is None else (gate, up)
        act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda u: F.gelu(u, approximate="tanh")}[activation]
        return act(gate) * up

    def rounding(h: Tensor, compute: torch.dtype) -> Tensor:
        """Returns what the rounding of h adds to h: the operator rounds h before the products."""
        return (h.to(compute).to(h.dtype) - h).detach()

    def held(sample: Sample) -> dict[str, Tensor]:
        gate, up = sample.inputs["gate"].double(), sample.inputs["up"]
        return {"added": rounding(activated(gate, up if up is None else up.double()), sample.inputs["compute"])}

    def plain(gate, up, weight, lora_A, lora_B, bias, compute, rank_scale, added=None):
        h = activated(gate, up)
        h = h + (rounding(h, compute) if added is None else added)
        y = F.linear(h, dequantized(weight, compute).to(h.dtype), bias)
        lora_A = lora_A.to(h.dtype) if rank_scale is None else lora_A.to(h.dtype) * rank_scale.to(h.dtype)[:, None]
        return y + F.linear(F.linear(dropped(h, dropout_p), lora_A), lora_B.to(h.dtype)) * 0.75

    name = case_name("gated_lora_linear", base, dropout_p, adapter_dtype, bias=with_bias, rank_scale=rank_scale,
                     halves=halves)  # fmt: skip
    return Case(name if activation == "silu" else f"{name}-{activation}", "gated_lora", make, call, plain, held=held,
                saved=shrunk_bytes(dropout_p))  # fmt: skip


# --- several adapters in one batch ------------------------------------------------------------------------------------

# The samples' adapters: neighbours with one adapter, alternating adapters, and samples without adapter.
_PATTERN = (0, 0, 0, -1, 1, 2, 1, -1, 2, 2, 0)


def grouped_lora_case(base: str, *, with_bias: bool = False, adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, r = shape
        adapters = adapter_dtype or dtype
        inputs = low_rank_inputs(base, dtype, shape, adapters, with_bias)
        inputs = {name: inputs[name] for name in ("x", "weight", "bias", "compute")}
        names = []
        for group, rank in enumerate((r, max(1, r // 2), r + 1, 2)):
            inputs[f"A{group}"] = randn(rank, k, dtype=adapters, scale=0.1)
            inputs[f"B{group}"] = randn(n, rank, dtype=adapters, scale=0.1)
            names += [f"A{group}", f"B{group}"]
        inputs["adapters"] = [_PATTERN[i % len(_PATTERN)] for i in range(tokens[0])]
        return Sample(inputs, ("x", *names, *(("bias",) if with_bias else ())))

    scaling = (0.75, -0.5, 2.0, 1.0)

    def call(x, weight, bias, compute, adapters, A0, A1, A2, A3, B0, B1, B2, B3, scaling=scaling):
        groups = ([A0, A1, A2, A3], [B0, B1, B2, B3])
        return ops.grouped_lora_linear(x, weight, *groups, adapters, bias, scaling=scaling)

    def plain(x, weight, bias, compute, adapters, A0, A1, A2, A3, B0, B1, B2, B3):
        # PEFT computes the base on all samples, then each adapter on the adapter's samples.
        y = F.linear(x, dequantized(weight, compute).to(x.dtype), bias)
        for group, (a, b) in enumerate(((A0, B0), (A1, B1), (A2, B2), (A3, B3))):
            index = torch.tensor([i for i, adapter in enumerate(adapters) if adapter == group], dtype=torch.int64)
            part = F.linear(F.linear(x[index], a.to(x.dtype)), b.to(x.dtype)) * scaling[group]
            y = y.index_add(0, index, part)
        return y

    name = case_name("grouped_lora_linear", base, 0.0, adapter_dtype, bias=with_bias)
    return Case(name, "grouped_lora", make, call, plain, shapes=[shape for shape in SHAPES if shape[0]])


# --- dora -------------------------------------------------------------------------------------------------------------


def plain_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Returns DoRA's norm as PEFT computes it: the norm of the dense sum W + s B A, in the weight's dtype."""
    return torch.linalg.norm(weight + 0.75 * (lora_B.to(weight.dtype) @ lora_A.to(weight.dtype)), dim=1)


def dora_norm_case(base: str, *, adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        inputs = low_rank_inputs(base, dtype, shape, adapter_dtype or dtype, False)
        return Sample({k: v for k, v in inputs.items() if k not in ("x", "bias")}, ("lora_A", "lora_B"))

    def call(weight, lora_A, lora_B, compute, scaling=0.75, dtype=None):
        return ops.dora_weight_norm(weight, lora_A, lora_B, scaling, dtype=dtype)

    def plain(weight, lora_A, lora_B, compute):
        return plain_norm(dequantized(weight, compute).to(torch.promote_types(compute, lora_A.dtype)), lora_A, lora_B)

    name = case_name("dora_weight_norm", base, 0.0, adapter_dtype)
    return Case(
        name, "dora", make, call, plain,
        result=lambda dtype, shape: (torch.float32, (shape[2],)),
        saved=lambda t, k, n, r: n * 4 + n * r * 4,  # the call saves the norm and U
    )  # fmt: skip


def dora_case(
    base: str, *, with_bias: bool = False, dropout_p: float = 0.0, adapter_dtype: Any = None,
    dropout_mode: str = "lora", norm_grad: bool = False, save_output: bool = False,
) -> Case:  # fmt: skip
    def norm(inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
        return plain_norm(dequantized(inputs["weight"], inputs["compute"]).to(dtype), inputs["lora_A"],
                           inputs["lora_B"])  # fmt: skip

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        adapters = adapter_dtype or dtype
        inputs = low_rank_inputs(base, dtype, shape, adapters, with_bias)
        scale = 1.0 + randn(shape[2], dtype=torch.float64, scale=0.2)
        shrink_some(scale)
        inputs["magnitude"] = (norm(inputs, torch.float64) * scale).to(adapters)
        return Sample(inputs, ("x", "lora_A", "lora_B", "magnitude", *(("bias",) if with_bias else ())))

    def call(x, weight, lora_A, lora_B, bias, compute, magnitude, scaling=0.75, dropout_p=dropout_p, training=True,
             seed=None, dropout_mode=dropout_mode, weight_norm=None):  # fmt: skip
        seed = seed_beside(x) if seed is None else seed
        return ops.dora_linear(
            x, weight, lora_A, lora_B, magnitude, bias, scaling=scaling, dropout_p=dropout_p, training=training,
            dropout_mode=dropout_mode, norm_grad=norm_grad, weight_norm=weight_norm, seed=seed, save_output=save_output,
        )  # fmt: skip

    def plain(x, weight, lora_A, lora_B, bias, compute, magnitude, weight_norm=None):
        dense, low_a, low_b = dequantized(weight, compute).to(x.dtype), lora_A.to(x.dtype), lora_B.to(x.dtype)
        if weight_norm is None:
            weight_norm = plain_norm(dense, low_a, low_b)
            weight_norm = weight_norm if norm_grad else weight_norm.detach()
        g = magnitude.to(x.dtype) / weight_norm
        low_rank = F.linear(F.linear(dropped(x, dropout_p), low_a), low_b) * 0.75
        y = F.linear(x, dense, bias)
        # Without dropout PEFT scales the base's result without bias. With dropout PEFT scales a product of dropout(x).
        if dropout_mode == "peft" and dropout_p:
            return y + ((g - 1) * F.linear(dropped(x, dropout_p), dense) + g * low_rank)
        unbiased = y if bias is None else y - bias
        return y + ((g - 1) * unbiased + g * low_rank)

    def saved(t: int, k: int, n: int, r: int) -> int:
        found = shrunk_bytes(dropout_p)(t, k, n, r) + t * n * 2 + n * 4 + n * 4  # The call saves Z, g and the norm.
        if norm_grad:  # The call also saves U, the norm, and the magnitude in float32.
            found += n * r * 4 + n * 4 + (0 if adapter_dtype == torch.float32 else n * 4)
        return found

    name = case_name("dora_linear", base, dropout_p, adapter_dtype, bias=with_bias, peft=dropout_mode == "peft",
                      norm_grad=norm_grad, save_output=save_output)  # fmt: skip
    return Case(
        name, "dora", make, call, plain,
        from_product=("magnitude", "lora_A", "lora_B") if norm_grad else ("magnitude",),
        # If W has one column, DoRA's norm is an absolute value, and the gradient through the norm and the direct
        # gradient cancel to 0.
        shapes=[shape for shape in SHAPES if shape[1] > 1] if norm_grad else SHAPES,
        held=lambda sample: {} if norm_grad else {"weight_norm": norm(sample.inputs, torch.float64).detach()},
        saved=saved,
    )  # fmt: skip


# --- ia3 --------------------------------------------------------------------------------------------------------------


def shrink_some(scale: Tensor) -> None:
    """Scales some outputs to 0 or nearly to 0, so that these outputs do not determine the product."""
    for first, factor in ((3, 0.0), (5, 1e-4), (6, 1e-30)):
        scale[first::16] *= factor


def _ia3_vector(n: int, dtype: torch.dtype) -> Tensor:
    scale = 1.0 + randn(n, dtype=torch.float64, scale=0.2)
    shrink_some(scale)
    return scale.to(dtype)


def ia3_case(
    base: str, *, feedforward: bool = False, with_bias: bool = False, adapter_dtype: Any = None, matrix: bool = False,
    save_output: bool = False,
) -> Case:  # fmt: skip
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, k, n, _ = shape
        ia3_l = _ia3_vector(k if feedforward else n, adapter_dtype or dtype)
        inputs = {
            "x": randn(*tokens, k, dtype=dtype),
            "weight": base_weight(base, n, k, dtype),
            "ia3_l": ia3_l.view((1, -1) if feedforward else (-1, 1)) if matrix else ia3_l,
            "bias": randn(n, dtype=dtype) if with_bias else None,
            "compute": dtype,
        }
        return Sample(inputs, ("x", "ia3_l", *(("bias",) if with_bias else ())))

    def call(x, weight, ia3_l, bias, compute):
        return ops.ia3_linear(x, weight, ia3_l, bias, feedforward=feedforward, save_output=save_output)

    def plain(x, weight, ia3_l, bias, compute):
        dense, ia3_l = dequantized(weight, compute).to(x.dtype), ia3_l.to(x.dtype).flatten()
        return F.linear(x * ia3_l, dense, bias) if feedforward else F.linear(x, dense, bias) * ia3_l

    name = case_name("ia3_linear", base, 0.0, adapter_dtype, bias=with_bias, feedforward=feedforward, matrix=matrix,
                      save_output=save_output)  # fmt: skip
    saved = lambda t, k, n, r: 0 if feedforward else t * n * 2  # noqa: E731
    return Case(name, "ia3", make, call, plain, from_product=("ia3_l",), saved=saved)


def ia3_scale_case(adapter_dtype: Any = None) -> Case:
    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        tokens, _, n, _ = shape
        inputs = {"x": randn(*tokens, n, dtype=dtype), "ia3_l": _ia3_vector(n, adapter_dtype or dtype).view(1, n)}
        return Sample(inputs, ("x", "ia3_l"))

    def plain(x, ia3_l):
        return x * ia3_l.to(x.dtype).flatten()

    return Case(case_name("ia3_scale", "x", 0.0, adapter_dtype), "ia3", make, ops.ia3_scale, plain, saved=nothing)


# --- what is tested --------------------------------------------------------------------------------------------------

ERRORS = {
    "lora_linear-dense": errors(
        "lora_linear", "columns", "weight dtype", "trainable weight", "weight of 3 dims", "A columns", "B rows",
        "ranks", "dropout 1", "seed",
        no_tensor=({"x": [1.0]}, TypeError, "x is list, wanted a Tensor"),
        sparse=({"x": torch.zeros(4, 64).to_sparse()}, TypeError, "x has layout torch.sparse_coo"),
        rank_0=({"lora_A": torch.zeros(0, 64), "lora_B": torch.zeros(96, 0)}, ValueError,
                "lora_A has rank 0, wanted at least 1"),
        A_device=({"lora_A": torch.zeros(16, 64, device="meta")}, ValueError, "lora_A is on meta, weight is on cpu"),
        rank_scale_size=({"rank_scale": torch.ones(1, 16)}, ValueError,
                         r"rank_scale has shape \(1, 16\), wanted \(16,\) or \(16, 1\)"),
        scaling=({"scaling": float("inf")}, ValueError, "scaling is inf, wanted a finite number"),
        negative_dropout=({"dropout_p": -0.5}, ValueError, "dropout_p is -0.5, wanted 0 <= p < 1"),
    ),
    "lora_linears-dense-bias-rank_scale-dropout0.1": errors(
        "lora_linears", "columns", "weight dtype", "weight of 3 dims", "A columns", "B rows", "ranks",
        no_tensor=({"x": [1.0]}, TypeError, "x is list, wanted a Tensor"),
    ),
    "lora_residual-any": errors(
        "lora_residual", "residual shape", "residual dtype", "A columns", "ranks", "dropout 1", "seed",
        no_residual=({"residual": None}, TypeError, "residual is NoneType, wanted a Tensor"),
        B_rows=({"lora_B": torch.zeros(95, 16)}, ValueError, r"residual has shape \(4, 8, 96\), wanted \(4, 8, 95\)"),
    ),
    "gated_lora_linear-dense": errors(
        "gated_lora_linear", "weight of 3 dims", "trainable weight", "A columns", "B rows", "ranks", "dropout 1",
        "seed",
        no_gate=({"gate": None}, TypeError, "gate is NoneType, wanted a Tensor"),
        weight_dtype=({"weight": torch.zeros(96, 64, dtype=torch.bfloat16)}, TypeError,
                      r"weight is bfloat16, act\(gate\) \* up is float32"),
        columns=({"gate": torch.zeros(2, 3), "up": torch.zeros(2, 3)}, ValueError,
                 r"act\(gate\) \* up has shape \(2, 3\), wanted \[\.\.\., 64\]"),
        up_shape=({"up": torch.zeros(2, 64)}, ValueError, r"up has shape \(2, 64\), wanted \(4, 8, 64\)"),
        odd=({"gate": torch.zeros(2, 63), "up": None}, ValueError,
             r"gate has shape \(2, 63\), wanted \[\.\.\., 2F\] where up is None"),
        activation=({"activation": "tanh"}, ValueError, "activation is 'tanh', wanted one of"),
    ),
    "grouped_lora_linear-dense": errors(
        "grouped_lora_linear", "weight dtype",
        vector=({"x": torch.zeros(64)}, ValueError, r"x has shape \(64,\), wanted \[samples, \.\.\., K\]"),
        columns=({"x": torch.zeros(4, 3)}, ValueError, r"x has shape \(4, 3\), wanted \[\.\.\., 64\]"),
        samples=({"adapters": [0]}, ValueError, "adapters has 1 elements, wanted 4, one for each sample of x"),
        index=({"adapters": [0, 1, 4, 0]}, ValueError, "adapters has 4, wanted -1 to 3"),
        name=({"adapters": ["a", 0, 0, 0]}, ValueError, "adapters has 'a', wanted -1 to 3"),
        scaling=({"scaling": (1.0, float("nan"), 1.0, 1.0)}, ValueError, "scaling is nan, wanted a finite number"),
        as_many=({"scaling": (1.0,)}, ValueError,
                 "4 of lora_A, 4 of lora_B and 1 of scaling, wanted as many, and at least 1"),
        A_columns=({"A1": torch.zeros(8, 63)}, ValueError, r"lora_A has shape \(8, 63\), wanted \[R, 64\]"),
        ranks=({"B2": torch.zeros(96, 3)}, ValueError, "lora_B has rank 3, lora_A has rank 17"),
    ),
    "dora_weight_norm-dense": errors(
        "dora_weight_norm", "A columns", "weight of 3 dims",
        scaling=({"scaling": float("nan")}, ValueError, "scaling is nan, wanted a finite"),
        integer_dtype=({"dtype": torch.int8}, TypeError, "dtype is torch.int8, wanted one of"),
        other_dtype=({"dtype": torch.float16}, TypeError,
                     "dtype is torch.float16, wanted a dense weight's own, torch.float32"),
    ),
    "dora_linear-dense": errors(
        "dora_linear", "columns", "B rows", "trainable weight", "dropout 1",
        magnitude_size=({"magnitude": torch.zeros(95)}, ValueError, r"magnitude has shape \(95,\), wanted \(96,\)"),
        magnitude_dtype=({"magnitude": torch.zeros(96, dtype=torch.int32)}, TypeError,
                         "magnitude is int32, wanted one of float32"),
        no_magnitude=({"magnitude": None}, TypeError, "magnitude is NoneType, wanted a Tensor"),
        norm_size=({"weight_norm": torch.zeros(1)}, ValueError, r"weight_norm has shape \(1,\), wanted \(96,\)"),
        mode=({"dropout_mode": "base"}, ValueError, "dropout_mode is 'base', wanted 'lora' or 'peft'"),
        seed=({"seed": 3}, ValueError, r"seed is int, wanted int64 \(2,\)"),
    ),
    "ia3_linear-dense": errors(
        "ia3_linear", "columns", "weight dtype", "bias size",
        l_of_the_input=({"ia3_l": torch.ones(64)}, ValueError,
                        r"ia3_l has shape \(64,\), wanted \(96,\) or \(96, 1\)"),
        l_lying=({"ia3_l": torch.ones(1, 96)}, ValueError, r"ia3_l has shape \(1, 96\), wanted"),
        l_of_integers=({"ia3_l": torch.ones(96, dtype=torch.int64)}, TypeError, "ia3_l is int64"),
    ),
    "ia3_scale": errors(
        "ia3_scale",
        l_size=({"ia3_l": torch.ones(95)}, ValueError,
                r"ia3_l has shape \(95,\), wanted \(96,\) or \(1, 96\) or \(96, 1\)"),
        number=({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\), wanted \[\.\.\., K\]"),
    ),
}  # fmt: skip

CASES = with_errors(
    ERRORS,
    lora_case("dense"),
    lora_case("dense", with_bias=True, dropout_p=0.1),
    lora_case("dense", adapter_dtype=torch.float32, dropout_p=0.5),
    lora_case("nf4", adapter_dtype=torch.bfloat16),
    lora_case("nested", adapter_dtype=torch.float32, dropout_p=0.05, with_bias=True),
    lora_case("dense", rank_scale=True),
    lora_linears_case("dense", with_bias=True, dropout_p=0.1, rank_scale=True),
    lora_linears_case("dense", adapter_dtype=torch.float32),
    lora_linears_case("nf4", adapter_dtype=torch.bfloat16, dropout_p=0.5),
    lora_linears_case("nested", adapter_dtype=torch.float32, dropout_p=0.05, with_bias=True),
    lora_case("nested", rank_scale=True, adapter_dtype=torch.float32, dropout_p=0.1, with_bias=True),
    lora_residual_case(),
    lora_residual_case(dropout_p=0.1, adapter_dtype=torch.float32),
    lora_residual_case(rank_scale=True, dropout_p=0.5),
    gated_lora_case("dense"),
    gated_lora_case("dense", "gelu_tanh", halves=True, with_bias=True, dropout_p=0.1, rank_scale=True),
    gated_lora_case("nf4", "gelu", adapter_dtype=torch.bfloat16),
    gated_lora_case("nested", adapter_dtype=torch.float32, dropout_p=0.05, with_bias=True),
    grouped_lora_case("dense"),
    grouped_lora_case("dense", with_bias=True, adapter_dtype=torch.float32),
    grouped_lora_case("nf4", adapter_dtype=torch.bfloat16),
    grouped_lora_case("nested", with_bias=True, adapter_dtype=torch.float32),
    dora_norm_case("dense"),
    dora_norm_case("dense", adapter_dtype=torch.float32),
    dora_norm_case("nf4"),
    dora_norm_case("nested", adapter_dtype=torch.float32),
    dora_case("dense"),
    dora_case("dense", with_bias=True, dropout_p=0.1),
    dora_case("dense", with_bias=True, dropout_p=0.1, dropout_mode="peft"),
    dora_case("dense", dropout_mode="peft", adapter_dtype=torch.float32),
    dora_case("dense", norm_grad=True),
    dora_case("nf4", adapter_dtype=torch.bfloat16, dropout_p=0.5),
    dora_case("nf4", adapter_dtype=torch.float32, with_bias=True, dropout_p=0.5, dropout_mode="peft"),
    dora_case("nested", adapter_dtype=torch.float32, dropout_p=0.05, dropout_mode="peft"),
    dora_case("nested", adapter_dtype=torch.float32, with_bias=True, norm_grad=True),
    ia3_case("dense"),
    ia3_case("dense", feedforward=True, with_bias=True),
    ia3_case("dense", with_bias=True, adapter_dtype=torch.float32, matrix=True),
    ia3_case("nf4", adapter_dtype=torch.float32),
    ia3_case("nested", feedforward=True, adapter_dtype=torch.float32, matrix=True),
    ia3_scale_case(),
    ia3_scale_case(torch.float32),
)

# Cases with save_output, by which the caller promises not to change the result in place. On a GPU, save_output has no
# effect.
SAVED_OUTPUT = (
    dora_case("dense", save_output=True),
    dora_case("nested", adapter_dtype=torch.float32, dropout_p=0.1, save_output=True),
    ia3_case("dense", save_output=True),
    ia3_case("nf4", with_bias=True, adapter_dtype=torch.float32, save_output=True),
)


def drawn(o: Options) -> dict[str, Callable[[], Case]]:
    """Returns, by public operator, a function that makes a random case for the sweep."""
    return {
        "lora_linear": lambda: lora_case(
            o.base, with_bias=o.maybe(), dropout_p=o.dropout, adapter_dtype=o.adapters, rank_scale=o.maybe(0.3)
        ),
        "lora_residual": lambda: lora_residual_case(
            dropout_p=o.dropout, adapter_dtype=o.adapters, rank_scale=o.maybe(0.3)
        ),
        "gated_lora_linear": lambda: gated_lora_case(
            o.base, o.rng.choice(("silu", "gelu", "gelu_tanh")), halves=o.maybe(), with_bias=o.maybe(),
            dropout_p=o.dropout, adapter_dtype=o.adapters, rank_scale=o.maybe(0.3),
        ),
        "grouped_lora_linear": lambda: grouped_lora_case(o.base, with_bias=o.maybe(), adapter_dtype=o.adapters),
        "dora_weight_norm": lambda: dora_norm_case(o.base, adapter_dtype=o.adapters),
        "dora_linear": lambda: dora_case(
            o.base, with_bias=o.maybe(), dropout_p=o.dropout, adapter_dtype=o.adapters,
            dropout_mode=o.rng.choice(("lora", "peft")), norm_grad=o.maybe(0.3),
        ),
        "ia3_linear": lambda: ia3_case(
            o.base, feedforward=o.maybe(), with_bias=o.maybe(), adapter_dtype=o.adapters, matrix=o.maybe(0.3)
        ),
        "ia3_scale": lambda: ia3_scale_case(o.adapters),
    }  # fmt: skip
