"""Runs every operator, and layers of real shapes, on a number of threads, and compares the bits with one thread's.

``test_threads.py`` starts this script:

    python tests/ops/threads.py 7               on 7 threads; the script prints the name of each case before its run
    python tests/ops/threads.py 7 --only TEXT   only the cases that have TEXT in their name
    python tests/ops/threads.py 7 --few         only the part of the cases that every test run has

A call with few tokens uses few threads, so there are shapes that use all threads and shapes that leave threads idle.
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
from battery import output_grad, run
from linear_cases import dora_case, ia3_case, lora_case
from op_db import CASES, DTYPES, Case, Sample, randn
from torch import Tensor

from peft_ext import _native, ops

# (shape of the tokens, K, N, R): less than a panel or a strip, odd sizes, few tokens with many columns, many panels,
# many tokens.
SHAPES = (
    ((3, 7), 65, 33, 5),
    ((131,), 515, 70, 8),
    ((17,), 36, 1031, 33),
    ((1,), 4160, 130, 2),
    ((2, 333), 96, 261, 24),
)
FEW_SHAPES = (((131,), 515, 70, 8), ((2, 333), 96, 261, 24))
# (K, N) of layers of SmolLM2-135M, and of layers whose K or N is larger than one part of the kernels' sum over K or N.
LAYERS = ((576, 192), (576, 576), (1536, 576), (576, 1536), (5217, 330), (330, 5217))
TOKENS = (777, 2048)
WITHOUT_PRODUCTS = ("norm", "activations", "dropout", "rotary", "attention")  # Operators without a matrix product.
QUANTIZED = ((4096, 1024), (11008, 512))  # Weights with so many scales that PyTorch would sum them on several threads.
# Whether the CPU path multiplies dense bfloat16 weights with peft_ext's tiles.
TILES = _native.STATE.isa in ("avx512_bf16", "amx", "amx_emulated")


@dataclass(frozen=True)
class Call:
    """A call of one case with one dtype and shape. The call's name is the seed of its values."""

    case: Case
    dtype: torch.dtype
    shape: tuple

    def __str__(self) -> str:
        (*tokens, k, n, r) = (self.shape[0], *self.shape[1:])
        return f"{self.case.name} {str(self.dtype).removeprefix('torch.')} T={tuple(*tokens)} {k}->{n} r={r}"

    @cached_property
    def sample(self) -> tuple[Sample, Tensor | None]:
        torch.manual_seed(zlib.crc32(str(self).encode()))
        shape = self.case.fit(self.shape)
        sample = self.case.make(self.dtype, shape)
        return sample, None if self.case.exact else output_grad(self.case, self.dtype, shape)

    def run(self, threads: int) -> dict[str, Tensor]:
        torch.set_num_threads(threads)
        return run(self.case.call, *self.sample)

    def differing(self, threads: int) -> list[str]:
        """Returns the value ("y") and gradients whose bits differ from those on one thread, and the largest
        difference.
        """
        many, one = self.run(threads), self.run(1)
        return [f"{name} by {(many[name].double() - one[name].double()).abs().max():.3g}"
                for name in one if name not in self.of_pytorch and not torch.equal(many[name], one[name])]  # fmt: skip

    @property
    def of_pytorch(self) -> tuple[str, ...]:
        """Names of the results that PyTorch's products compute, whose bits may depend on the number of threads."""
        if self.case.exact or self.case.op in WITHOUT_PRODUCTS:
            return ()
        if TILES and self.dtype == torch.bfloat16 and self.case.op != "bottleneck":
            # For fewer tokens than the tiles take, PyTorch computes the gradient of x over a dense weight. The bounds
            # are those of enough_tokens in csrc/linear/cpu/tiles/products.cpp.
            size = self.shape[1] * self.shape[2]
            if _native.STATE.isa == "avx512_bf16":
                fewest = 2 if size <= 2**20 else 8
            else:
                fewest = 17 if size <= 2**19 else 128
            few = torch.Size(self.shape[0]).numel() < fewest and isinstance(self.sample[0].inputs.get("weight"), Tensor)
            return ("x",) if few else ()
        # For one token the hidden gradient of a bottleneck adapter is a matrix-vector product of PyTorch.
        hidden = ("down_weight", "down_bias") if self.case.op == "bottleneck" and self.shape[0] == (1,) else ()
        return ("y", "x", *self.case.from_product, *hidden)


def _quantize(k: int, n: int) -> Case:
    """Returns a case that quantizes five weights.

    The offset of double quantization is a mean; for one weight in two, another order of the sum gives equal bits by
    luck.
    """

    def make(dtype: torch.dtype, shape: tuple) -> Sample:
        return Sample({f"weight{i}": randn(n, k, dtype=dtype, scale=0.02) for i in range(5)})

    def call(**weights: Tensor) -> Tensor:
        found = [ops.nf4_quantize(weight, 64, True).tensors().values() for weight in weights.values()]
        return torch.cat([part.reshape(-1).double() for parts in found for part in parts])

    return Case(name="nf4_quantize-64-nested", op="nf4", make=make, call=call, plain=call, oracle=call, exact=True)


def calls(few: bool = False) -> Iterator[Call]:
    for case in CASES:
        for dtype in (torch.bfloat16,) if few else DTYPES:
            yield from (Call(case, dtype, shape) for shape in (FEW_SHAPES if few else SHAPES))
    for k, n in QUANTIZED:
        yield from (Call(_quantize(k, n), dtype, ((), k, n, 0)) for dtype in ((torch.float32,) if few else DTYPES))
    layers = [lora_case(base) for base in ("dense", "nf4")]
    others = [dora_case("nf4"), dora_case("dense"), ia3_case("dense"), ia3_case("nf4")]
    for k, n in LAYERS:
        for tokens in TOKENS:
            for case in layers if few or tokens != TOKENS[0] else layers + others:
                for dtype in (torch.bfloat16,) if few else DTYPES:
                    yield Call(case, dtype, ((tokens,), k, n, 16))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("threads", type=int)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--few", action="store_true", help="bfloat16 alone, two shapes and the layers")
    parser.add_argument("--after", type=int, default=0, help="leave out so many, which have run")
    options = parser.parse_args()
    failed = count = 0
    for number, call in enumerate(call for call in calls(options.few) if options.only in str(call)):
        if number < options.after:
            continue
        print(f"{number} {call}", flush=True)
        count += 1
        if wrong := call.differing(options.threads):
            failed += 1
            print(f"differs on {options.threads} threads from 1: {call}: {', '.join(wrong)}", flush=True)
    # Each thread is a task of the process: fewer tasks than threads would mean that the threads were not started.
    tasks = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else options.threads
    print(f"{count} calls on {options.threads} threads, {tasks} in the process: {failed} differ")
    return int(bool(failed or not count or tasks < options.threads))


if __name__ == "__main__":
    sys.exit(main())
