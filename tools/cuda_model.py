"""Computes the time of the CUDA kernels from docs/slots.tsv. Needs no GPU.

A pass over an activation takes the largest of these times:

    memory     the bytes that the pass moves / the bandwidth that a kernel reaches
    L2         the same bytes, and the bfloat16 terms of A and B that each tile reads again / the bandwidth of L2
    slots      the instructions of one of a tile's four warps, one in each cycle; each scheduler has one of these warps
    ALU, FMA   the ALU (FMA) instructions of one of the four warps, two cycles each
    tensor     the matrix products of the four warps, 2,048 multiplications each, at the rate of the tensor cores
    L1         the rows of 128 bytes that the four warps read and write, one in each cycle
    waits      the cycles of a warp that runs alone / the number of warps of a scheduler

The times of instructions, products and waits are those of the multiprocessor with the most thread blocks of the pass. A
wave is the set of thread blocks that run at the same time. Each wave after a pass's first wave adds the time in which a
block waits for its first tile and writes its sums. Each pass adds a microsecond for its launch, its first wave and its
last blocks.

docs/kernels.md shows the computed tables between two marks. ``--write`` writes the tables into docs/kernels.md, and a
test compares docs/kernels.md with the computed tables.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import slots

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/kernels.md"
LAUNCH = 2.5e-6  # Seconds that the model counts for a small kernel, nearly all of them for the launch.
PASS = 1e-6  # Seconds that the model adds to each pass for the launch, the first wave and the last blocks of the pass.
REACHED = 0.92  # Fraction of the memory bandwidth that a kernel reaches.
BLOCK_CYCLES = 1000  # Assumed number of cycles in which a block waits for its first tile and writes its sums.
BYTES = {"NF4": 0.516, "MXFP4": 0.531}  # Bytes of one weight in each packed format, scales included.
SIZES = (512, 2048, 4096, 8192)
MIXED_SIZES = (8, 512, 2048, 8192)  # numbers of tokens, of all adapters together, of a batch for several adapters


@dataclass(frozen=True)
class Card:
    """Rates of a GPU.

    clock: cycles per second. bandwidth: peak bytes per second of the GPU's memory. tensor: 16-bit multiplications of a
    multiprocessor's tensor cores in a cycle, with float32 sums (on a GeForce card half as many as with float16 sums).
    product: FLOP/s that a large matrix product reaches in practice. l2: bytes per second that L2 delivers, a rounded
    figure of published measurements that nobody has checked for this project. ideal: if True, a pass takes only the
    time to move the bytes of its activations, its weight and its adapters, a launch takes no time, and no partial sums
    and bfloat16 terms are moved.
    """

    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float
    tensor: int
    product: float
    l2: float
    ideal: bool = False

    @property
    def reached(self) -> float:
        """Bytes per second that a kernel moves to and from memory."""
        return self.bandwidth * REACHED

    @property
    def launch(self) -> float:
        """Seconds that the model counts for a small kernel."""
        return 0.0 if self.ideal else LAUNCH

    @property
    def overhead(self) -> float:
        """Seconds that each pass adds to the time of its work."""
        return 0.0 if self.ideal else PASS


# "H100 at 800" is an H100 whose matrix products reach 800 TFLOP/s and whose other kernels reach 3.0 TB/s. At these
# rates an adapter takes the largest part of the time.
CARDS = {
    "A100": Card("80", 108, 1.41e9, 2.04e12, 1024, 250e12, 4.0e12),
    "H100": Card("90", 132, 1.755e9, 3.35e12, 1300, 650e12, 5.5e12),
    "H100 at 800": Card("90", 132, 1.755e9, 3.0e12 / REACHED, 1300, 800e12, 5.5e12),
    "4090": Card("89", 128, 2.52e9, 1.008e12, 256, 150e12, 5.0e12),
}


def loops(card: Card) -> dict[str, dict[str, float]]:
    """Returns a dict from each loop's name to its numbers in docs/slots.tsv for a card's architecture, as floats."""
    found = {}
    for row in slots.read():
        if row["arch"] == card.arch:
            found[row["loop"]] = {name: float(value) for name, value in row.items() if value.replace(".", "").isdigit()}
    return found


def tile_cycles(loop: dict[str, float], card: Card) -> float:
    """Returns the cycles that a multiprocessor needs for a tile of 64 x 64 if the bandwidths of L2 and of memory are no
    limit."""
    products = loop["mma"] * 4 * 2048 / card.tensor
    # Number of warps of a scheduler: each block has one warp on each scheduler, unless `loop` gives another number.
    warps = loop.get("warps", loop["blocks"])
    return max(loop["slots"], 2 * loop["alu"], 2 * loop["fma"], products, 4 * loop["transactions"],
               loop["alone"] / warps)  # fmt: skip


def terms_of_tile(name: str, rank: int = 16) -> float:
    """Returns the bytes of small matrices, stored as bfloat16 terms, that a pass reads from L2 for each tile.

    Y0 is the low-rank term of Y with the bias, dX0 is the low-rank term of dX, and P is dY B. In the pass for S or dA,
    a tile reads three terms of one matrix. In the pass for Y0 or dX0, a tile reads two terms of two matrices. In the
    pass for P and dB, a block reads the three terms of one matrix once for four tiles, and the three terms of another
    matrix once; the function counts the two reads as half a matrix for each tile.
    """
    matrix = 64 * rank * 2.0  # bytes of one bfloat16 term of 64 rows of a small matrix (A, B, S or P)
    if name.startswith(("Y0", "dX0")):
        return 2 * 2 * matrix
    return 3 * matrix * (0.5 if name.startswith("P") else 1)


def over_tiles(
    name: str, rows: int, columns: int, moved: float, card: Card, work: str | None = None, *, count: int = 1,
    loop: dict[str, float] | None = None,
) -> float:  # fmt: skip
    """Returns the seconds of a pass over an activation [rows, columns] that moves ``moved`` bytes.

    ``work`` says how the pass is cut into blocks: as :func:`plan` cuts it, or with a block for each tile ("tiles").
    Without ``work``, all multiprocessors get equally many tiles in one wave of blocks. ``count``: number of layers that
    the pass computes from one read of the activation. ``loop``: the counts of a tile for one layer, in place of the
    counts in docs/slots.tsv.
    """
    if card.ideal:
        return moved / card.reached
    loop = loops(card)[name] if loop is None else loop
    tiles, waves = -(-rows // 64) * -(-columns // 64), 1
    busiest = tiles / card.multiprocessors
    if work is not None:
        blocks, of_block = (tiles, 1) if work == "tiles" else plan(rows, columns, work)[:2]
        busiest = -(-blocks // card.multiprocessors) * of_block
        waves = -(-blocks // (card.multiprocessors * int(loop["blocks"])))
    compute = busiest * count * tile_cycles(loop, card) / card.clock
    from_l2 = (moved + tiles * count * terms_of_tile(name)) / card.l2
    return max(compute, moved / card.reached, from_l2) + (waves - 1) * BLOCK_CYCLES / card.clock + card.overhead


def over_memory(moved: float, card: Card) -> float:
    return moved / card.reached + card.overhead


def product(t: int, n: int, k: int, card: Card) -> float:
    return 2 * t * n * k / card.product + PASS


def plan(t: int, columns: int, work: str) -> tuple[int, int, int]:
    """Returns the number of thread blocks of a rank pass, the largest number of tiles of a block, and the number of
    rows of the pass's partial sums. The function repeats the choice that csrc/linear/cuda/rank_plan.cuh makes for the
    kernels. ``work``: "rows" (the pass computes S), "columns" (dA) or "both" (P = dY B and dB).
    """
    row_tiles, column_tiles = -(-t // 64), -(-columns // 64)
    if work == "both":
        row_chunks = -(-row_tiles // 4)
        wide = -(-column_tiles // max(1, min(column_tiles, 384 // row_chunks)))
        column_chunks = -(-column_tiles // wide)
        return row_chunks * column_chunks, 4 * wide, column_chunks * t + row_chunks * columns
    across, tiles = (row_tiles, column_tiles) if work == "rows" else (column_tiles, row_tiles)
    of_block = -(-tiles // max(1, min(768 // across, -(-tiles // min(tiles, 2)))))
    chunks = -(-tiles // of_block)
    return across * chunks, of_block, chunks * (t if work == "rows" else columns)


def partial_sums(t: int, columns: int, rank: int, work: str, card: Card | None = None) -> float:
    """Returns the bytes of a rank pass's float32 partial sums, each of which is written once and read once; 0 for an
    ideal card."""
    return 0.0 if card is not None and card.ideal else 2 * 4.0 * plan(t, columns, work)[2] * rank


def parts(card: Card, t: int, n: int = 4096, k: int = 4096, rank: int = 16) -> dict[str, float]:
    """Returns a dict from each part of a training step to its computed seconds, for a step of a bf16 layer [n, k] with
    ``t`` tokens and a float32 adapter of rank ``rank``."""
    x, y, w = 2.0 * t * k, 2.0 * t * n, 2.0 * n * k
    rows, both, columns = (
        partial_sums(t, *of, card) for of in ((k, rank, "rows"), (n, rank, "both"), (k, rank, "columns"))
    )
    return {
        "product": product(t, n, k, card),
        "S": over_tiles("S", t, k, x + rows, card, "rows"),
        "S, dropout": over_tiles("S, dropout", t, k, x + rows, card, "rows"),
        "Y0": over_tiles("Y0", t, n, y, card),
        "P and dB": over_tiles("P and dB", t, n, y + both, card, "both"),
        "dA": over_tiles("dA", t, k, x + columns, card, "columns"),
        "dA, dropout": over_tiles("dA, dropout", t, k, x + columns + x / 16, card, "columns"),
        "dX0": over_tiles("Y0", t, k, x, card),
        "dX0, dropout": over_tiles("dX0, dropout", t, k, x + x / 16, card),
        "dequantize": over_memory(BYTES["NF4"] * n * k + w, card),
        "dequantize, MXFP4": over_memory(BYTES["MXFP4"] * n * k + w, card),
        "norm": over_tiles("W A and the norm", n, k, w + partial_sums(n, k, rank, "rows", card), card, "rows"),
        "P, dB and dg": over_tiles("P, dB and dg", t, n, 2 * y + both, card, "both"),
        "g in W or in dY": over_memory(2 * w if t > k else 2 * y, card),
        # If the output scale g scales W, a separate pass computes the gradient dg.
        "column pass, g and dg": over_memory(2 * w, card) + over_memory(2 * y, card) if t > k
                                 else over_memory(3 * y, card),
        "finish": over_memory(2 * y, card),
        "launch": card.launch,
        "launch by PyTorch": card.launch,
    }  # fmt: skip


# The parts of a layer's training step in addition to the frozen layer's two products. tests/ops/test_cuda_launches.py
# compares the numbers of launches with those of the kernels. "launch" is a small kernel of peft_ext: a kernel that
# splits matrices into terms or adds partial sums, and in DoRA also the kernels of A Aᵀ and of the norm. "launch by
# PyTorch" is a small kernel of PyTorch: three kernels compute DoRA's g and its gradient, two in the forward and one in
# the backward. The host draws the seed of a dropout, without a launch.
LAYERS: dict[str, list[str]] = {
    "LoRA": ["S", "Y0", "P and dB", "dA", "dX0", *["launch"] * 5],
    "LoRA, dropout": ["S, dropout", "Y0", "P and dB", "dA, dropout", "dX0, dropout", *["launch"] * 5],
    "QLoRA, dropout": ["S, dropout", "Y0", "P and dB", "dA, dropout", "dX0, dropout", "dequantize", "dequantize",
                       *["launch"] * 5],
    "DoRA": ["S", "Y0", "P, dB and dg", "dA", "dX0", "norm", "finish", "g in W or in dY", *["launch"] * 9,
             *["launch by PyTorch"] * 3],
    "IA3": ["finish", "column pass, g and dg", "launch"],
}  # fmt: skip


def ratio(method: str, card: Card, t: int, n: int = 4096, k: int = 4096) -> float:
    """Returns the time of a layer with the adapter ``method`` divided by the time of the frozen layer, forward and
    backward."""
    found = parts(card, t, n, k)
    frozen = 2 * found["product"]
    return (frozen + sum(found[part] for part in LAYERS[method])) / frozen


def ideal(card: Card) -> Card:
    """Returns ``card`` with ``ideal`` set. For this card, the functions of this module compute lower bounds of the
    times of all kernels with the same passes."""
    return replace(card, ideal=True)


def limit(method: str, card: Card, t: int, n: int = 4096, k: int = 4096) -> float:
    """Returns :func:`ratio` for the ideal card: a lower bound, because each pass takes only the time to move the bytes
    of the pass, and a launch takes no time."""
    return ratio(method, ideal(card), t, n, k)


def decode(card: Card, n: int, k: int, tokens: int, base: str = "NF4") -> float:
    """Returns the seconds of a linear layer's forward with few tokens over NF4 or MXFP4: one launch that reads W once.
    The launch that computes S for an adapter is not counted.
    """
    read = BYTES[base] * n * k
    if card.ideal:
        return (read + 2.0 * tokens * (n + k)) / card.reached
    names = {"NF4": ("NF4, T <= 8", "NF4, T <= 16"), "MXFP4": ("MXFP4, T = 1", "MXFP4, T <= 8")}[base]
    loop = loops(card)[names[tokens > (8 if base == "NF4" else 1)]]
    # Number of weights that one lane would decode if a single warp decoded all weights of a multiprocessor.
    weights = n * k / card.multiprocessors / 32
    schedulers, warps = 4, 2 * loop["blocks"]
    cycles = weights * max(loop["slots"] / schedulers, 2 * loop["alu"] / schedulers, loop["transactions"],
                           loop["alone"] / (schedulers * warps))  # fmt: skip
    return max(cycles / card.clock, read / card.reached) + 2 * PASS


def siblings(card: Card, t: int, k: int, count: int, columns: bool, dropout: bool, rank: int = 16) -> float:
    """Returns the seconds of the pass that computes S (with ``columns``: dA) of ``count`` layers with one input."""
    name = ("dA" if columns else "S") + " of siblings" + (", dropout" if dropout else "")
    # The rows of docs/slots.tsv for siblings count the instructions for three layers. A block of rank_siblings_kernel
    # has one warp for each layer, and with dropout 4 KiB of shared memory for each warp. The instructions that a tile
    # takes for one layer hardly depend on the number of layers.
    found = loops(card)[name]
    shared = int(found["shared"]) - (4096 * (3 - count) if dropout else 0)
    blocks = slots.resident_blocks(card.arch, 32 * count, int(found["registers"]), shared)
    loop = found | {"blocks": blocks, "warps": blocks * count / 4}
    work = "columns" if columns else "rows"
    moved = 2.0 * t * k + count * partial_sums(t, k, rank, work, card)
    moved += count * 2.0 * t * k / 16 if columns and dropout else 0.0
    return over_tiles(name, t, k, moved, card, work, count=count, loop=loop)


def gated(card: Card, t: int, k: int, columns: bool, dropout: bool, rank: int = 16) -> float:
    """Returns the seconds that the pass over a gated activation, which also computes S (with ``columns``: dA) of the
    layer behind the activation, takes beyond the activation's own pass. The activation's pass moves three times T x k
    elements in the forward and five times in the backward.
    """
    name = ("dA" if columns else "S") + " of a gated activation" + (", dropout" if dropout else "")
    work, own = "columns" if columns else "rows", (5 if columns else 3) * 2.0 * t * k
    whole = over_tiles(name, t, k, own + partial_sums(t, k, rank, work, card), card, work)
    return whole - over_memory(own, card)


# The adapted linear layers in a layer of Llama 3 8B, grouped by their input: for each group, the numbers of output
# features of the linear layers, and the number of input features.
LLAMA_LAYER = (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336))


LLAMA_HIDDEN = 14336  # width of h = act(gate) ∘ up, the input of the down projection


def llama_layer(card: Card, t: int, method: str, together: bool) -> float:
    """Returns the time of LLAMA_LAYER with adapters divided by its time without adapters, forward and backward. Both
    times leave out attention, rotary positions, norms, and the activation's forward and backward.

    Without adapters, separate passes add up the gradients dX that layers with one input return. With adapters and
    ``together``, no pass adds up gradients: one pass writes the sum of the low-rank terms of dX of all layers with one
    input, and each layer's product is added to this sum. With ``together``, one pass over x computes S of all layers
    with this input, another pass computes dA of all these layers, and each small kernel is launched once for all of
    them; the pass that computes h = act(gate) ∘ up also computes S of the down projection, and the pass that computes
    the gradients of gate and up also computes dA of the down projection. Without ``together``, the backward computes h
    again, because dA of the down projection needs h; this reads and writes three times T x LLAMA_HIDDEN elements.
    """
    frozen, adapted = 0.0, 0.0 if together else over_memory(3 * 2.0 * t * LLAMA_HIDDEN, card)
    drawn = "dX0, dropout" in LAYERS[method]
    of_method = ", dropout" if drawn else ""
    for outputs, k in LLAMA_LAYER:
        x, count = 2.0 * t * k, len(outputs)
        adds = (count - 1) * over_memory(3 * x, card)
        layers = [parts(card, t, n, k) for n in outputs]
        products = sum(2 * layer["product"] for layer in layers)
        frozen += products + adds
        low_rank = sum(layer[part] for layer in layers for part in LAYERS[method])
        if together and count > 1:
            low_rank -= sum(layer["dX0" + of_method] for layer in layers)
            moved = x * (1 + count / 16) if drawn else x
            low_rank += over_tiles("dX0 of a layer among several", t, k, moved, card, "tiles", count=count)
            adds = 0.0
            for part, columns in (("S", False), ("dA", True)):
                low_rank -= sum(layer[part + of_method] for layer in layers)
                low_rank += siblings(card, t, k, count, columns, drawn)
            small = LAYERS[method].count("launch") + LAYERS[method].count("launch by PyTorch")
            low_rank -= (count - 1) * small * card.launch
        elif together and k == LLAMA_HIDDEN:
            for part, columns in (("S", False), ("dA", True)):
                low_rank += gated(card, t, k, columns, drawn) - layers[0][part + of_method]
            # The pass for dX0 draws the mask, because the pass for dA, which would store the bits, comes later.
            if drawn:
                low_rank += over_tiles("dX0, drawn dropout", t, k, x, card) - layers[0]["dX0, dropout"]
        adapted += products + adds + low_rank
    return adapted / frozen


MANY_ROWS = 128  # from this mean number of rows of an expert on, PyTorch computes the product; kManyRows in csrc


def experts_product(card: Card, rows: int, active: int, n: int, k: int, base: str) -> float:
    """Returns the seconds of the product of [rows, k] with the weights of all experts that have rows; the rows of an
    expert are multiplied in tiles of up to 64 rows.
    """
    moved = (2.0 if base == "bf16" else 0.516) * active * n * k + 2.0 * rows * (n + k)
    grouped = base == "bf16" and rows >= MANY_ROWS * active
    if card.ideal:
        peak = 2.0 * card.tensor * card.multiprocessors * card.clock
        rate = card.product if grouped else max(card.product, peak)
        return max(2.0 * rows * n * k / rate, moved / card.reached)
    if grouped:
        onto = over_memory(4.0 * rows * n, card)
        return max(2.0 * rows * n * k / card.product, moved / card.reached) + onto + PASS
    loop = loops(card)["experts, Y" if base == "bf16" else "experts, NF4, Y"]
    tiles = active * -(-rows // active // 64)
    blocks, resident = tiles * -(-n // 128), card.multiprocessors * loop["blocks"]
    # A block multiplies a slab of 64 x 128 weights at a time, which is 32 weights for each lane of the block. A block
    # has two warps on each scheduler. If a tile has at most 32 rows, the kernel skips the second group of 32 rows,
    # which saves, for each weight of a lane, half of the products, 0.875 issue slots, and one transaction of 128 bytes.
    less = 0.5 if -(-rows // tiles) <= 32 else 1.0
    products = loop["mma"] * less
    slots, transactions = loop["slots"] - 1.75 * (1 - less), loop["transactions"] - 2 * (1 - less)
    slab = 32 * max(2 * slots, 4 * loop["alu"], 4 * loop["fma"], 2 * products * 4 * 2048 / card.tensor,
                    8 * transactions) * min(loop["blocks"], blocks / card.multiprocessors)  # fmt: skip
    waves = -(-blocks // resident)
    cycles = waves * -(-k // 64) * max(slab, 32 * loop["alone"])
    return max(cycles / card.clock, moved / card.reached) + 2 * PASS


# Numbers of launches of small kernels in a step of experts. "forward" and "backward" count kernels of peft_ext, which
# list the rows of each expert, split matrices into terms and add partial sums of S, P, dA and dB. DoRA adds a kernel
# for the terms of the norm, a kernel for the sums of dg, and PyTorch's kernels for g. tests/ops/test_cuda_launches.py
# compares the numbers with the launches of the kernels.
EXPERT_LAUNCHES = {"forward": 3, "backward": 5, "norm": 1, "dg": 1, "g, forward": 2, "g, backward": 1}


def experts(
    card: Card, rows: int, active: int, n: int, k: int, base: str = "bf16", dropout: bool = False, rank: int = 16,
    dora: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Returns the seconds of the forward and of the backward of experts [n, k] with LoRA (with ``dora``: with DoRA,
    whose norms are computed in the forward). The adapters are float32, and each expert gets equally many rows.
    """
    bandwidth, padded = card.reached, active * -(-rows // active // 64) * 64
    a, b = (4.0 * active * rank * size for size in (k, n))
    # `terms` is 0 for an ideal card, which moves no terms. A rank pass reads A or B as three bfloat16 terms, and a
    # product reads A or B as two: 1.5 times or once the bytes of the float32 matrix.
    terms = 0.0 if card.ideal else 1.0
    chunks = {size: max(1, min(768 // (padded // 64), -(-size // 64 // 2))) for size in (k, n)}
    sums = {size: terms * 2 * 4.0 * padded * rank * of for size, of in chunks.items()}
    drawn = ", dropout" if dropout else ""
    small = {name: count * card.launch for name, count in EXPERT_LAUNCHES.items()}

    def over(loop: str, columns: int, moved: float) -> float:
        return over_tiles(loop + drawn if loop + drawn in loops(card) else loop, padded, columns, moved, card)

    forward = small["forward"] + (a + b + terms * (a * 1.5 + b)) / bandwidth
    forward += over("S of experts", k, 2.0 * rows * k + terms * a * 1.5 + sums[k])
    forward += experts_product(card, rows, active, n, k, base)
    backward = small["backward"] + (b + a + terms * (b * 1.5 + a)) / bandwidth
    backward += over_tiles("S of experts", padded, n, 2.0 * rows * n + terms * b * 1.5 + sums[n], card)
    backward += over_tiles("dA of experts", padded, n, 2.0 * rows * n + terms * b, card)
    backward += over("dA of experts", k, 2.0 * rows * k + terms * a + (2.0 * rows * k / 16 if dropout else 0.0))
    # The last pass over partial sums reads these sums and writes dA and dB.
    backward += (a + b + terms * (a + b)) / bandwidth + experts_product(card, rows, active, k, n, base)
    backward += 2.0 * rows * k / 16 / bandwidth if dropout else 0.0  # the product for dX reads the mask's bits
    if dora:
        read = (2.0 if base == "bf16" else 0.516) * active * n * k
        norm = "the norm of experts" if base == "bf16" else "the norm of experts, NF4"
        forward += small["norm"] + small["g, forward"] + (a + b + terms * (a + b)) / bandwidth
        forward += over_tiles(norm, active * n, k, read + terms * (a + b) + 4.0 * active * n, card)
        forward += 2.0 * rows * n / bandwidth
        parts = terms * 4.0 * padded / 64 * n
        backward += over_memory(3 * 2.0 * rows * n + 2 * parts + 8.0 * active * n, card)
        backward += small["dg"] + small["g, backward"]
    return forward, backward


FEW = 64  # most tokens of a mixed batch for which kernels without tensor cores run; kGroupedFewTokens in csrc


def mixed(card: Card, t: int, adapters: int, base: str, n: int = 4096, k: int = 4096, rank: int = 16) -> float:
    """Returns the seconds of a mixed batch's forward with float32 adapters and equally many tokens for each adapter.
    With one adapter and more than FEW tokens, the result is the time of lora_linear.

    The model assumes that kernels read the adapters from memory, and the bfloat16 terms of the adapters from L2,
    because another kernel has written the terms just before.
    """
    a, b = (4.0 * adapters * rank * size for size in (k, n))
    if t <= FEW:
        # The kernels for few tokens read A and B once.
        adapter = 2 * card.launch + (a + b) / card.reached
        if base == "NF4":
            # The kernel that computes the product with NF4 weights also adds the low-rank term.
            return decode(card, n, k, t) + adapter - card.launch
        return product_of_few(t, n, k, card) + adapter
    tiles, name = (-(-t // 64), "") if adapters == 1 else (adapters * -(-(t // adapters) // 64), ", mixed batch")
    rows = tiles * 64
    # A kernel reads the adapters and writes three terms of A and two terms of B.
    terms = card.launch + (a + b if card.ideal else a * 2.5 + b * 2) / card.reached
    low_rank = [
        terms,
        over_tiles(f"S{name}", rows, k, 2.0 * t * k + partial_sums(rows, k, rank, "rows", card), card),
        card.launch,
        over_tiles(f"Y0{name}", rows, n, 2.0 * t * n, card),
    ]
    dequantized = over_memory(0.516 * n * k + 2.0 * n * k, card) if base == "NF4" else 0.0
    return product(t, n, k, card) + dequantized + sum(low_rank)


def product_of_few(t: int, n: int, k: int, card: Card) -> float:
    return max(product(t, n, k, card), over_memory(2.0 * n * k, card))


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds >= 1e-5 else f"{seconds * 1e6:.1f} µs"


def as_it_is(card: Card) -> Card:
    return card


def tables() -> str:
    """Returns the computed tables that docs/kernels.md shows."""
    lines = ["| 4096 x 4096, T = 8192 | " + " | ".join(CARDS) + " |", "|---" * (len(CARDS) + 1) + "|"]
    by_card = {name: parts(card, 8192) for name, card in CARDS.items()}
    for part in next(iter(by_card.values())):
        lines.append(f"| {part} | " + " | ".join(microseconds(by_card[name][part]) for name in CARDS) + " |")
    for base, tokens in (("NF4", 1), ("NF4", 16), ("MXFP4", 1), ("MXFP4", 8)):
        for name, of in ((f"{base}, T = {tokens}", as_it_is), (f"{base}, T = {tokens}: limit", ideal)):
            row = (microseconds(decode(of(card), 4096, 4096, tokens, base)) for card in CARDS.values())
            lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", "| time / the frozen layer's time, for T = | "
              + " | ".join(f"{c}, {t}" for c in CARDS for t in SIZES) + " |"]  # fmt: skip
    lines.append("|---" * (len(CARDS) * len(SIZES) + 1) + "|")
    for method in LAYERS:
        for name, of in ((method, ratio), (f"{method}: limit", limit)):
            row = (f"{of(method, card, t):.2f}" for card in CARDS.values() for t in SIZES)
            lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", "| time of a layer of Llama 3 8B / time of the frozen layer, for T = | "
              + " | ".join(f"{c}, {t}" for c in CARDS for t in SIZES) + " |"]  # fmt: skip
    lines.append("|---" * (len(CARDS) * len(SIZES) + 1) + "|")
    for method in ("LoRA", "LoRA, dropout", "QLoRA, dropout"):
        for how, together in (("each linear layer alone", False), ("layers together", True)):
            for name, of in ((f"{method}: {how}", as_it_is), (f"{method}: {how}: limit", ideal)):
                row = (f"{llama_layer(of(card), t, method, together):.2f}" for card in CARDS.values() for t in SIZES)
                lines.append(f"| {name} | " + " | ".join(row) + " |")
    sizes = (4096, 32768)
    lines += ["", "| time of a step of 128 experts 2048 -> 768, for rows = | "
              + " | ".join(f"{c}, {rows}" for c in CARDS for rows in sizes) + " |"]  # fmt: skip
    lines.append("|---" * (len(CARDS) * len(sizes) + 1) + "|")
    kinds: dict[str, dict[str, Any]] = {
        "LoRA": {}, "LoRA, dropout": {"dropout": True}, "QLoRA": {"base": "NF4"}, "DoRA": {"dora": True},
        "QDoRA": {"dora": True, "base": "NF4"},
    }  # fmt: skip
    for kind, how in (("frozen, bf16", None), *kinds.items()):
        for name, of in ((kind, as_it_is), (f"{kind}: limit", ideal)):
            row = []
            for card in map(of, CARDS.values()):
                for rows in sizes:
                    frozen = sum(experts_product(card, rows, 128, *nk, "bf16") for nk in ((768, 2048), (2048, 768)))
                    row.append(frozen if how is None else sum(experts(card, rows, 128, 768, 2048, **how)))
            lines.append(f"| {name} | " + " | ".join(map(microseconds, row)) + " |")
    few = (1, 8, 64)
    lines += ["", "| time of a forward of QLoRA, eight of 128 experts 2048 -> 1536, for T = | "
              + " | ".join(f"{c}, {t}" for c in CARDS for t in few) + " |"]  # fmt: skip
    lines.append("|---" * (len(CARDS) * len(few) + 1) + "|")
    active = {t: round(128 * (1 - (1 - 8 / 128) ** t)) for t in few}  # mean number of experts that have a row
    for name, of in (("LoRA over NF4", as_it_is), ("LoRA over NF4: limit", ideal)):
        row = [microseconds(experts(of(card), 8 * t, active[t], 1536, 2048, "NF4")[0])
               for card in CARDS.values() for t in few]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    columns = [(name, t) for name in CARDS for t in MIXED_SIZES]
    lines += ["", "| forward with eight adapters / forward with one adapter, for T = | "
              + " | ".join(f"{c}, {t}" for c, t in columns) + " |"]  # fmt: skip
    lines.append("|---" * (len(columns) + 1) + "|")
    for base in ("bf16", "NF4"):
        for name, of in ((f"over {base}", as_it_is), (f"over {base}: limit", ideal)):
            row = (f"{mixed(of(CARDS[c]), t, 8, base) / mixed(CARDS[c], t, 1, base):.2f}" for c, t in columns)
            lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


BEGIN, END = "<!-- computed by tools/cuda_model.py -->", "<!-- end of what is computed -->"


def page(text: str) -> str:
    """Returns the text of docs/kernels.md with new tables."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write them into {PAGE.relative_to(ROOT)}")
    if parser.parse_args(arguments).write:
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
