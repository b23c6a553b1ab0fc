"""Records the parallel loops of peft_ext's operators, with tools/recorded_loops.cpp, for tools/many_cores.py.

While an operator is recorded, torch divides each loop among the wanted number of threads, however many cores the
machine has, and the threads' parts of a loop run one after another. Runs with the installed native library give the
loops, their parts and the CPU time of each part. Runs with a library that is compiled with -fsanitize=thread give the
cache lines and the memory pages that each thread uses. Needs Linux, g++ and ninja.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import native_build
from native_build import ROOT, Group

BUILD = ROOT / "build/recorded"
# Compiler flags for the sources whose memory accesses are recorded.
TRACED = "-fsanitize=thread --param tsan-instrument-func-entry-exit=0"
GROUP, L2 = 8, 1 << 20  # number of threads that share an L3 cache, and bytes of an L2 cache
RANK, TOKENS = 16, 512
# The indices of the numbers in the record of a thread's part of a loop. FROM and TO are the indices of the begin and
# the end of the part's units of work, TIME is that of the nanoseconds of CPU time, and FROM_L2, FROM_L3 and FROM_DRAM
# are those of the numbers of cache lines that came from L2, L3 and DRAM. TAKEN is the index of the number of cache
# lines that the thread wrote after another thread of the same loop.
THREAD, FROM, TO, TIME, ACCESSES, FROM_L2, FROM_L3, FROM_DRAM, TAKEN = range(9)


# --- in a process that has the recorder preloaded ---------------------------------------------------------------------


def _steps() -> dict[str, Callable[[], tuple[Callable[[], Any], Callable[[Any], Any]]]]:
    """Returns a dict from the name of each operator, with its sizes, to a function that makes the operands and returns
    two functions, which run the forward and the backward."""
    import torch

    from peft_ext import ops

    def random(*shape: int, grad: bool = True, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (0.1 * torch.randn(shape)).to(dtype).requires_grad_(grad)

    def step(forward: Callable[[], Any], *inputs: torch.Tensor) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        grads: dict[Any, torch.Tensor] = {}

        def backward(y: Any) -> Any:
            if y.shape not in grads:
                grads[y.shape] = random(*y.shape, grad=False, dtype=y.dtype)
            return torch.autograd.grad(y, inputs, grads[y.shape], retain_graph=True)

        return forward, backward

    def layer(out: int, inner: int, *, dropout: float = 0.0, nf4: bool = False, dora: bool = False) -> Any:
        x, weight = random(TOKENS, inner), random(out, inner, grad=False)
        held = ops.nf4_quantize(weight, 64, double_quant=True) if nf4 else weight
        lora_A, lora_B = random(RANK, inner, dtype=torch.float32), random(out, RANK, dtype=torch.float32)
        how = {"scaling": 2.0, "dropout_p": dropout, "training": True}
        if dropout:
            how["seed"] = torch.tensor([1, 2])
        if dora:
            magnitude = random(out, dtype=torch.float32)
            mode = {"dropout_mode": "peft"}
            return step(lambda: ops.dora_linear(x, held, lora_A, lora_B, magnitude, **how, **mode),
                        x, lora_A, lora_B, magnitude)  # fmt: skip
        return step(lambda: ops.lora_linear(x, held, lora_A, lora_B, **how), x, lora_A, lora_B)

    def attention() -> Any:
        q, k, v = (random(1, heads, 1024, 128) for heads in (32, 8, 8))
        return step(lambda: ops.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)

    def norm() -> Any:
        x, weight = random(TOKENS, 4096), random(4096, grad=False)
        return step(lambda: ops.rms_norm(x, weight, 1e-5), x)

    def activation() -> Any:
        gate, up = random(TOKENS, 14336), random(TOKENS, 14336)
        return step(lambda: ops.gated_activation(gate, up, "silu"), gate, up)

    def cross_entropy() -> Any:
        hidden, weight = random(TOKENS, 576), random(49152, 576, grad=False)
        labels = torch.randint(0, 49152, (TOKENS,))
        return step(lambda: ops.linear_cross_entropy(hidden, weight, labels), hidden)

    return {
        "LoRA, dropout 0.05, 576 x 576": partial(layer, 576, 576, dropout=0.05),
        "LoRA, dropout 0.05, 4096 x 4096": partial(layer, 4096, 4096, dropout=0.05),
        "LoRA, dropout 0.05, 4096 x 14336": partial(layer, 4096, 14336, dropout=0.05),
        "LoRA over NF4, dropout 0.05, 4096 x 4096": partial(layer, 4096, 4096, dropout=0.05, nf4=True),
        "DoRA, dropout 0.05, 4096 x 4096": partial(layer, 4096, 4096, dropout=0.05, dora=True),
        "attention, causal, 1024 tokens, 32 heads": attention,
        "RMS norm, 4096": norm,
        "SiLU gate, 14336": activation,
        "cross entropy of a head, 49152 x 576": cross_entropy,
    }


class Recorder:
    """Records the parallel loops of calls in this process, in which the library of tools/recorded_loops.cpp is
    preloaded."""

    def __init__(self, library: str, traces: bool) -> None:
        self.library, self.traces = ctypes.CDLL(library), traces
        self.folder = Path(tempfile.mkdtemp())

    def record(self, name: str, threads: int, call: Callable[[], Any]) -> Any:
        """Calls ``call``, writes the record of the call to a file, which :meth:`read` reads, and returns the result of
        the call."""
        place = str(self.folder / name).encode()
        self.library.record_start(threads, GROUP, ctypes.c_int64(L2), int(self.traces))
        try:
            return call()
        finally:
            self.library.record_stop(place)

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text())


def _least(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one record for several records of the same call: the least times of each part and of the code outside of
    loops, and the counts of the first record."""
    first = records[0]
    first["serial"][0] = min(record["serial"][0] for record in records)
    for i, loop in enumerate(first["loops"]):
        for part, *others in zip(loop["parts"], *(record["loops"][i]["parts"] for record in records[1:]), strict=True):
            part[3] = min(part[3], *(other[3] for other in others)) if others else part[3]
    return first


def record_here(library: str, traces: bool, names: list[str], threads: list[int], repeats: int) -> list[dict[str, Any]]:
    """Records the parallel loops of the operators in this process. Returns a row for each operator, direction and
    number of threads."""
    import torch

    from peft_ext._native import STATE
    from peft_ext.integrations.trainer import keep_freed_memory

    keep_freed_memory()
    recorder, rows = Recorder(library, traces), []
    for name, make in _steps().items():
        if names and name not in names:
            continue
        torch.manual_seed(0)
        forward, backward = make()
        for count in threads:
            torch.set_num_threads(count)
            backward(forward())  # this unrecorded call allocates scratch memory and starts the threads
            for turn in range(repeats):
                y = recorder.record(f"forward{turn}", count, forward)
                recorder.record(f"backward{turn}", count, partial(backward, y))
            for direction in ("forward", "backward"):
                record = _least([recorder.read(f"{direction}{turn}") for turn in range(repeats)])
                rows.append({"operator": name, "direction": direction, "threads": count, "isa": STATE.isa} | record)
            print(f"{name}, {count} threads", file=sys.stderr, flush=True)
        torch.set_num_threads(1)
    return rows


def time_here(library: str, repeats: int) -> list[dict[str, Any]]:
    """Returns rows with the least of ``repeats`` + 1 times, in seconds, of each operator and direction on one and on
    two threads, and a row with the least time of an empty loop."""
    import torch

    from peft_ext.integrations.trainer import keep_freed_memory

    keep_freed_memory()
    empty = ctypes.CDLL(library).empty_loop_seconds
    empty.restype = ctypes.c_double
    torch.set_num_threads(2)
    loops = min(empty(2, 20) for _ in range(500))
    rows: list[dict[str, Any]] = [{"operator": "empty loop", "direction": "", "threads": 2, "seconds": loops}]
    for name, make in _steps().items():
        torch.manual_seed(0)
        forward, backward = make()
        taken: dict[tuple[str, int], list[float]] = {}
        for _ in range(repeats + 1):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                backward(forward())
                start = time.perf_counter()
                y = forward()
                middle = time.perf_counter()
                backward(y)
                taken.setdefault(("forward", threads), []).append(middle - start)
                taken.setdefault(("backward", threads), []).append(time.perf_counter() - middle)
        rows += [{"operator": name, "direction": direction, "threads": threads, "seconds": min(seconds)}
                 for (direction, threads), seconds in taken.items()]  # fmt: skip
    return rows


# --- in the calling process -------------------------------------------------------------------------------------------


def build_recorder() -> Path:
    place = BUILD / "librecorder.so"
    place.parent.mkdir(parents=True, exist_ok=True)
    source = ROOT / "tools/recorded_loops.cpp"
    if not place.exists() or place.stat().st_mtime < source.stat().st_mtime:
        flags = ["-std=c++17", "-O3", "-march=native", "-Wall", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, str(source), "-o", str(place), "-ldl"], check=True)
    return place


def build_traced() -> Path:
    """Builds a folder with the package peft_ext, whose native library calls the recorder at most memory accesses of the
    AVX-512 and AMX kernels and of the code that all CPU paths share.

    The other sources, such as those of CUDA and of the other CPU paths, are compiled without these calls and without
    optimization.
    """
    flags, libraries = native_build.torch_flags()
    common = f"-std=c++17 -ffp-contract=off -fvisibility=hidden -fPIC {native_build.module_flags()} {flags}"
    sources = native_build.module_sources()
    other = [path for path in sources if re.search(r"_(cuda|avx2|scalar|neon)\.cpp$|emulated|embedded|bindings|/cuda/",
                                                   str(path))]  # fmt: skip
    groups = [
        Group(f"{common} -O3 {TRACED}", [path for path in sources if path not in other]),
        Group(f"{common} -O0", other),
    ]
    wrapped = ",".join(f"--wrap={name}" for name in ("memcpy", "memmove", "memset"))
    library = native_build.build(BUILD / "libtraced.so", groups, f"-Wl,-Bsymbolic,{wrapped} {libraries}")
    return native_build.package(BUILD / "site", library)


def _function_of_loop(symbol: str) -> str:
    """Returns the innermost function in the mangled name of a loop's body. In the name, parallel_for is a template of a
    lambda in another function, which may itself be a template of a lambda in a further function."""
    rest, found = symbol.split("N8peft_ext12parallel_for", 1)[1], ""
    while nested := re.match(r"IZ+NK?(?:S[0-9A-Z]*_)?", rest):
        rest, names = rest[nested.end() :], []
        while length := re.match(r"\d+", rest):
            end = length.end() + int(length.group())
            names.append(rest[length.end() : end])
            rest = rest[end:]
        found = "::".join(name for name in names if name not in ("peft_ext", "_GLOBAL__N_1"))
    return found


def loop_names(library: Path) -> dict[int, str]:
    """Returns a dict from the address of each loop's body in the library to the function that starts the loop."""
    lines = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split() for line in lines if "12parallel_forIZN8peft_ext12parallel_for" in line and "_FUN" in line]
    return {int(address, 16): _function_of_loop(symbol) for address, _, symbol in symbols}


def child(function: str, site: Path = ROOT, **how: Any) -> list[dict[str, Any]]:
    """Runs :func:`record_here` or :func:`time_here` in a process with the preloaded recorder, and returns the rows with
    the names of the loops. ``site`` is the folder of the package, by default this checkout.
    """
    recorder = build_recorder()
    environment = {**os.environ, "LD_PRELOAD": str(recorder), "PYTHONPATH": str(site), "PEFT_EXT_REQUIRE": "1"}
    if function == "record_here":  # threads that wait actively would take the cores from the thread that computes
        environment["OMP_WAIT_POLICY"] = "passive"
        environment["MALLOC_ARENA_MAX"] = "1024"  # malloc gets as many arenas as on a machine with many cores
        how["traces"] = site != ROOT
    code = """if True:
        import json, pathlib, sys
        sys.path.append(sys.argv[1])
        import recorded_loops
        found = getattr(recorded_loops, sys.argv[2])(**json.loads(sys.argv[3]))
        pathlib.Path(sys.argv[4]).write_text(json.dumps(found))
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        arguments = [str(ROOT / "tools"), function, json.dumps({"library": str(recorder), **how}), str(out)]
        subprocess.run([sys.executable, "-c", code, *arguments], env=environment, cwd=folder, check=True)
        rows = json.loads(out.read_text())
    found = loop_names(site / "peft_ext/_kernels.so")
    for row in rows:
        for loop in row.get("loops", ()):
            loop["name"] = found[loop.pop("function")]
    return rows


def traced_rows(threads: int) -> list[dict[str, Any]]:
    """Returns the rows of :func:`record_here` with the traced library on ``threads`` threads. The rows are kept in
    build/recorded until the traced library, recorded_loops.py or recorded_loops.cpp changes."""
    kept, site = BUILD / f"traced{threads}.json", build_traced()
    sources = (BUILD / "libtraced.so", *(ROOT / "tools" / f"recorded_loops.{kind}" for kind in ("py", "cpp")))
    if not kept.exists() or any(path.stat().st_mtime > kept.stat().st_mtime for path in sources):
        kept.write_text(json.dumps(child("record_here", site, names=[], threads=[threads], repeats=1)))
    return json.loads(kept.read_text())
