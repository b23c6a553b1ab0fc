"""Lists the cases of the benchmarks: each variant at layer shapes, numbers of tokens and kinds of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

from .harness import Case, Comparison
from .peers import Problem

__all__ = ["MAIN", "SHAPES", "Options", "Variant", "cases"]

MAIN = "4096"
# (K, N) of the linear layers of some models. Every run has MAIN, Llama-3-8B's square layer.
SHAPES = {
    MAIN: ((4096, 4096),),
    "smollm2": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "1b": ((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)),
    "8b": ((4096, 1024), (4096, 14336), (14336, 4096)),
    "wide": ((4096, 14336),),
}


@dataclass(frozen=True)
class Variant:
    """A comparison that can be built at any shape.

    Attributes:
        build: ``(problem, compile) -> Comparison``.
        tokens: numbers of tokens; None: those of the run; (None,): the operator has no tokens.
        everywhere: the variant is compared at the models' shapes too, not only at 4096 x 4096.
        devices: devices on which the variant is compared.
        graph: the variant has no autograd, so that a CUDA graph can hold its calls.
    """

    op: str
    case: str
    build: Callable[[Problem, bool], Comparison]
    tokens: Optional[tuple[Optional[int], ...]] = None
    everywhere: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    graph: bool = False


@dataclass(frozen=True)
class Options:
    """The choice of cases for a run.

    Attributes:
        tokens, hot_tokens: numbers of tokens at 4096 x 4096 with rotating and with hot weights.
        shape_tokens: numbers of tokens at the models' shapes; None stands for operators without tokens.
        shapes: names of :data:`SHAPES` besides MAIN.
        weights: "rotating", "hot", and on a GPU "graph": rotating weights, the calls captured in a CUDA graph.
        compile_tokens: numbers of tokens at which torch.compile takes part at 4096 x 4096; each compiles for seconds.
        device: "cpu" or "cuda".
        forward_tokens: numbers of tokens at which forwards without autograd are compared as well.
    """

    tokens: Sequence[int]
    hot_tokens: Sequence[int]
    shape_tokens: Sequence[Optional[int]]
    shapes: Sequence[str]
    weights: Sequence[str]
    compile_tokens: Sequence[int]
    device: str = "cpu"
    forward_tokens: Sequence[int] = ()


def cases(variants: Sequence[Variant], options: Options) -> Iterator[Case]:
    """Yields the cases, those of the 4096 x 4096 layer first. Cases that share their weights follow each other."""
    for weights in options.weights:
        tokens = options.hot_tokens if weights == "hot" else (*options.tokens, *options.forward_tokens)
        yield from _cases(variants, MAIN, weights, (*tokens, None), options)
    for name in options.shapes:
        for weights in options.weights:
            if name != MAIN and weights in (options.weights[0], "graph"):
                yield from _cases(variants, name, weights, options.shape_tokens, options)


def _cases(
    variants: Sequence[Variant], shape: str, weights: str, all_tokens: Sequence[Optional[int]], options: Options
) -> Iterator[Case]:
    main = shape == MAIN
    for k, n in SHAPES[shape]:
        for tokens in all_tokens:
            for variant in variants:
                wanted = options.device in variant.devices and (main or variant.everywhere)
                if wanted and _has(variant, tokens, options) and (weights != "graph" or variant.graph):
                    yield _case(variant, tokens, k, n, weights, main, options)


def _has(variant: Variant, tokens: Optional[int], options: Options) -> bool:
    """Returns whether the variant is compared at ``tokens``. On a GPU forwards are compared at all of the run's."""
    if variant.tokens is None:
        return tokens is not None and tokens not in options.forward_tokens
    if options.device == "cuda" and None not in variant.tokens:
        return tokens is not None
    return tokens in variant.tokens


def _case(variant: Variant, tokens: Optional[int], k: int, n: int, weights: str, main: bool, options: Options) -> Case:
    def build() -> Comparison:
        compiles = main and (tokens is None or tokens in options.compile_tokens) and bool(options.compile_tokens)
        captured = weights == "graph"
        problem = Problem(tokens or 1, k, n, weights != "hot", device=options.device, captured=captured)
        return variant.build(problem, compiles and not captured)

    where = f"{k}->{n}" if tokens is None else f"T={tokens} {k}->{n}"
    return Case(variant.op, f"{where}, {variant.case}", tokens, k, n, weights, build)
