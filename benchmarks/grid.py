"""Lists the cases of the benchmarks: each variant at layer shapes, numbers of tokens and kinds of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

from .harness import Case, Comparison
from .peers import Problem

MAIN = "4096"
# Numbers (K, N) of input and output features of linear layers of some models. Every run measures the shape MAIN, which
# is the square layer of Llama 3 8B.
SHAPES = {
    MAIN: ((4096, 4096),),
    "smollm2": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "1b": ((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)),
    "8b": ((4096, 1024), (4096, 14336), (14336, 4096)),
    "wide": ((4096, 14336),),
}


@dataclass(frozen=True)
class Variant:
    """A comparison of an operator in one case, which can be built for each layer shape and number of tokens.

    Attributes:
        build: a function ``(problem, compile) -> Comparison``.
        tokens: on a CPU, the numbers of tokens at which the variant is compared. None: the run's numbers of tokens.
            (None,): the operator has no tokens. On a GPU, a variant with a tuple of numbers is compared at every number
            of tokens of the run, ``forward_tokens`` of :class:`Options` included.
        everywhere: whether the variant is also compared at the models' shapes, and not only at 4096 x 4096.
        devices: devices on which the variant is compared.
        graph: whether a CUDA graph can hold the variant's calls, because they have no autograd.
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
    """The options that choose the cases of a run.

    Attributes:
        tokens, hot_tokens: numbers of tokens at 4096 x 4096 with rotating and with hot weights.
        shape_tokens: numbers of tokens at the models' shapes; a None in the sequence stands for operators without
            tokens.
        shapes: names in :data:`SHAPES` that are measured besides MAIN.
        weights: "rotating", "hot", or on a GPU "graph" (rotating weights, with the calls captured in a CUDA graph).
        compile_tokens: numbers of tokens at which torch.compile takes part at 4096 x 4096; each compilation takes
            seconds.
        device: "cpu" or "cuda".
        forward_tokens: additional numbers of tokens at 4096 x 4096 with rotating weights, only for variants whose
            ``Variant.tokens`` is not None.
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
    """Yields the cases of the 4096 x 4096 layer and then those of the models' shapes. Cases with the same weights
    follow each other."""
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
    """Returns whether the variant is compared at ``tokens`` tokens; None stands for operators without tokens."""
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
