"""Computes the cycles of causal attention in bfloat16 on a core with AMX, by tiles and by the vectors of AVX512-BF16.

    python tools/attention_costs.py            prints the table
    python tools/attention_costs.py --write    writes the table to docs/performance.md

No instruction is timed. The functions of this file have the same loops as csrc/attention (forward.h, backward.h,
product.h, product_amx.h), and add up the cycles of the instructions of one head. tests/native/test_attention_costs.py
compares the numbers of products, loads and stores with those that the kernels themselves make. The cycles are:

    tiles     the largest of three sums: 16 cycles for each product of 16 x 16 x 32, 8 for each loaded tile, and 16 for
              each stored tile
    vectors   half a cycle for each arithmetic instruction of 512 bits, dot products (vdpbf16ps) included; 64 cycles for
              a transposition of 16 x 16 words, one for each shuffle

FORWARD_SCORES and BACKWARD_SCORES are numbers of instructions in GCC 12's machine code of the loops over scores. In
this model no tile instruction runs at the same time as a vector instruction, and all operands are in L1.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/performance.md"
BEGIN, END = "<!-- computed: python tools/attention_costs.py -->", "<!-- /computed -->"
BLOCK, FORWARD_KEYS, BACKWARD_KEYS, ROWS, LANES = 64, 192, 128, {"avx512_bf16": 6, "amx": 32}, 16
PRODUCT, LOAD, STORE = 16, 8, 16  # Cycles of an AMX instruction that multiplies, loads or stores a tile.
FORWARD_SCORES, BACKWARD_SCORES = 15, 17  # Numbers of arithmetic instructions for a vector of 16 scores.
RATE = 2.0  # Number of arithmetic instructions of 512 bits that a core runs in a cycle.
TRANSPOSED = 64.0  # Cycles of a transposition of 16 x 16 words.
SIZES, TOKENS, GROUP = (64, 128), (1024, 4096), 4


@dataclass
class Cost:
    """The computed cycles of one attention head. ``products``: cycles of matrix products. ``scores``: cycles of softmax
    and its gradient. ``operands``: cycles in which operands are made and results are written. ``tiles``: numbers of AMX
    instructions that multiply, load and store tiles. ``amx``: whether the products run on AMX."""

    amx: bool
    products: float = 0.0
    scores: float = 0.0
    operands: float = 0.0
    tiles: dict[str, int] = field(default_factory=lambda: {"products": 0, "loads": 0, "stores": 0})

    def multiply(self, rows: int, vecs: int, depth: int, add: bool) -> None:
        """Adds the cycles of a product of [rows, depth] with [depth, 16 * vecs] to ``products``, and with AMX the
        product's tile instructions to ``tiles``. ``add``: whether the product is added to a stored result."""
        if not self.amx:
            self.products += rows * vecs * math.ceil(depth / 2) / RATE
            return
        for high in _parts(math.ceil(rows / 16), 2):
            for wide in _parts(vecs, 2):
                steps, sums = math.ceil(depth / 32), high * wide
                counted = {"products": steps * sums, "loads": steps * (high + wide) + add * sums, "stores": sums}
                for name, count in counted.items():
                    self.tiles[name] += count
                self.products += max(counted["products"] * PRODUCT, counted["loads"] * LOAD, sums * STORE)

    def transpose(self, rows: int, words: int) -> None:
        self.operands += math.ceil(rows / 16) * math.ceil(words / 16) * TRANSPOSED

    def join(self, rows: int, columns: int) -> None:
        """Adds the cycles in which pairs of bfloat16 rows are joined into rows of 32-bit words. A vector of 16 words
        takes four instructions: two conversions, a shift and an or."""
        self.operands += math.ceil(rows / 2) * math.ceil(columns / LANES) * 4 / RATE

    @property
    def total(self) -> float:
        return self.products + self.scores + self.operands


def _parts(count: int, most: int) -> list[int]:
    return [min(most, count - at) for at in range(0, count, most)]


def _first(key: int, query: int) -> int:
    """Returns the index of the first vector of 16 queries of which some query sees the key ``key``. The vectors are
    counted from the query ``query`` on, at which the block of queries begins."""
    return max(0, key - query) // LANES


def _multiply_seen(cost: Cost, rows: int, key: int, here: int, query: int, add: bool) -> None:
    """Counts the cycles of a product that sums over the keys of a block, as for the attention's output O or the
    gradient dq. In a block on the diagonal, 32 of the 64 queries are multiplied at a time, because the two halves of
    the queries see different numbers of keys."""
    together = 2 if key + here > query + 32 else BLOCK // LANES
    for vec in range(0, BLOCK // LANES, together):
        seen = max(0, min(here, query + (vec + together) * LANES - key))
        if seen or not add:
            cost.multiply(rows, together, seen, add)


def forward(tokens: int, size: int, amx: bool) -> Cost:
    """Counts the cycles of the forward of one head; ``tokens`` is a multiple of 64."""
    cost, rows = Cost(amx), ROWS["amx" if amx else "avx512_bf16"]
    for query in range(0, tokens, BLOCK):
        cost.transpose(BLOCK, size // 2)
        for key in range(0, query + BLOCK, FORWARD_KEYS):
            here = min(FORWARD_KEYS, query + BLOCK - key)
            for r in range(0, here, rows):
                cost.multiply(min(rows, here - r), BLOCK // LANES - _first(key + r, query), size, False)
            cost.scores += here * (BLOCK // LANES) * FORWARD_SCORES / RATE
            _multiply_seen(cost, size, key, here, query, False)
            if key > 0:  # to rescale O and add the block's product takes two loads and an FMA for each vector
                cost.operands += size * (BLOCK // LANES)
        cost.transpose(size, BLOCK)
    _copy(cost, tokens, size, rows=1, columns=1)
    return cost


def backward(tokens: int, size: int, amx: bool) -> Cost:
    cost, strip = Cost(amx), ROWS["amx" if amx else "avx512_bf16"]
    for query in range(0, tokens, BLOCK):
        for _ in "q", "dO":
            cost.transpose(BLOCK, size // 2)
            cost.join(BLOCK, size)
        for key in range(0, query + BLOCK, BACKWARD_KEYS):
            here = min(BACKWARD_KEYS, query + BLOCK - key)
            for r in range(0, here, strip):
                high, first = min(strip, here - r), _first(key + r, query)
                for _ in "S", "dP":
                    cost.multiply(high, BLOCK // LANES - first, size, False)
                cost.scores += high * (BLOCK // LANES - first) * BACKWARD_SCORES / RATE
                for _ in "dV", "dK":
                    cost.multiply(high, size // LANES, BLOCK - first * LANES, True)
            _multiply_seen(cost, size, key, here, query, key > 0)
        cost.transpose(size, BLOCK)
    _copy(cost, tokens, size, rows=2, columns=1)
    return cost


def _copy(cost: Cost, tokens: int, size: int, rows: int, columns: int) -> None:
    """Counts the cycles of a query head's share (1 / GROUP) of the copies of k and v, which GROUP query heads use. With
    AMX, k and v are also copied row by row; the model counts one cycle for the load and the store of 64 bytes."""
    own = Cost(cost.amx)
    for _ in range(columns):
        own.join(tokens, size)
        own.transpose(tokens // 2, size)
    if cost.amx:
        own.operands += rows * tokens * math.ceil(size / 32)
    cost.operands += own.operands / GROUP


def table() -> str:
    lines = [
        "| pass | head size | T | AVX512-BF16: products | AMX: products | softmax | operands | AVX512-BF16 / AMX |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, count in (("forward", forward), ("backward", backward)):
        for size in SIZES:
            for tokens in TOKENS:
                blocks = tokens // BLOCK
                seen = blocks * (blocks + 1) / 2
                plain, tiles = count(tokens, size, False), count(tokens, size, True)
                cells = [f"{value / seen:,.0f}" for value in (plain.products, tiles.products, tiles.scores,
                                                              tiles.operands)]  # fmt: skip
                lines.append(f"| {name} | {size} | {tokens} | {' | '.join(cells)} | {plain.total / tiles.total:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    if not parser.parse_args().write:
        print(table())
        return
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
