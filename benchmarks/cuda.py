"""Times calls on a GPU with CUDA events, and measures the GPU's rates of copies and of matrix products (ceilings).

A call is timed between two events, or as a part of a CUDA graph of many calls. The host does not wait for the GPU
between calls. For a short call, the time between events is the time in which the host launches the kernels; the time in
a graph is the time of the kernels. The outputs of the calls of a sample are kept until the sample ends, so that no
output reuses memory that is still in the GPU's cache. A :class:`Meter` samples the GPU's power, clock and temperature
while calls are timed.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import threading
from collections.abc import Callable
from typing import Any, Optional

import torch

from .harness import Contender

CALLS, GRAPH_CALLS = 10, 32
# Field names in a result file -> nvidia-smi's names of the fields that describe a GPU.
SMI = {"driver": "driver_version", "sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "max_sm_mhz": "clocks.max.sm",
       "max_memory_mhz": "clocks.max.mem", "power_limit_w": "power.limit"}  # fmt: skip
# Field names in a row of a result file -> nvidia-smi's names of the fields that a Meter samples.
SAMPLED = {"power_w": "power.draw", "sm_mhz": "clocks.sm", "temperature_c": "temperature.gpu"}
SAMPLE_MS = 100


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def event_clock(contender: Contender) -> Callable[[], float]:
    """Returns a function that times CALLS calls, each between two events, and returns their median time in seconds."""
    marks = [(_event(), _event()) for _ in range(CALLS)]

    def sample() -> float:
        kept = []
        for start, end in marks:
            contender.take()
            start.record()
            kept.append(contender.run())
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3

    sample()
    return sample


def graph_clock(contender: Contender) -> Callable[[], float]:
    """Returns a function that times a CUDA graph of :data:`GRAPH_CALLS` calls and returns the mean seconds of a call.

    Each call in the graph uses the contender's next weight. The function replays the graph twice: the first replay
    keeps the GPU busy until the second, timed replay is queued. Raises the exception of a call that cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # in the first calls, before the capture, libraries allocate workspaces
        for _ in range(3):
            contender.take()
            contender.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    kept = []
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            contender.take()
            kept.append(contender.run())
    start, end = _event(), _event()

    def sample() -> float:
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / GRAPH_CALLS

    sample()
    return sample


def measured_ceilings(repeats: int = 7, size: int = 8192, copy_bytes: int = 2**30) -> dict[str, float]:
    """Measures GB/s of a copy (bytes read plus written), and TFLOP/s of PyTorch's products in bf16 and float32.

    Each figure is the best of ``repeats`` measurements. The rate of a product is the better of the rates of ``a @ b``
    and ``a @ b.t()``.
    """
    start, end = _event(), _event()

    def best(run: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(1 + repeats):  # the first measurement warms up and is left out
            start.record()
            for _ in range(CALLS):
                run()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / CALLS)
        return min(seconds[1:])

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return (
            2 * size**3 / min(best(lambda: torch.mm(a, b, out=out)), best(lambda: torch.mm(a, b.t(), out=out))) / 1e12
        )

    source = torch.randn(copy_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    return {
        "copy_gb_s": 2 * copy_bytes / best(lambda: target.copy_(source)) / 1e9,
        "matmul_bf16_tflop_s": product(torch.bfloat16),
        "matmul_f32_tflop_s": product(torch.float32),
    }


def about_gpu() -> dict[str, Any]:
    """Returns a dict with the GPU's name, capability, number of multiprocessors and memory size, and the version of
    CUDA. If nvidia-smi runs, also returns the driver's version and the GPU's clocks and power limit."""
    found = torch.cuda.get_device_properties(0)
    about = {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
    try:
        done = subprocess.run(_smi(SMI, found.uuid), check=True, capture_output=True, text=True, timeout=30)
        line = done.stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return about
    return about | dict(zip(SMI, (value.strip() for value in line.split(",")), strict=False))


def _smi(fields: dict[str, str], uuid: Any, *more: str) -> list[str]:
    """Returns the command of nvidia-smi that prints a line with the fields ``fields`` of the GPU ``uuid``."""
    return ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields.values())}",
            "--format=csv,noheader,nounits", *more]  # fmt: skip


def sample_of(line: str) -> dict[str, float]:
    """Returns a dict from names in SAMPLED to the numbers in a line of nvidia-smi's output. Leaves out values that are
    no numbers, such as "[N/A]"."""
    found = {}
    for name, text in zip(SAMPLED, line.split(","), strict=False):
        try:
            found[name] = float(text)
        except ValueError:
            continue
    return found


class Meter:
    """A context manager that lets nvidia-smi sample the power, the clock and the temperature of the GPU ``uuid``.

    A process of nvidia-smi prints a sample every :data:`SAMPLE_MS` milliseconds. If nvidia-smi is missing or ``uuid``
    is None, the meter has no samples.
    """

    def __init__(self, uuid: Any) -> None:
        self._uuid, self._lock = uuid, threading.Lock()
        self._samples: list[dict[str, float]] = []
        self._last: dict[str, float] = {}
        self._process: Optional[subprocess.Popen[bytes]] = None

    def __enter__(self) -> Meter:
        if self._uuid is None:
            return self
        # nvidia-smi writes to a terminal, because the C library would hold lines for a pipe back until a buffer is
        # full.
        ours, theirs = os.openpty()
        try:
            command = _smi(SAMPLED, self._uuid, f"--loop-ms={SAMPLE_MS}")
            self._process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL)
        except OSError:
            os.close(ours)
            return self
        finally:
            os.close(theirs)
        threading.Thread(target=self._read, args=(ours,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, terminal: int) -> None:
        with open(terminal, errors="replace") as lines:
            with contextlib.suppress(OSError):  # raised when nvidia-smi has closed its end of the terminal
                for line in lines:
                    with self._lock:
                        self._samples += filter(None, [sample_of(line)])

    def lap(self) -> dict[str, float]:
        """Returns a dict from each field to its median over the samples since the last call of ``lap``. If no sample is
        new, returns the last result again."""
        with self._lock:
            samples, self._samples = self._samples, []
        medians = {}
        for name in SAMPLED:
            if values := [sample[name] for sample in samples if name in sample]:
                medians[name] = statistics.median(values)
        self._last = medians or self._last
        return dict(self._last)


def uuid() -> Any:
    """Returns the UUID of the GPU that the benchmarks use; None without a GPU."""
    return torch.cuda.get_device_properties(0).uuid if torch.cuda.is_available() else None
