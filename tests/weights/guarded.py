"""Calls operators on packed weights that lie between two pages of memory that the process may not read.

The program of test_bounds.py. A process of its own makes the calls, because a read beyond a part ends the process. The
program prints the name of each weight and CPU path before the calls. With the argument ``beyond``, the program reads
the byte after a guarded tensor.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
from packed_weights import KINDS, fitting, packed_weight, stacked
from torch import Tensor

from peft_ext import _native, ops
from peft_ext.weights import PackedWeight, gguf

LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
HELD = []  # mappings, which tensors use without owning them
# (N, K): less than a step of a kernel, the last panel and the last step incomplete, more columns than a kernel decodes
# scales of at a time.
SHAPES = ((1, 32), (7, 96), (33, 160), (139, 288), (3, 4352))
TOKENS = {torch.bfloat16: (1, 4, 7, 16, 33), torch.float32: (1, 33), torch.float16: ()}


def guarded(part: Tensor, at_end: bool) -> Tensor:
    """Returns a copy of a tensor between two pages without access: the copy ends where the second page begins, or
    begins where the first page ends."""
    part = part.contiguous()
    size = part.numel() * part.element_size()
    middle = -(-size // PAGE) * PAGE
    mapping = mmap.mmap(-1, middle + 2 * PAGE)
    HELD.append(mapping)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for page in (address, address + PAGE + middle):
        if LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (middle - size if at_end else 0)
    copy = torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=offset) if size else torch.empty(0)
    return copy.view(part.dtype).view(part.shape).copy_(part)


def guarded_weight(weight: PackedWeight, at_end: bool) -> PackedWeight:
    parts = [None if part is None else guarded(part, at_end) for part in weight.parts]
    return PackedWeight(weight.format, parts, weight.shape, weight.dtype, group=weight.group, option=weight.option,
                        stacked=weight.stacked)  # fmt: skip


def calls(weight: PackedWeight) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and the results of all calls."""
    *experts, n, k = weight.shape
    draw = torch.Generator().manual_seed(3)
    for dtype, counts in TOKENS.items():
        yield f"dequantize to {dtype}", weight.dequantize(dtype)
        lora_A, lora_B = (torch.randn(shape, generator=draw).to(dtype) for shape in ((4, k), (n, 4)))
        for tokens in counts:
            x = torch.randn(tokens, k, generator=draw).to(dtype).requires_grad_()
            if experts:
                offsets = torch.tensor([tokens // 2, tokens])
                yield f"experts, {dtype}, T={tokens}", ops.experts_linear(x.detach(), weight, offsets)
                continue
            yield f"product, {dtype}, T={tokens}", ops.frozen_linear(x.detach(), weight)
            y = ops.lora_linear(x, weight, lora_A, lora_B)
            yield f"LoRA, {dtype}, T={tokens}", y.detach()
            yield f"gradient, {dtype}, T={tokens}", torch.autograd.grad(y.sum(), x)[0]
            if dtype == torch.bfloat16:
                indices = torch.arange(n - 1, n - 1 - tokens, -1).clamp(min=0)
                yield f"embedding, T={tokens}", ops.lora_embedding(indices, weight, lora_B.t(), lora_A.t())


def weights() -> Iterator[tuple[str, PackedWeight]]:
    draw = torch.Generator().manual_seed(7)
    for n, k in SHAPES:
        for kind in KINDS:
            yield f"{kind} {n}x{k}", packed_weight(kind, *fitting(kind, n, k), draw)
        yield f"MXFP4 {n}x{k}", gguf.gguf_weight(torch.randint(100, 127, (n, k // 32 * 17), dtype=torch.uint8), "MXFP4")
        for nested in (False, True):
            yield f"NF4 {n}x{k}", ops.nf4_quantize(torch.randn(n, k), 64, nested)
    for kind in KINDS:
        yield f"{kind}, two experts", stacked([packed_weight(kind, *fitting(kind, 33, 160), draw) for _ in range(2)])


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module, count, wrong = _native.STATE.module, 0, 0
    for of_weight, weight in weights():
        places = [guarded_weight(weight, at_end) for at_end in (True, False)]
        for path in module.isas():
            print(f"{of_weight}, {path}", flush=True)
            module.set_isa(path)
            for (name, want), *found in zip(*map(calls, (weight, *places)), strict=True):
                count += 1
                if not all(torch.equal(want, got) for _, got in found):
                    wrong += 1
                    print(f"differs: {of_weight}, {path}, {name}")
        del places
        HELD.clear()
    print(f"{count} calls, {wrong} differ")
    return int(bool(wrong))


if __name__ == "__main__":
    if sys.argv[1:] == ["beyond"]:
        ctypes.string_at(guarded(torch.zeros(100, dtype=torch.uint8), True).data_ptr() + 100, 1)
    status = main()
    sys.stdout.flush()
    os._exit(status)  # pages without access stay mapped until the end of the process
