"""Represents the layers of one call of ``lora_linears`` as flat lists, which an operator's schema can express.

A layer has up to ten tensors: the weight, up to four further parts of a packed weight (for NF4 absmax, nested_absmax,
nested_code and nested_offset), bias, lora_A, lora_B, rank_scale and seed. Autograd accepts no None in a list of
tensors, so the list ``tensors`` has, layer after layer, only the tensors that are present. The list ``sizes`` has four
integers for each layer: a bit mask of the tensors that are present (bit 0: weight), the weight's layout, N and K. The
layout is 0 for a dense weight, the blocksize for an NF4 weight, or a number that stands for another packed format. The
list ``numbers`` has two floats for each layer: scaling and dropout_p. A layer without lora_A has no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

from torch import Tensor

from ..reference import common
from . import checks

__all__ = ["LAYERS", "NUMBERS", "Listed", "adapters_need", "listed", "no_rank", "own_gradients", "places",
           "unpack_layers"]  # fmt: skip

LAYERS = "Tensor[] tensors, SymInt[] sizes, float[] numbers"
NUMBERS = 2

_TENSORS, _SIZES = 10, 4
_BIAS, _LORA_A = 5, 6


def places(sizes: Sequence) -> list[list[Optional[int]]]:
    """Returns a list with an entry for each layer: a list of the positions in ``tensors`` of the layer's ten tensors,
    with None for an absent tensor."""
    found, at = [], 0
    for i in range(0, len(sizes), _SIZES):
        held: list[Optional[int]] = []
        for j in range(_TENSORS):
            has = bool(sizes[i] >> j & 1)
            held.append(at if has else None)
            at += has
        found.append(held)
    return found


def unpack_layers(tensors: Sequence, sizes: Sequence, numbers: Sequence) -> list[tuple]:
    """Returns a list with a tuple for each layer: the weight's arguments in a schema, bias, lora_A, lora_B, rank_scale,
    seed, scaling and dropout_p."""
    found = []
    for i, held in enumerate(places(sizes)):
        *weight, bias, lora_A, lora_B, rank_scale, seed = (None if at is None else tensors[at] for at in held)
        _, blocksize, *shape = sizes[i * _SIZES : (i + 1) * _SIZES]
        weight = (*weight, blocksize, shape)
        found.append((weight, bias, lora_A, lora_B, rank_scale, seed, *numbers[i * NUMBERS : (i + 1) * NUMBERS]))
    return found


def own_gradients(
    needs: Sequence[bool], layers: Sequence[Sequence[Optional[int]]], given: Sequence[bool],
    gradients: Optional[Sequence[Tensor]], bias_gradient: Callable[[int], Tensor],
) -> list[Optional[Tensor]]:  # fmt: skip
    """Returns a list with an entry for each tensor of the list ``tensors``: the gradient of a bias, lora_A, lora_B or
    rank_scale that needs a gradient, and None for every other tensor.

    Args:
        needs: for each tensor, whether the tensor needs a gradient.
        layers: the result of :func:`places` for the layers.
        given: for each layer, whether the layer's result has a gradient; if not, the entries of the layer's tensors are
            None.
        gradients: for each layer the gradients of lora_A, lora_B and rank_scale, in one flat list; None if the backward
            operator did not run, because neither x nor an adapter needs a gradient.
        bias_gradient: function that computes the gradient of a bias from the layer's index.
    """
    found: list[Optional[Tensor]] = [None] * len(needs)
    for i, layer in enumerate(layers):
        if not given[i]:
            continue
        for j, at in enumerate(layer[_LORA_A : _LORA_A + 3]):
            if gradients is not None and at is not None and needs[at]:
                found[at] = gradients[i * 3 + j]
        if (at := layer[_BIAS]) is not None and needs[at]:
            found[at] = bias_gradient(i)
    return found


def adapters_need(needs: Sequence[bool], layers: Sequence[Sequence[Optional[int]]]) -> list[bool]:
    """Returns a list of bools: for each layer, whether its lora_A, lora_B or rank_scale needs a gradient. ``layers`` is
    the result of :func:`places`."""
    return [any(at is not None and needs[at] for at in layer[_LORA_A : _LORA_A + 3]) for layer in layers]


class Listed(NamedTuple):
    """The checked arguments of a call of :func:`peft_ext.ops.lora_linears`.

    Attributes:
        lists: the lists ``tensors``, ``sizes`` and ``numbers``, which the module's docstring explains. options: keyword
            arguments of :func:`peft_ext.reference.lora_linears`, each a list with an entry for each layer. is_wide:
            whether the reference must compute the call, see :func:`.wants_reference`.
    """

    x: Tensor
    lists: tuple[list[Tensor], list[int], list[float]]
    options: dict[str, Any]
    is_wide: bool


def listed(
    op: str, x: Any, weights: Sequence, lora_As: Sequence, lora_Bs: Sequence, biases: Optional[Sequence],
    rank_scales: Optional[Sequence], scalings: Any, dropout_ps: Any, training: bool, seeds: Optional[Sequence],
) -> Listed:  # fmt: skip
    """Checks the arguments of :func:`peft_ext.ops.lora_linears`, and returns the arguments as a :class:`Listed`."""
    count = len(weights)
    if count == 0:
        raise ValueError(f"{op}: weights is empty, wanted a weight for each layer")
    checks.check_float(op, "x", x)
    nones: list[None] = [None] * count
    biases, rank_scales, seeds = biases or nones, rank_scales or nones, seeds or nones
    scalings = [scalings] * count if isinstance(scalings, (int, float)) else list(scalings)
    dropout_ps = [dropout_ps] * count if isinstance(dropout_ps, (int, float)) else list(dropout_ps)
    given = {"lora_As": lora_As, "lora_Bs": lora_Bs, "biases": biases, "rank_scales": rank_scales,
             "scalings": scalings, "dropout_ps": dropout_ps, "seeds": seeds}  # fmt: skip
    for argument, values in given.items():
        if len(values) != count:
            raise ValueError(f"{op}: {argument} has {len(values)} entries, wanted {count}, as weights")
    layers: list[tuple[list[Any], list[Any]]] = []
    without_seed: list[int] = []  # indices of the layers whose seed must be drawn
    sizes: list[Any] = []
    numbers: list[float] = []
    is_wide = checks.wants_reference(x, *lora_As, *lora_Bs, *rank_scales)
    if (dtype := checks.autocast_dtype(x)) is not None:
        x = x.to(dtype)
    for weight, bias, lora_A, lora_B, rank_scale, scaling, p, seed in zip(
        weights, biases, lora_As, lora_Bs, rank_scales, scalings, dropout_ps, seeds, strict=True
    ):
        plain = lora_A is not None and rank_scale is None and (seed is None or checks.fits_seed(seed, x))
        if not plain or not checks.fits_adapted(x, weight, lora_A, lora_B, bias, scaling, p):
            _, weight, bias = checks.cast_for_autocast(x, weight, bias)
            checks.check_linear(op, x, weight)
            checks.check_bias(op, bias, x, weight.shape[0])
            if (lora_A is None) != (lora_B is None):
                raise TypeError(f"{op}: of a layer's lora_A and lora_B one is None, wanted both or none")
            if lora_A is not None:
                checks.check_lora(op, weight, lora_A, lora_B)
            if rank_scale is not None:
                if lora_A is None:
                    raise ValueError(f"{op}: rank_scale is given for a layer without lora_A, wanted None")
                checks.check_vector(op, "rank_scale", rank_scale, x, (lora_A.shape[0],))
            checks.check_scale(op, scaling, p)
            checks.check_seed(op, seed, x)
        drops = training and p != 0.0 and lora_A is not None and not is_wide
        if drops and seed is None:
            without_seed.append(len(layers))
        *held, blocksize, shape = checks.weight_args(weight)
        layers.append(([*held, bias, lora_A, lora_B, rank_scale, seed if drops else None], [blocksize, *shape]))
        numbers += [float(scaling), float(p)]
    if without_seed:  # where the GPU draws, one draw of all seeds is one kernel launch
        for i, seed in zip(without_seed, common.drawn_seeds(len(without_seed), x.device), strict=True):
            layers[i][0][-1] = seed
    tensors = [value for held, _ in layers for value in held if value is not None]
    for held, size in layers:
        sizes += [sum(1 << j for j, value in enumerate(held) if value is not None), *size]
    options = {"biases": biases, "rank_scales": rank_scales, "scalings": scalings, "dropout_ps": dropout_ps,
               "seeds": seeds}  # fmt: skip
    return Listed(x, (tensors, sizes, numbers), options, is_wide)


def no_rank(x: Tensor) -> Tensor:
    """Returns an empty tensor, which stands for the product S = x̃ Aᵀ of a layer without an adapter, or for an absent
    gradient."""
    return x.new_empty(0, dtype=common.sum_dtype(x.dtype))
