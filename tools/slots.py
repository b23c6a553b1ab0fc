"""Lists the hot loops of the CUDA kernels, and counts the instructions of each loop, per tile or per weight.

``HOT`` names the loops. cuda_check.py measures the loops in the compiled code and compares the counts with
docs/slots.tsv; cuda_model.py computes the time of the kernels from docs/slots.tsv.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs/slots.tsv"
# NOTE ends the first line of docs/slots.tsv.
NOTE = ("In loops over tiles of 64 x 64, the counts are those of one of the four warps that share a tile: "
        "all four warps together take four times as many")  # fmt: skip
# For each architecture, how many threads, kilobytes of shared memory and blocks a multiprocessor holds at most. Each
# multiprocessor has 65,536 registers. A block takes 1 KB of shared memory more than the kernel declares.
ARCHS = {
    "80": (2048, 164, 32), "86": (1536, 100, 16), "89": (1536, 100, 24), "90": (2048, 228, 32), "100": (2048, 228, 32),
    "120": (1536, 100, 24),
}  # fmt: skip
COLUMNS = ("loop", "arch", "slots", "alu", "fma", "mma", "memory", "uniform", "transactions", "load to use", "alone",
           "registers", "stack", "shared", "blocks")  # fmt: skip


@dataclass(frozen=True)
class Hot:
    """A kernel's hot loop, whose instructions are counted.

    ``kernel``: the kernel's demangled name and template arguments. ``units``: the number of tiles, of a lane's weights,
    or of rows in an iteration; the counts are divided by this number. ``trips``: how often an inner loop with products
    runs in an iteration. ``threads``: number of threads of a block. ``fmas``: whether the kernel multiplies by FMA
    instructions and not on tensor cores. ``others``: how often each inner loop without products runs in an iteration.
    ``dynamic``: bytes of shared memory that the launch asks for in addition to the kernel's own.
    """

    name: str
    kernel: str
    units: int = 1
    trips: int = 1
    threads: int = 128
    fmas: bool = False
    others: tuple[int, ...] = ()
    dynamic: int = 0


def _pass(name: str, ranks: int, work: str, mask: str = "kNone", *, terms: int = 3, nf4: bool = False) -> Hot:
    both = work in ("kBoth", "kBothAndDots")
    return Hot(
        name,
        f"rank_pass_kernel<bf16, {str(nf4).lower()}, true, {ranks // 8}, {terms}, {work}, {mask}>",
        units=4 if both else 1, trips=2 if both or ranks > 16 else 1,
    )  # fmt: skip


def _runs(name: str, work: str, mask: str = "kNone", *, terms: int = 3) -> Hot:
    return Hot(name, f"rank_pass_kernel<bf16, false, true, 2, {terms}, {work}, {mask}>")


def _siblings(name: str, ranks: int, columns: bool, dropped: bool, *, terms: int = 3) -> Hot:
    # The counted loop of rank_siblings_kernel is the loop for three layers with one input. In an iteration a warp
    # computes a whole tile of its layer (with 32 ranks: half of a tile). The counts are divided by 4 (with 32 ranks: by
    # 2), as if four warps shared a tile. A thread copies every twelfth row of a tile of x (with 32 ranks: every 24th
    # row). An iteration of the inner loop that draws the dropout mask covers 16 rows.
    warps = 3 if ranks == 16 else 6
    copies, draws = -(-64 // (4 * warps)), (2, 2) if ranks == 16 else (2,)
    return Hot(
        name, f"rank_siblings_kernel<bf16, {ranks // 8}, {terms}, {str(columns).lower()}, {str(dropped).lower()}>",
        units=12 // warps, threads=warps * 32, others=(copies, *draws) if dropped else (copies,),
        dynamic=8192 * (2 if dropped else 4) + (4096 * warps if dropped else 0),
    )  # fmt: skip


def _gated(name: str, columns: bool, dropped: bool) -> Hot:
    # The instance for SiLU. The inner loop without products computes one row of each thread's four rows of a tile.
    return Hot(
        name, f"rank_gated_kernel<bf16, 2, 3, {str(columns).lower()}, {str(dropped).lower()}, true>", others=(4,)
    )


def _product(name: str, nf4: bool, order: str) -> Hot:
    # Instructions are counted per weight of a lane: in an iteration of experts_product_kernel, each lane decodes or
    # loads 64 weights of two slabs of 64 x 128 weights, and multiplies the 64 weights with 64 rows.
    return Hot(name, f"experts_product_kernel<bf16, {str(nf4).lower()}, {order}>", units=64, threads=256)


def _expand(name: str, steps: int, work: str, *, terms: int = 2) -> Hot:
    return Hot(name, f"expand_kernel<bf16, {steps}, {terms}, {work}>")


# The hot loops have bf16 activations and float32 adapters of rank 16 unless the name says otherwise. A tile is 64 x 64.
HOT = (
    _pass("S", 16, "kRows"),
    _pass("S, dropout", 16, "kRows", "kDrawn"),
    _pass("S, bf16 adapter", 16, "kRows", terms=1),
    _pass("S, dropout, bf16 adapter", 16, "kRows", "kDrawn", terms=1),
    _pass("S, R = 32", 32, "kRows"),
    _pass("S, R = 64", 64, "kRows"),
    _pass("S, R = 128", 128, "kRows"),
    _pass("S, dropout, R = 128", 128, "kRows", "kDrawn"),
    _pass("S, mixed batch", 16, "kGroupedRows"),
    _pass("S, mixed batch, bf16 adapters", 16, "kGroupedRows", terms=1),
    _pass("S, mixed batch, R = 64", 64, "kGroupedRows"),
    _pass("P and dB", 16, "kBoth"),
    _pass("P and dB, R = 32", 32, "kBoth"),
    _pass("P, dB and dg", 16, "kBothAndDots"),
    _pass("dA", 16, "kColumns"),
    _pass("dA, dropout", 16, "kColumns", "kKept"),
    _pass("dA, dropout, R = 64", 64, "kColumns", "kKept"),
    _pass("dA, dropout, R = 128", 128, "kColumns", "kKept"),
    _siblings("S of siblings", 16, False, False),
    _siblings("S of siblings, dropout", 16, False, True),
    _siblings("S of siblings, dropout, bf16 adapter", 16, False, True, terms=1),
    _siblings("S of siblings, dropout, R = 32", 32, False, True),
    _siblings("dA of siblings", 16, True, False),
    _siblings("dA of siblings, dropout", 16, True, True),
    _siblings("dA of siblings, dropout, R = 32", 32, True, True),
    _gated("S of a gated activation", False, False),
    _gated("S of a gated activation, dropout", False, True),
    _gated("dA of a gated activation", True, False),
    _gated("dA of a gated activation, dropout", True, True),
    _pass("W A and the norm", 16, "kRowsAndSquares"),
    _pass("W A and the norm, NF4", 16, "kRowsAndSquares", nf4=True),
    _runs("S of experts", "kRunRows"),
    _runs("S of experts, dropout", "kRunRows", "kDrawn"),
    _runs("S of experts, bf16 adapter", "kRunRows", terms=1),
    _runs("dA of experts", "kRunColumns"),
    _runs("dA of experts, dropout", "kRunColumns", "kKept"),
    _product("experts, Y", False, "kAlong"),
    _product("experts, dX", False, "kAcross"),
    _product("experts, NF4, Y", True, "kAlong"),
    _product("experts, NF4, dX", True, "kAcross"),
    # An iteration of experts_norm_kernel computes a tile of 64 x 64 of one expert's weight W.
    Hot("the norm of experts", "experts_norm_kernel<bf16, false, true>"),
    Hot("the norm of experts, NF4", "experts_norm_kernel<bf16, true, true>"),
    # In an iteration of scale_runs_kernel, a warp computes two rows, and each lane eight columns of each row.
    Hot("g dY and dg of experts", "scale_runs_kernel<bf16, true>", units=2, threads=256),
    _expand("Y0", 1, "kBias"),
    _expand("Y0, bf16 adapter", 1, "kBias", terms=1),
    _expand("Y0, R = 32", 2, "kBias"),
    _expand("Y0, mixed batch", 1, "kGrouped"),
    _expand("Y0, mixed batch, bf16 adapters", 1, "kGrouped", terms=1),
    _expand("dX0, dropout", 1, "kMask"),
    _expand("dX0, dropout, R = 32", 2, "kMask"),
    _expand("dX0, drawn dropout", 1, "kDrawn"),
    # An iteration of expand_sum_kernel adds the term of one of the layers that share an input.
    Hot("dX0 of a layer among several", "expand_sum_kernel<bf16, 2>"),
    # Instructions are counted per weight of a lane: in an iteration of nf4_few_tokens_kernel, a warp multiplies four
    # slabs of 16 x 64 weights, 128 weights for each lane.
    Hot("NF4, T <= 8", "nf4_few_tokens_kernel<bf16, 1, true>", units=128, threads=256),
    Hot("NF4, T <= 16", "nf4_few_tokens_kernel<bf16, 2, true>", units=128, threads=256),
    # In an iteration of nf4_skinny_kernel, a warp multiplies a slab of 32 x 64 weights, 64 weights for each lane.
    Hot("NF4, T <= 32", "nf4_skinny_kernel<bf16, 4>", units=64),
    Hot("NF4, T <= 64", "nf4_skinny_kernel<bf16, 8>", units=64),
    # In an iteration of packed_few_tokens_kernel, a lane multiplies 8 columns of 4 rows of W.
    Hot("MXFP4, T = 1", "packed_few_tokens_kernel<2, bf16, 1>", units=32, fmas=True),
    Hot("MXFP4, T <= 8", "packed_few_tokens_kernel<2, bf16, 8>", units=32, fmas=True),
)


def kernel_name(demangled: str) -> str:
    """Returns a kernel's name and template arguments, such as ``rank_pass_kernel<bf16, kRows>``, without the return
    type, the namespace and the arguments. Names of enumerators replace their numbers.
    """
    name = re.sub(r"^void |\bpeft_ext::|\([^()]*\)$", "", demangled)
    for enum, values in enumerators().items():
        name = re.sub(rf"\({enum}\)(\d+)", lambda found: values[int(found[1])], name)  # noqa: B023
    return name


@functools.cache
def enumerators() -> dict[str, list[str]]:
    """Returns a dict from each enum class of csrc's .cuh files to the list of the names of its values, in order.
    Demangled names of kernels contain the numbers of the values."""
    found = {}
    for path in sorted((ROOT / "csrc").rglob("*.cuh")):
        for name, values in re.findall(r"enum class (\w+)(?: : \w+)? \{([^}]*)\}", path.read_text()):
            found[name] = re.findall(r"\bk\w+", re.sub(r"//[^\n]*", "", values))
    return found


def resident_blocks(arch: str, threads: int, registers: int, shared: int) -> int:
    """Returns the number of a kernel's blocks that a multiprocessor can hold at a time."""
    most_threads, kilobytes, most_blocks = ARCHS[arch]
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // (of_warp * (threads // 32))
    by_shared = kilobytes * 1024 // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, most_threads // threads, most_blocks)


def measure(hot: Hot, arch: str, instructions: list[sass.Instruction], used: dict[str, int]) -> dict[str, str]:
    """Returns the row of docs/slots.tsv for a hot loop. ``used``: the registers, the bytes of the stack and the bytes
    of shared memory, as ptxas reports them."""
    loop = sass.hot_loop(instructions, hot.trips, hot.fmas, hot.others)
    used = used | {"shared": used["shared"] + hot.dynamic}
    load_to_use = loop.load_to_use()
    counts = {"slots": len(loop.instructions), "transactions": loop.transactions, "alone": loop.cycles_alone()}
    counts |= {pipe: loop.count(pipe) for pipe in ("alu", "fma", "mma", "memory", "uniform")}
    row = {name: f"{count / hot.units:.4g}" for name, count in counts.items()}
    blocks = resident_blocks(arch, hot.threads, used["registers"], used["shared"])
    row |= {"loop": hot.name, "arch": arch, "load to use": "-" if load_to_use is None else str(load_to_use)}
    return row | {name: str(value) for name, value in used.items()} | {"blocks": str(blocks)}


def table(rows: Iterable[dict[str, str]]) -> str:
    """Returns the text of docs/slots.tsv without its first line, with the rows in the order of HOT and of the
    architectures."""
    order = [hot.name for hot in HOT]
    found = sorted(rows, key=lambda row: (order.index(row["loop"]), int(row["arch"])))
    lines = ["\t".join(COLUMNS), *("\t".join(row[name] for name in COLUMNS) for row in found)]
    return "\n".join(lines) + "\n"


def read() -> list[dict[str, str]]:
    """Returns the rows of docs/slots.tsv. The first line, which names the compiler and the unit, is left out."""
    with TABLE.open() as file:
        next(file)
        return list(csv.DictReader(file, delimiter="\t"))
