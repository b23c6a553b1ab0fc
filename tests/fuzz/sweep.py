"""Compares the values and gradients of random operator calls with the float64 reference (the shape sweep).

The sweep draws all public operators except those over experts, lora_linears, frozen_linear, linear_cross_entropy and
nf4_merge.

A seed determines a case: operator, options, dtypes, sizes, strides, blocksize, rank, number of threads, and one of the
CPU paths of this machine. T, K and N are at most 5,000, or one of the three is up to 200,000 and the other two are at
most 8. T may be 0. A failed case prints the command line that repeats the case.

    python tests/fuzz/sweep.py --cases 2000            cases from seed 0
    python tests/fuzz/sweep.py --minutes 60            from a seed of the clock; used by `make sweep`
    python tests/fuzz/sweep.py --seed 17 --isa avx2    one case
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # 128 threads that spin while waiting leave no time for work

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import row_cases
import torch
from battery import assert_part_close, output_grad, run, to_wide
from op_case import Options
from op_db import DTYPES, MODULES, Case, Sample
from torch import Tensor

from peft_ext import _native
from peft_ext.weights.nf4 import BLOCKSIZES

# Largest number of multiply-adds in one case's products, for which a case takes some hundredths of a second.
BUDGET, SMALL_BUDGET = 3e7, 2e5
MANY = 128  # Largest number of threads; 16 for small sizes.
SLOW, STDERR = 120.0, 2  # Seconds after which a running case is named, and the file descriptor for its name.
FEW = 64  # A result of at most FEW elements whose error is too large is judged by several draws.
EMULATED = "emulated CUDA"
CPU = torch.device("cpu")
LAYOUTS = ("contiguous", "contiguous", "transposed", "every other", "offset", "rows apart")


@dataclass(frozen=True)
class Drawn:
    """One case of the sweep without its values, which torch's generator draws from the same seed."""

    seed: int
    case: Case
    dtype: torch.dtype
    shape: tuple[tuple[int, ...], int, int, int]
    layouts: tuple[str, ...]
    isa: str
    threads: int
    small: bool

    def __str__(self) -> str:
        layouts = "" if set(self.layouts) == {"contiguous"} else f", {'/'.join(self.layouts)}"
        return (f"seed {self.seed}: {self.case.name} {str(self.dtype).removeprefix('torch.')} {self.shape}{layouts}, "
                f"{self.isa}, {self.threads} threads")  # fmt: skip

    def reproducer(self) -> str:
        """Returns the command that runs this case alone."""
        where = "--emulated" if self.isa == EMULATED else f"--isa {self.isa}{' --small' if self.small else ''}"
        return f"python tests/fuzz/sweep.py --seed {self.seed} {where}"


def _size(rng: random.Random, most: int) -> int:
    """Draws a size, uniformly in its logarithm, often at or beside a multiple of the kernels' block sizes."""
    size = round(most ** rng.random())
    if size > 16 and rng.random() < 0.5:
        unit = rng.choice([u for u in (8, 16, 32, 64, 128) if u <= size])
        size = size // unit * unit + rng.choice((-1, 0, 0, 1))
    return max(1, min(size, most))


def _threads(rng: random.Random, small: bool) -> int:
    """Draws one to four threads, or with a probability of 1/8 up to MANY threads, uniformly in the logarithm.

    MANY is more than most machines have cores.
    """
    return round((16 if small else MANY) ** rng.random()) if rng.random() < 0.125 else rng.choice((1, 1, 2, 2, 3, 4))


def _shape(rng: random.Random, small: bool, threads: int) -> tuple[tuple[int, ...], int, int, int]:
    """Draws (shape of the tokens, K, N, R) within the budget, which is smaller if many threads wait for each other."""
    most, most_r, budget = (300, 70, SMALL_BUDGET) if small else (5000, 512, BUDGET if threads <= 8 else BUDGET / 3)
    t, k, n, r = (_size(rng, m) for m in (most, most, most, most_r))
    if rng.random() < 0.1:  # one of T, K and N is huge, and the others are at most 8
        thin, huge = rng.randrange(3), _size(rng, 40 * most)
        t, k, n = (huge if i == thin else min(size, 8) for i, size in enumerate((t, k, n)))
        r = min(r, 8)
    while t * (k * n + r * (k + n)) + r * k * n > budget:  # r * k * n is the work of DoRA's norm
        largest = max(t, k, n, r)
        t, k, n, r = (max(1, size * 2 // 3) if size == largest else size for size in (t, k, n, r))
    if rng.random() < 0.02:
        t = 0
    kind = rng.choice(("flat", "flat", "matrix", "deep", "vector"))
    if kind == "vector" and t == 1:
        return (), k, n, r
    if kind in ("flat", "vector") or t < 2:
        return (t,), k, n, r
    outer = rng.choice([d for d in range(1, min(t, 12) + 1) if t % d == 0])
    return ((outer, t // outer) if kind == "matrix" else (1, outer, t // outer)), k, n, r


def makers(rng: random.Random) -> dict[str, Callable[[], Case]]:
    """Returns, by public operator, a function that makes a case with drawn options, from all modules in MODULES."""
    base = rng.choice(("dense", "nf4", "nested"))
    if base != "dense":
        base += f":{rng.choice(BLOCKSIZES)}"
    options = Options(
        rng, base, adapters=rng.choice((None, None, *DTYPES)), dropout=rng.choice((0.0, 0.0, 0.05, 0.1, 0.5, 0.9)),
        blocksize=rng.choice(BLOCKSIZES), nested=rng.random() < 0.5,
    )  # fmt: skip
    return {op: make for module in MODULES for op, make in module.drawn(options).items()}


def _case(rng: random.Random) -> Case:
    """Draws the case of an operator with options of its own."""
    weights = {"lora_linear": 4, "dora_linear": 4, "nf4_linear": 2, "grouped_lora_linear": 2}
    made = makers(rng)
    return made[rng.choices(list(made), [weights.get(op, 1) for op in made])[0]]()


def _attention(rng: random.Random, shape: tuple) -> tuple[Case, tuple]:
    """Draws attention with options of its own and a shape. The number of tokens keeps the scores within the budget, and
    keeps the gradients, which are differences of rounded sums, from being mostly rounding.
    """
    heads, kv_heads = rng.choice(((1, 1), (2, 1), (3, 3), (4, 2), (8, 1)))
    case = row_cases.attention_case(
        heads, kv_heads, rng.choice(("all", "causal", "causal", "padding", "documents", "bits")),
        more_keys=rng.choice((0, 0, 1, 70)), other_values=rng.choice((0, 0, 5)), odd=rng.random() < 0.3,
        contiguous=rng.random() < 0.3, dropout_p=rng.choice((0.0, 0.0, 0.1, 0.5)),
    )  # fmt: skip
    *batch, tokens = shape[0] or (16,)
    tokens = min(max(tokens, 16), 500)
    return case, ((*(min(size, 3) for size in batch), tokens), *shape[1:3], min(shape[3], 70))


def _away_from_zero(case: Case) -> Case:
    """Draws values until no input of a ReLU is so near 0 that rounding could choose the side of the kink."""

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        while True:
            sample = case.make(dtype, shape)
            x, weight, bias = (to_wide(sample).inputs[name] for name in ("x", "down_weight", "down_bias"))
            u = torch.nn.functional.linear(x, weight, bias)
            if not u.numel() or u.abs().min() > 1e-5:
                return sample

    return replace(case, make=make)


def draw(seed: int, isa: str | None = None, small: bool = False) -> Drawn:
    """Draws the case of ``seed``. The path is ``isa``, or one of this machine's paths in turn."""
    rng = random.Random(seed)
    case, threads = _case(rng), _threads(rng, small)
    shape = _shape(rng, small, threads)
    if case.op == "grouped_lora" and not shape[0]:
        shape = ((1,), *shape[1:])
    # With few columns, W and s B A may cancel in a row, and the row's norm, a sum of their products, then has few
    # correct digits. With one column, the bottleneck's whole gradient may cancel, and nothing is left to compare with
    # (see the shapes in op_db).
    few = {"dora": 8, "bottleneck": 2, "norm": 8}.get(case.op, 1)
    shape = (shape[0], max(shape[1], few), *shape[2:])
    if case.name.startswith("bottleneck_adapter-relu"):
        case, shape = _away_from_zero(case), ((min(torch.Size(shape[0]).numel(), 4096 // shape[3]),), *shape[1:])
    if seed % 13 == 7:
        case, shape = _attention(random.Random(~seed), shape)
    elif seed % 39 == 8:
        case = row_cases.dropout_case(rng.choice((0.1, 0.5, 2**-16, 0.999)))
    layouts = tuple(rng.choices(LAYOUTS, k=4)) if rng.random() < 0.5 else ("contiguous",) * 4
    dtype = rng.choice(DTYPES)
    isas = _native.STATE.module.isas()
    return Drawn(seed, case, dtype, shape, layouts, isa or isas[seed % len(isas)], threads, small)


def laid_out(value: Tensor, layout: str) -> Tensor:
    """Returns the same values with other strides, or at an address that is only a multiple of the element size."""
    if layout == "transposed" and value.dim() > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every other" and value.dim() > 0:
        return value.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "offset":
        return torch.cat([value.new_zeros(1), value.reshape(-1)])[1:].view(value.shape)
    if layout == "rows apart" and value.dim() > 1:
        between = float("nan") if value.is_floating_point() else -1
        wide = value.new_full((*value.shape[:-1], value.shape[-1] + 3), between)
        wide[..., : value.shape[-1]] = value
        return wide[..., : value.shape[-1]]
    return value


Parts = dict[str, Tensor]


def measure(drawn: Drawn, values: int, device: torch.device = CPU) -> tuple[Parts, Parts, Parts]:
    """Returns value and gradients of the operator on ``device``, and of plain PyTorch and of the reference on the CPU,
    for values of the seed ``values``.
    """
    case, dtype, shape = drawn.case, drawn.dtype, drawn.shape
    torch.manual_seed(values)
    sample = case.make(dtype, shape)
    layouts = itertools.cycle(drawn.layouts)
    moved = Sample({name: laid_out(value, next(layouts)) if isinstance(value, Tensor) else value
                    for name, value in sample.to(device).inputs.items()}, sample.grads)  # fmt: skip
    if case.exact:
        want = run(case.oracle, sample)
        return run(case.call, moved, keep_strides=True), want, want
    grad = output_grad(case, dtype, shape)
    got = run(case.call, moved, laid_out(grad.to(device), next(layouts)), keep_strides=True)
    assert (got["y"].dtype, tuple(got["y"].shape)) == case.result(dtype, shape), (got["y"].dtype, got["y"].shape)
    return got, run(case.plain, sample, grad), run(case.oracle, to_wide(sample), grad)


def check(drawn: Drawn, device: torch.device = CPU) -> None:
    """Raises AssertionError if the operator's error on ``device`` is above a bound that depends on plain PyTorch's
    error.

    An exact operator must give the reference's bits.

    The error of a result of at most FEW elements depends much on chance. If this error is too large, eight more draws
    of the values are made, and the bound must hold for all nine draws of the result together.
    """
    case, shape = drawn.case, drawn.shape
    got, plain, exact = measure(drawn, drawn.seed, device)
    if case.exact:
        got, want = got["y"], exact["y"]
        assert got.dtype == want.dtype and got.shape == want.shape, (got.dtype, got.shape)
        assert torch.equal(got, want), f"{(got != want).sum()} of {got.numel()} elements differ"
        return
    terms = max(*shape[1:], torch.Size(shape[0]).numel())  # terms of the longest sum over K, N, R or the tokens
    suspect = []
    for name in got:
        try:
            assert_part_close(name, got, plain, exact, terms, case.from_product)
        except AssertionError:
            if got[name].numel() > FEW:
                raise
            suspect.append(name)
    if suspect:
        draws = [(got, plain, exact)] + [measure(drawn, ~drawn.seed - (i << 24), device) for i in range(8)]
        pooled = [{name: torch.stack([parts[name] for parts in side]) for name in got}
                  for side in zip(*draws, strict=True)]  # fmt: skip
        for name in suspect:
            assert_part_close(name, *pooled, terms, case.from_product)


def sweep(seeds: Iterator[int] | range, *, isa: str | None = None, small: bool = False, until: float = float("inf"),
          verbose: bool = False) -> tuple[collections.Counter, list[str]]:  # fmt: skip
    """Returns counts by operator and path, and a report of every failure; stops at ``until`` (``time.monotonic``)."""
    module, before = _native.STATE.module, (torch.get_num_threads(), _native.STATE.isa)
    counts: collections.Counter = collections.Counter()
    failures: list[str] = []
    try:
        for seed in seeds:
            if time.monotonic() > until:
                break
            drawn = draw(seed, isa, small)
            if verbose:
                print(drawn, flush=True)
            if drawn.isa != EMULATED:
                module.set_isa(drawn.isa)
            torch.set_num_threads(drawn.threads)
            said = f"still running after {SLOW:g} s: {drawn}\n  {drawn.reproducer()}\n"
            slow = threading.Timer(SLOW, os.write, (STDERR, said.encode()))
            slow.start()
            try:
                check(drawn)
            except Exception as error:
                what = str(error).strip() or traceback.format_exc(limit=-1).strip().splitlines()[-1]
                failures.append(f"{drawn}\n  {type(error).__name__}: {what}\n  {drawn.reproducer()}")
                print(failures[-1], file=sys.stderr, flush=True)
            finally:
                slow.cancel()
            counts[drawn.case.name.partition("-")[0]] += 1
            counts[drawn.isa] += 1
            counts["cases"] += 1
    finally:
        torch.set_num_threads(before[0])
        module.set_isa(before[1])
    return counts, failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="one case, or where --cases and --minutes start")
    parser.add_argument("--cases", type=int, help="how many")
    parser.add_argument("--minutes", type=float, help="for how long")
    parser.add_argument("--isa", choices=_native.STATE.module.isas(), help="one CPU path; default: all in turn")
    parser.add_argument("--emulated", action="store_true", help="the CUDA kernels under the emulator, small sizes")
    parser.add_argument("--small", action="store_true", help="small sizes, as for the emulator")
    parser.add_argument("--verbose", action="store_true", help="say each case before it runs")
    args = parser.parse_args(arguments)
    if args.emulated:
        from conftest import _emulated_kernels

        kernels = _emulated_kernels()  # noqa: F841  held, because the operators last as long as this object
    many = args.cases is not None or args.minutes is not None
    start = args.seed if args.seed is not None else int(time.time()) * 10_000 if args.minutes else 0
    if not many and args.seed is None:
        args.cases, many = 2000, True
    count = args.cases if args.cases is not None else (sys.maxsize - start if many else 1)
    until = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    counts, failures = sweep(range(start, start + count), isa=EMULATED if args.emulated else args.isa,
                             small=args.small or args.emulated, until=until,
                             verbose=args.verbose or not many)  # fmt: skip
    total = counts.pop("cases", 0)
    print(f"{total} cases from seed {start}: {len(failures)} failed; "
          + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))  # fmt: skip
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
