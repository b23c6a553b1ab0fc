"""Calls operators on packed weights that lie between two pages of memory that the process may not read.

The program of test_bounds.py. A process of its own makes the calls, because a read beyond a part ends the process. The
program prints the name of each weight and CPU path before the calls. With the argument ``layouts``, the program calls
raw operators with layouts that do not describe the weight. With the argument ``beyond``, the program reads the byte
after a guarded tensor.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Union

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
from packed_weights import KINDS, fitting, packed_weight, stacked
from torch import Tensor

from peft_ext import _native, ops
from peft_ext.weights import PackedWeight, gguf

LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
HELD = []  # Mappings, which tensors use without owning them.
# Shapes (N, K): less than a step of a kernel; the last panel and the last step incomplete; more columns than a kernel
# decodes the scales of at a time.
SHAPES = ((1, 32), (7, 96), (33, 160), (139, 288), (3, 4352))
TOKENS = {torch.bfloat16: (1, 4, 7, 16, 33), torch.float32: (1, 33), torch.float16: ()}

GROUPS = (0, 1, 3, 24, 1 << 31)
OPTIONS = (0, 0x10, 0x40, 0xFF, 0xFFFFF, 0x7FFFFF)


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


def changed_layouts(layout: int) -> Iterator[tuple[str, int]]:
    """Yields the layout with other groups and with other options."""
    for group in GROUPS:
        yield f"group {group}", layout & ~0xFFFFFFFF | group
    for option in OPTIONS:
        yield f"option {option:#x}", layout & (1 << 40) - 1 | option << 40


def outcome(call: Callable[[], Tensor]) -> Union[str, Tensor]:
    """Returns the bits of a call's result, or the call's error."""
    try:
        return call().view(torch.int32)
    except RuntimeError as error:
        return str(error).partition("\n")[0]


def layouts() -> int:
    """Compares the outcomes of calls on parts in three places. An operator that computes anything with a layout that
    does not describe the parts reads within the parts, and fills its result."""
    torch.set_num_threads(1)
    module, counts, draw = _native.STATE.module, Counter(), torch.Generator().manual_seed(7)
    dequantize, linear = torch.ops.peft_ext.nf4_dequantize, torch.ops.peft_ext.nf4_linear
    for kind in KINDS:
        weight = packed_weight(kind, *fitting(kind, 40, 96), draw)
        *parts, layout, shape = weight.op_args()
        places = [parts, *([part if part is None else guarded(part, end) for part in parts] for end in (True, False))]
        x = torch.randn(2, weight.shape[1], generator=draw)
        for path in module.isas():
            module.set_isa(path)
            for name, changed in changed_layouts(layout):
                print(f"{kind}, {path}, {name}", flush=True)
                found = [outcome(lambda: dequantize(*at, changed, shape, torch.float32)) for at in places]  # noqa: B023
                product = [outcome(lambda: linear(x, *at, changed, shape, None)) for at in places]  # noqa: B023
                for op, (first, *others) in (("nf4_dequantize", found), ("nf4_linear", product)):
                    if isinstance(first, str):
                        right = f"{op}: " in first and others == [first] * 2
                        counts["refused"] += 1
                    else:
                        right = all(isinstance(other, Tensor) and torch.equal(first, other) for other in others)
                        counts["computed"] += 1
                    if not right:
                        counts["wrong"] += 1
                        print(f"wrong: {kind}, {path}, {name}, {op}: {first}, {others}")
        del places
        HELD.clear()
    print(f"{counts['refused']} refused, {counts['computed']} computed, {counts['wrong']} wrong")
    return int(bool(counts["wrong"]))


if __name__ == "__main__":
    if sys.argv[1:] == ["beyond"]:
        ctypes.string_at(guarded(torch.zeros(100, dtype=torch.uint8), True).data_ptr() + 100, 1)
    status = layouts() if sys.argv[1:] == ["layouts"] else main()
    sys.stdout.flush()
    os._exit(status)  # pages without access stay mapped until the end of the process
