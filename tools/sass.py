"""Analyses the machine code of a kernel: the warp instructions of the kernel's hot loop, by pipe, and the loop's waits.

nvdisasm prints a kernel's instructions. The hot loop of a kernel is the loop with the most matrix products; of several
such loops, the longest. If no loop has a product, the whole kernel counts as the hot loop. The instructions of an inner
loop with products are counted ``trips`` times. For a kernel that multiplies by FMAs, the products are its FFMA
instructions. Each instruction takes one issue slot of a warp.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# For each pipe of the GPU, the beginnings of the names of its instructions; the first match counts. Most instructions
# whose names start with U run on the uniform datapath.
PIPES = (
    ("mma", r"HMMA|IMMA|HGMMA"),
    ("control", r"BRA|EXIT|NOP|BSSY|BSYNC|WARPSYNC|LDGDEPBAR|DEPBAR|BAR|ERRBAR|CALL|RET|YIELD|BREAK|PLOP3|UPLOP3"),
    ("uniform", r"U(?!.*MMA)|R2UR|S2UR|CS2UR|REDUX"),
    ("memory", r"LD|ST|ATOM|RED|SHFL|S2R|MEMBAR|CCTL"),
    ("fma", r"IMAD|FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2|CS2R"),
    ("special", r"MUFU|I2F|F2I|F2F\.|POPC|FLO|BREV|I2I"),
    ("alu", r""),
)  # fmt: skip


@dataclass
class Instruction:
    address: int
    name: str
    operands: str
    target: int | None = None  # the address to which a branch jumps; None for other instructions

    @property
    def pipe(self) -> str:
        return next(pipe for pipe, pattern in PIPES if re.match(pattern, self.name))

    def _operands(self) -> tuple[list[str], list[str]]:
        """Returns the operands that an instruction writes, and the operands that the instruction reads. Stores,
        branches, barriers and comparisons count as instructions that write no register.
        """
        parts = [part.strip() for part in re.split(r",(?![^\[]*\])", self.operands)] if self.operands else []
        if self.name.startswith(("ST", "LDGSTS", "BRA", "BAR", "EXIT", "RED", "DEPBAR", "ISETP", "FSETP", "PLOP3")):
            return [], parts
        written = 1
        while written < len(parts) and re.fullmatch(r"U?P\w+", parts[written - 1]):
            written += 1
        return parts[:written], parts[written:]

    @property
    def _width(self) -> int:
        """Returns the number of registers of the instruction's result."""
        if self.pipe == "mma" or re.search(r"\.128|LDSM.*\.4", self.name):
            return 4
        return 2 if re.search(r"\.64|\.WIDE", self.name) else 1

    @cached_property
    def writes(self) -> set[int]:
        found = [int(r) for part in self._operands()[0] for r in re.findall(r"\bR(\d+)\b", part)]
        return {register + k for register in found for k in range(self._width)}

    @cached_property
    def reads(self) -> set[int]:
        found: set[int] = set()
        for position, part in enumerate(self._operands()[1]):
            # A matrix product reads four, two and four registers for its three operands. A store of 128 bits reads four
            # registers for the stored value.
            span = (4, 2, 4)[min(position, 2)] if self.pipe == "mma" else 1
            if self.name.startswith(("STG", "STS")) and not part.startswith(("[", "desc")):
                span = self._width
            for register in re.findall(r"\bR(\d+)(?:\.\w+)?\b", part):
                found |= {int(register) + k for k in range(2 if f"R{register}.64" in part else span)}
        return found


# Approximate cycles from the issue of an instruction until its result can be read, for each kind of instruction.
# LATENCY leaves out the additional time of an L1 miss, in which other warps have to compute.
LATENCY = {"global": 200, "memory": 30, "mma": 24, "special": 20}
ARITHMETIC = 5


@dataclass
class Loop:
    """The instructions that one warp issues in an iteration of the hot loop, in order."""

    instructions: list[Instruction]

    def count(self, pipe: str) -> int:
        return sum(instruction.pipe == pipe for instruction in self.instructions)

    @property
    def transactions(self) -> int:
        """Returns the rows of 128 bytes that a warp's memory instructions move between registers and L1 or shared
        memory.
        """
        rows = 0
        for instruction in self.instructions:
            if instruction.pipe == "memory" and not instruction.name.startswith(("LDC", "S2R")):
                four, two = r"\.128|LDSM.*\.4|\bLDSM\.16\.M(T)?88\.4", r"\.64"
                rows += 4 if re.search(four, instruction.name) else 2 if re.search(two, instruction.name) else 1
        return rows

    def load_to_use(self) -> int | None:
        """Returns the smallest distance, in instructions, from a load from global memory to the first instruction that
        reads the loaded value. Returns None if the loop loads nothing from global memory."""
        distances = []
        for i, load in enumerate(self.instructions):
            if not load.name.startswith("LDG."):
                continue
            held = load.writes
            for distance, after in enumerate(self.instructions[i + 1 :] + self.instructions[:i], 1):
                if held & after.reads:
                    distances.append(distance)
                    break
        return min(distances, default=None)

    def cycles_alone(self) -> int:
        """Returns the cycles of an iteration for a warp that runs alone. The warp issues its instructions in order, at
        most one in a cycle, and each only when the instruction's operands are ready.
        """
        ready: dict[int, int] = {}
        time = start = 0
        for _ in range(2):  # the second iteration is counted, which waits for results of the first iteration
            start = time
            for instruction in self.instructions:
                waits = [ready.get(register, 0) for register in instruction.reads]
                time = max([time + 1, *waits])
                kind = "global" if instruction.name.startswith("LDG.") else instruction.pipe
                for register in instruction.writes:
                    ready[register] = time + LATENCY.get(kind, ARITHMETIC)
        return time - start


def disassemble(cubin: Path, nvdisasm: str) -> dict[str, list[Instruction]]:
    """Returns a dict from the mangled name of each kernel of a cubin file to the kernel's instructions."""
    text = subprocess.run([nvdisasm, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    labels: dict[str, int] = {}
    pending: list[str] = []
    current: list[Instruction] = []
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\S+?),", line):
            _resolve(current, labels)
            labels, pending = {}, []
            current = kernels.setdefault(section[1], [])
        elif label := re.match(r"(\.L_x_\d+):", line):
            pending.append(label[1])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(pending, address)
            pending = []
            current.append(Instruction(address, found[2], found[3]))
    _resolve(current, labels)
    return kernels


def _resolve(instructions: list[Instruction], labels: dict[str, int]) -> None:
    for instruction in instructions:
        if found := re.search(r"`\((\.L_x_\d+)\)", instruction.operands):
            instruction.target = labels.get(found[1])


def hot_loop(instructions: list[Instruction], trips: int = 1, fmas: bool = False, others: Sequence[int] = ()) -> Loop:
    """Returns the hot loop, which the docstring of tools/sass.py defines. ``trips``: how often inner loops with
    products run. ``fmas``: whether the kernel multiplies by FMAs. ``others``: how often each inner loop without
    products runs, in the order of the addresses; if ``others`` is empty, each of these loops counts once. Raises
    ValueError if ``others`` has another number of loops than the kernel.
    """
    spans = [(i.target, i.address) for i in instructions if i.name.split(".")[0] == "BRA" and i.target is not None]
    spans = [(first, last) for first, last in spans if first < last]

    def body(span: tuple[int, int]) -> list[Instruction]:
        return [i for i in instructions if span[0] <= i.address <= span[1]]

    def products(span: tuple[int, int]) -> int:
        return sum(i.name.startswith("FFMA") if fmas else i.pipe == "mma" for i in body(span))

    with_products = [span for span in spans if products(span)]
    if not with_products:
        # A kernel ends with a branch to itself. The padding after this branch is left out.
        end = next((n for n, i in enumerate(instructions) if i.target == i.address), len(instructions))
        return Loop([i for i in instructions[:end] if i.name != "NOP"])
    most = max(map(products, with_products))
    outer = max((span for span in with_products if products(span) == most), key=lambda span: span[1] - span[0])
    within = [span for span in spans if outer[0] <= span[0] and span[1] <= outer[1] and span != outer]
    inner = [(span, trips) for span in within if span in with_products]
    if others:
        without = sorted(span for span in within if span not in with_products)
        if len(without) != len(others):
            raise ValueError(f"{len(without)} inner loops without products, wanted {len(others)}")
        inner += zip(without, others, strict=True)
    order, at = [], outer[0]
    found = body(outer)
    for (first, last), times in sorted(inner):
        if first < at:
            continue  # this inner loop is a part of the previous inner loop
        order += [i for i in found if at <= i.address < first] + body((first, last)) * times
        at = last + 1
    return Loop(order + [i for i in found if i.address >= at])


def find_nvdisasm() -> str | None:
    """Returns the path of nvdisasm: on PATH, in /usr/local/cuda, or in the package nvidia-cuda-nvdisasm. Returns None
    if nvdisasm is in none of these places."""
    if tool := shutil.which("nvdisasm") or shutil.which("nvdisasm", path="/usr/local/cuda/bin"):
        return tool
    import sysconfig

    found = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm"))
    return str(found[-1]) if found else None
