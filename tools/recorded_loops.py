"""Records the parallel loops of peft_ext's operators, with tools/recorded_loops.cpp, for tools/many_cores.py.

While an operator is recorded, torch divides each loop among the wanted number of threads, however many cores the
machine has, and the threads' parts of a loop run one after another. Runs with the installed native library give the
loops, their parts and the CPU time of each part. Runs with a library that is compiled with -fsanitize=thread give the
cache lines and the memory pages that each thread uses. Needs Linux, g++ and ninja.

The stages of a loop (csrc/cpu/stages.h), such as those of the operator decoder_layer, are recorded as a loop each: of
the parts of one loop, the first would take the pieces of all threads, and the record would show one busy thread.
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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import native_build
from native_build import ROOT, Group

BUILD = ROOT / "build/recorded"
# Compiler flags for the sources whose memory accesses are recorded.
TRACED = "-fsanitize=thread --param tsan-instrument-func-entry-exit=0"
GROUP, L2 = 8, 1 << 20  # number of threads that share an L3 cache, and bytes of an L2 cache
RANK, TOKENS = 16, 512
EXPERTS, CHOSEN = 64, 4  # number of experts, and number of experts that compute each token
# Forward and backward of an operator. The backward takes the result of the forward, and is None if the operator is
# recorded without a gradient.
Step = tuple[Callable[[], Any], Optional[Callable[[Any], Any]]]
# The indices of the numbers in the record of a thread's part of a loop. FROM and TO are the indices of the begin and
# the end of the part's units of work, TIME is that of the nanoseconds of CPU time, and FROM_L2, FROM_L3 and FROM_DRAM
# are those of the numbers of cache lines that came from L2, L3 and DRAM. TAKEN is the index of the number of cache
# lines that the thread wrote after another thread of the same loop.
THREAD, FROM, TO, TIME, ACCESSES, FROM_L2, FROM_L3, FROM_DRAM, TAKEN = range(9)


# --- in a process that has the recorder preloaded ---------------------------------------------------------------------


def steps() -> dict[str, Callable[[], Step]]:
    """Returns a dict from the name of each operator, with its sizes, to a function that makes the operands and returns
    the operator's forward and backward."""
    import torch

    from peft_ext import ops
    from peft_ext.integrations.adapter_layers.few_tokens import kernel_of
    from peft_ext.ops.layer_lists import listed
    from peft_ext.weights import mx

    def random(*shape: int, grad: bool = True, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (0.1 * torch.randn(shape)).to(dtype).requires_grad_(grad)

    def step(forward: Callable[[], Any], *inputs: torch.Tensor) -> Step:
        grads: list[torch.Tensor] = []

        def backward(y: Any) -> Any:
            ys = (y,) if isinstance(y, torch.Tensor) else y
            if not grads:
                grads.extend(random(*one.shape, grad=False, dtype=one.dtype) for one in ys)
            return torch.autograd.grad(ys, inputs, grads, retain_graph=True)

        return forward, backward

    def adapters(outs: Sequence[int], inner: int, grad: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        held = [(random(RANK, inner, grad=grad, dtype=torch.float32), random(out, RANK, grad=grad, dtype=torch.float32))
                for out in outs]  # fmt: skip
        return [a for a, _ in held], [b for _, b in held]

    def nf4(weight: torch.Tensor) -> Any:
        return ops.nf4_quantize(weight, 64, double_quant=True)

    def layer(out: int, inner: int, *, dropout: float = 0.0, packed: Any = None, dora: bool = False) -> Step:
        x, weight = random(TOKENS, inner), random(out, inner, grad=False)
        held = packed(weight) if packed is not None else weight
        (lora_A,), (lora_B,) = adapters([out], inner)
        how = {"scaling": 2.0, "dropout_p": dropout, "training": True}
        if dropout:
            how["seed"] = torch.tensor([1, 2])
        if dora:
            magnitude = random(out, dtype=torch.float32)
            mode = {"dropout_mode": "peft"}
            return step(lambda: ops.dora_linear(x, held, lora_A, lora_B, magnitude, **how, **mode),
                        x, lora_A, lora_B, magnitude)  # fmt: skip
        return step(lambda: ops.lora_linear(x, held, lora_A, lora_B, **how), x, lora_A, lora_B)

    def siblings(*outs: int) -> Step:
        x, weights = random(TOKENS, 4096), [random(out, 4096, grad=False) for out in outs]
        lora_As, lora_Bs = adapters(outs, 4096)
        seeds = [torch.tensor([1, i]) for i in range(len(outs))]
        return step(lambda: ops.lora_linears(x, weights, lora_As, lora_Bs, scalings=2.0, dropout_ps=0.05, training=True,
                                             seeds=seeds), x, *lora_As, *lora_Bs)  # fmt: skip

    def experts(out: int, inner: int) -> Step:
        chosen = torch.rand(TOKENS, EXPERTS).topk(CHOSEN).indices.flatten()
        offsets = chosen.bincount(minlength=EXPERTS).cumsum(0).to(torch.int32)
        x, weight = random(TOKENS * CHOSEN, inner), random(EXPERTS, out, inner, grad=False)
        lora_A = random(EXPERTS, RANK, inner, dtype=torch.float32)
        lora_B = random(EXPERTS, out, RANK, dtype=torch.float32)
        seed = torch.tensor([1, 2])
        return step(lambda: ops.lora_experts(x, weight, offsets, lora_A, lora_B, scaling=2.0, dropout_p=0.05,
                                             training=True, seed=seed), x, lora_A, lora_B)  # fmt: skip

    def decoder_layer() -> Step:
        hidden, inner, size, kv_heads, past = 4096, 14336, 128, 8, 512
        make = partial(random, grad=False)
        layers = (((hidden, kv_heads * size, kv_heads * size), hidden), ((hidden,), hidden), ((inner, inner), hidden),
                  ((hidden,), inner))  # fmt: skip
        tensors, sizes, numbers = [make(hidden), make(hidden)], [0, 0, 1], [1e-5, 1e-5, 0.0, size**-0.5]
        for outs, columns in layers:
            weights = [nf4(make(out, columns)) for out in outs]
            found = listed("lora_linears", make(1, columns), weights, *adapters(outs, columns, grad=False), None, None,
                           2.0, 0.0, False, None)  # fmt: skip
            for together, own in zip((tensors, sizes, numbers), found.lists, strict=True):
                together.extend(own)
        x, angles = make(1, 1, hidden), make(1, 1, size)
        keys, values = (make(1, kv_heads, past + 64, size) for _ in range(2))
        kernel, plan = kernel_of("decoder_layer"), 1
        kernel(x, angles, angles, None, keys, values, past, tensors, sizes, numbers, plan)
        return lambda: kernel(x, angles, angles, None, keys, values, past, [], [], [], plan), None

    def attention() -> Step:
        q, k, v = (random(1, heads, 1024, 128) for heads in (32, 8, 8))
        return step(lambda: ops.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)

    def rotary() -> Step:
        q, k = (random(1, TOKENS, heads, 128).transpose(1, 2) for heads in (32, 8))
        cos, sin = random(1, TOKENS, 128, grad=False), random(1, TOKENS, 128, grad=False)
        return step(lambda: ops.rotary_embedding(q, k, cos, sin), q, k)

    def norm() -> Step:
        x, weight = random(TOKENS, 4096), random(4096, grad=False)
        return step(lambda: ops.rms_norm(x, weight, 1e-5), x)

    def activation() -> Step:
        gate, up = random(TOKENS, 14336), random(TOKENS, 14336)
        return step(lambda: ops.gated_activation(gate, up, "silu"), gate, up)

    def cross_entropy() -> Step:
        hidden, weight = random(TOKENS, 576), random(49152, 576, grad=False)
        labels = torch.randint(0, 49152, (TOKENS,))
        return step(lambda: ops.linear_cross_entropy(hidden, weight, labels), hidden)

    dropped = partial(layer, dropout=0.05)
    return {
        "LoRA, dropout 0.05, 576 x 576": partial(dropped, 576, 576),
        "LoRA, dropout 0.05, 4096 x 4096": partial(dropped, 4096, 4096),
        "LoRA, dropout 0.05, 4096 x 14336": partial(dropped, 4096, 14336),
        "LoRA over NF4, dropout 0.05, 4096 x 4096": partial(dropped, 4096, 4096, packed=nf4),
        "LoRA over MXFP4, dropout 0.05, 4096 x 4096": partial(dropped, 4096, 4096, packed=mx.quantize_mxfp4),
        "DoRA, dropout 0.05, 4096 x 4096": partial(dropped, 4096, 4096, dora=True),
        "q, k, v with LoRA, dropout 0.05, (4096, 1024, 1024) x 4096": partial(siblings, 4096, 1024, 1024),
        "gate, up with LoRA, dropout 0.05, (14336, 14336) x 4096": partial(siblings, 14336, 14336),
        "LoRA on 64 experts, dropout 0.05, 512 x 256, 4 a token": partial(experts, 512, 256),
        "attention, causal, 1024 tokens, 32 heads": attention,
        "rotary positions, 32 and 8 heads": rotary,
        "RMS norm, 4096": norm,
        "SiLU gate, 14336": activation,
        "cross entropy of a head, 49152 x 576": cross_entropy,
        "decoder layer over NF4 with LoRA, 4096, one token": decoder_layer,
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
    """Records the parallel loops of the operators ``names`` in this process. Returns a row for each operator, direction
    and number of threads."""
    import torch

    from peft_ext import _native
    from peft_ext.integrations.trainer import keep_freed_memory

    keep_freed_memory()
    ctypes.CDLL(str(Path(_native.__file__).with_name("_kernels.so"))).peft_ext_stages_as_loops(1)
    recorder, rows = Recorder(library, traces), []
    for name, make in steps().items():
        if name not in names:
            continue
        torch.manual_seed(0)
        forward, backward = make()
        for count in threads:
            torch.set_num_threads(count)
            y = forward()  # this unrecorded call allocates scratch memory and starts the threads
            if backward is not None:
                backward(y)
            for turn in range(repeats):
                y = recorder.record(f"forward{turn}", count, forward)
                if backward is not None:
                    recorder.record(f"backward{turn}", count, partial(backward, y))
            for direction in ("forward", "backward")[: 1 if backward is None else 2]:
                record = _least([recorder.read(f"{direction}{turn}") for turn in range(repeats)])
                where = {"operator": name, "direction": direction, "threads": count, "isa": _native.STATE.isa}
                rows.append(where | record)
            print(f"{name}, {count} threads", file=sys.stderr, flush=True)
        torch.set_num_threads(1)
    return rows


def time_here(library: str, names: list[str], repeats: int) -> list[dict[str, Any]]:
    """Returns rows with the least of ``repeats`` + 1 times, in seconds, of the operators ``names`` in each direction on
    one and on two threads, and a row with the least time of an empty loop."""
    import torch

    from peft_ext.integrations.trainer import keep_freed_memory

    keep_freed_memory()
    empty = ctypes.CDLL(library).empty_loop_seconds
    empty.restype = ctypes.c_double
    torch.set_num_threads(2)
    loops = min(empty(2, 20) for _ in range(500))
    rows: list[dict[str, Any]] = [{"operator": "empty loop", "direction": "", "threads": 2, "seconds": loops}]
    for name, make in steps().items():
        if name not in names:
            continue
        torch.manual_seed(0)
        forward, backward = make()
        taken: dict[tuple[str, int], list[float]] = {}
        for _ in range(repeats + 1):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                y = forward()
                if backward is not None:
                    backward(y)
                start = time.perf_counter()
                y = forward()
                taken.setdefault(("forward", threads), []).append(time.perf_counter() - start)
                if backward is not None:
                    start = time.perf_counter()
                    backward(y)
                    taken.setdefault(("backward", threads), []).append(time.perf_counter() - start)
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


def traced_rows(threads: int, names: list[str]) -> list[dict[str, Any]]:
    """Returns the rows of :func:`record_here` for the operators ``names``, with the traced library on ``threads``
    threads. The rows are kept in build/recorded until the traced library, recorded_loops.py or recorded_loops.cpp
    changes."""
    kept, site = BUILD / f"traced{threads}.json", build_traced()
    sources = (BUILD / "libtraced.so", *(ROOT / "tools" / f"recorded_loops.{kind}" for kind in ("py", "cpp")))
    valid = kept.exists() and all(path.stat().st_mtime <= kept.stat().st_mtime for path in sources)
    rows = json.loads(kept.read_text()) if valid else []
    recorded = {row["operator"] for row in rows}
    if missing := [name for name in names if name not in recorded]:
        rows += child("record_here", site, names=missing, threads=[threads], repeats=1)
        kept.write_text(json.dumps(rows))
    return [row for row in rows if row["operator"] in names]
