"""``peft-ext bench``: an adapted layer's training step on this machine, fused and as PEFT and bitsandbytes have it.

One linear layer [N, K] = [hidden, hidden], bfloat16 or NF4 with double quantization, float32 adapters, no dropout;
forward and backward of ``x [T, K]``. Ours is PEFT's very layer after :func:`peft_ext.accelerate`; the stock one has the
same weights. Every contender is verified against float64 before it is timed. Clocks drift and machines are shared, so
each round runs all of them in rotating order, and a ratio is the median over rounds of two times of the same round.
The layer's weights stay in whatever cache holds them, for all alike.

``--output FOLDER`` keeps what ``--json`` prints as ``bench.json``, and draws ``bench.svg``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

from ..chart import Picture, Scale, identifier, rows_scale, text_width
from ..files import atomic_file
from . import CliError
from ._common import bar, console, first_line, need, print_json, quiet

__all__ = ["BASES", "METHODS", "bench"]

METHODS = ("lora", "dora", "ia3")
BASES = ("bf16", "nf4")

_TOLERANCE = 1e-2  # of bfloat16 products, whose own rounding is 2e-3 to 4e-3, relative to the norm
_SCALING = 2.0
_MIN_ROUNDS, _MAX_ROUNDS = 3, 101
_OURS, _FROZEN = "ours", "frozen layer"


@dataclass(frozen=True)
class Result:
    """One layer. By contender: the median of ``milliseconds``, ``ratio`` to ours (above 1: ours is faster), ``error``.

    ``error``: the largest over y and all gradients, relative to float64, as Frobenius norms. ``absent``: why.
    """

    method: str
    base: str
    milliseconds: dict[str, float]
    ratio: dict[str, float]
    error: dict[str, float]
    absent: dict[str, str]
    rounds: int


def bench(
    *,
    method: Optional[Sequence[str]],
    base: Optional[Sequence[str]],
    hidden: int,
    tokens: int,
    rank: int,
    seconds: float,
    threads: Optional[int],
    chart: Optional[Path],
    as_json: bool,
    output: Optional[Path] = None,
) -> None:
    """Verify, time, print; draw ``chart``, and leave numbers and pictures in the folder ``output``.

    Raises CliError for what the user can mend, a layer that would not run fused among it.
    """
    cases = _check(method, base, hidden, tokens, rank, seconds, threads, chart, output)
    need("bench", "transformers", "peft")
    quiet()
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        about = _machine(hidden, tokens, rank)
        if not as_json:
            print(_machine_line(about))
            print(f"layer: {hidden} x {hidden}, {tokens} tokens, rank {rank}; forward and backward", flush=True)
        results = []
        for case in bar(cases, "timing", "layer", " over ".join):
            results.append(_measured(*case, hidden, tokens, rank, seconds / len(cases)))
    finally:
        torch.set_num_threads(before)
    document = {"machine": about, "results": [vars(result) for result in results]}
    if as_json:
        print_json(document)
    else:
        _show(results)
    if chart is not None:
        _write("--chart", {chart: _drawn(results, about)})
        if not as_json:
            print(f"chart: {chart}")
    if output is not None:
        numbers = (json.dumps(document, indent=2) + "\n").encode()
        files = {output / "bench.json": numbers, output / "bench.svg": _drawn(results, about)}
        _write("--output", files)
        if not as_json:
            print(f"written: {', '.join(str(path) for path in files)}")


def _check(
    method: Optional[Sequence[str]], base: Optional[Sequence[str]], hidden: int, tokens: int, rank: int,
    seconds: float, threads: Optional[int], chart: Optional[Path], output: Optional[Path],
) -> list[tuple[str, str]]:  # fmt: skip
    """Pairs of method and base, each once. Raises CliError."""
    cases: list[tuple[str, str]] = []
    for name in method or METHODS:
        plain = name if name in METHODS else name.removeprefix("q")
        if plain not in METHODS:
            raise CliError(f"--method {name}: wanted one of {', '.join(METHODS)}, or qlora, qdora: those over nf4")
        cases += [(plain, held) for held in (("nf4",) if plain != name else base or BASES)]
    if wrong := [held for held in base or () if held not in BASES]:
        raise CliError(f"--base {wrong[0]}: wanted one of {', '.join(BASES)}")
    least = {"hidden": (hidden, 16), "tokens": (tokens, 1), "rank": (rank, 1), "threads": (threads, 1)}
    for option, (value, minimum) in least.items():
        if value is not None and value < minimum:
            raise CliError(f"--{option} {value}: wanted at least {minimum}")
    if not 0 < seconds <= 3600:
        raise CliError(f"--seconds {seconds:g}: wanted more than 0 and at most 3600")
    if chart is not None:
        if chart.suffix != ".svg":
            raise CliError(f"--chart {chart}: wanted a name that ends in .svg")
        if not chart.absolute().parent.is_dir():
            raise CliError(f"--chart {chart}: {chart.parent} is no folder")
    if output is not None:
        there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        if not there.is_dir():
            raise CliError(f"--output {output}: {there} is no folder")
    return list(dict.fromkeys(cases))


# --- one layer --------------------------------------------------------------------------------------------------------


def _config(method: str, rank: int) -> Any:
    from peft import IA3Config, LoraConfig

    if method == "ia3":
        return IA3Config(target_modules=["proj"], feedforward_modules=[])
    return LoraConfig(
        r=rank, lora_alpha=_SCALING * rank, lora_dropout=0.0, target_modules=["proj"], use_dora=method == "dora"
    )


def _stock_name(base: str) -> str:
    return "PEFT" if base == "bf16" else "PEFT + bitsandbytes"


class _Problem:
    """Inputs, the frozen weight and the adapter's values of one case; what PEFT makes of them; the float64 result."""

    def __init__(self, method: str, base: str, hidden: int, tokens: int, rank: int) -> None:
        import torch

        from .. import ops

        self.method, self.base, self.rank, self.hidden = method, base, rank, hidden
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.draw = torch.Generator().manual_seed(0)
        self.x = self._normal(tokens, hidden).to(torch.bfloat16).requires_grad_()
        self.grad = self._normal(tokens, hidden).to(torch.bfloat16)
        self.weight = (0.02 * self._normal(hidden, hidden)).to(torch.bfloat16)
        self.nf4 = ops.nf4_quantize(self.weight, 64, True) if base == "nf4" else None
        self.values: dict[str, Any] = {}

    def _normal(self, *shape: int) -> Any:
        import torch

        return torch.randn(*shape, generator=self.draw).to(self.device)

    def layer(self, stock: bool) -> Any:
        """PEFT's layer, training; fused unless ``stock``. NF4 is bitsandbytes' where that is installed."""
        import torch
        from torch import nn

        from ..model import get_peft_model
        from ..nn import NF4Linear
        from .finetune import _to_bitsandbytes

        holder = nn.Module()
        if self.nf4 is None:
            holder.proj = nn.Linear(self.hidden, self.hidden, bias=False, device="meta")
            holder.proj.weight = nn.Parameter(self.weight, requires_grad=False)
        else:
            holder.proj = NF4Linear.from_nf4(self.nf4)
            if find_spec("bitsandbytes") is not None:
                _to_bitsandbytes(holder, torch.bfloat16)
            elif stock:
                raise ImportError("bitsandbytes is not installed")
        layer = get_peft_model(holder, _config(self.method, self.rank), accelerate=not stock).base_model.model.proj
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(self._value(name, parameter))
        return layer.train()

    def _value(self, name: str, parameter: Any) -> Any:
        """Drawn once for both layers: B and the vectors as after some steps, so that they count."""
        if name not in self.values:
            drawn = self._normal(*parameter.shape)
            if "lora_A" in name:
                drawn *= (3 * self.hidden) ** -0.5
            elif "lora_B" in name:
                drawn *= 0.02
            else:  # magnitude and ia3_l, around what PEFT starts them with
                drawn = parameter.float() * (1 + 0.1 * drawn)
            self.values[name] = drawn
        return self.values[name]

    def dense(self) -> Any:
        """The bfloat16 weight that a layer computes with."""
        import torch

        from .. import reference

        return self.weight if self.nf4 is None else reference.nf4_dequantize(self.nf4, torch.bfloat16)

    def exact(self, adapted: bool) -> dict[str, Any]:
        """y and the gradients in float64, by :mod:`peft_ext.reference` and autograd."""
        import torch.nn.functional as F

        from .. import reference

        x, weight = self.x.detach().double().requires_grad_(), self.dense().double()
        held = {name: value.double().requires_grad_() for name, value in self.values.items()} if adapted else {}
        if not adapted:
            y = F.linear(x, weight)
        elif self.method == "ia3":
            y = reference.ia3_linear(x, weight, *held.values())
        else:
            lora = {part: next(value for name, value in held.items() if part in name) for part in ("lora_A", "lora_B")}
            if self.method == "dora":
                magnitude = next(value for name, value in held.items() if "magnitude" in name)
                y = reference.dora_linear(x, weight, *lora.values(), magnitude, scaling=_SCALING)
            else:
                y = reference.lora_linear(x, weight, *lora.values(), scaling=_SCALING)
        y.backward(self.grad.double())
        return {"y": y.detach(), "x": x.grad, **{name: value.grad for name, value in held.items()}}

    def step(self, forward: Callable[[Any], Any], parameters: dict[str, Any]) -> Callable[[], Any]:
        def run() -> Any:
            for leaf in (self.x, *parameters.values()):
                leaf.grad = None
            y = forward(self.x)
            y.backward(self.grad.to(y.dtype))  # PEFT's IA3 over bitsandbytes returns float32
            return y

        return run

    def error(self, run: Callable[[], Any], parameters: dict[str, Any], exact: dict[str, Any]) -> float:
        found = {"y": run().detach(), "x": self.x.grad, **{name: p.grad for name, p in parameters.items()}}
        return max(
            ((found[name].double().reshape(-1) - wanted.reshape(-1)).norm() / wanted.norm()).item()
            for name, wanted in exact.items()
        )


def _measured(method: str, base: str, hidden: int, tokens: int, rank: int, seconds: float) -> Result:
    import torch.nn.functional as F

    from ..integrations.peft import explain

    problem = _Problem(method, base, hidden, tokens, rank)
    runs: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    absent: dict[str, str] = {}
    exact: dict[str, Any] = {}
    for name in (_OURS, _stock_name(base)):
        try:
            layer = problem.layer(stock=name != _OURS)
        except ImportError as error:
            absent[name] = first_line(error)
            continue
        if name == _OURS and (reasons := [row.reason for row in explain(layer).rows if not row.fused]):
            raise CliError(f"bench: {method} over {base} would not run fused here: {reasons[0]}")
        trained = {key: p for key, p in layer.named_parameters() if p.requires_grad}
        exact = exact or problem.exact(adapted=True)
        runs[name] = problem.step(layer, trained)
        errors[name] = problem.error(runs[name], trained, exact)
    if not errors[_OURS] <= _TOLERANCE:
        raise CliError(f"bench: {method} over {base} is off from float64 by {errors[_OURS]:.2g}: nothing was timed")
    weight = problem.dense()
    runs[_FROZEN] = problem.step(lambda x: F.linear(x, weight), {})
    times = _timed(runs, seconds, problem.device)
    ours = times[_OURS]
    return Result(
        method=method, base=base, milliseconds={name: 1e3 * statistics.median(taken) for name, taken in times.items()},
        ratio={name: statistics.median(t / o for t, o in zip(times[name], ours, strict=True)) for name in times
               if name != _OURS},
        error=errors, absent=absent, rounds=len(ours),
    )  # fmt: skip


def _timed(runs: dict[str, Callable[[], Any]], seconds: float, device: Any) -> dict[str, list[float]]:
    """Seconds by contender and round, for about ``seconds`` in all, three rounds at least."""
    import torch

    def sample(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for run in runs.values():
        sample(run)
    names, taken = list(runs), {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for turn in range(_MAX_ROUNDS):
        if turn >= _MIN_ROUNDS and time.perf_counter() >= end:
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(sample(runs[name]))
    return taken


# --- the screen -------------------------------------------------------------------------------------------------------


def _machine(hidden: int, tokens: int, rank: int) -> dict[str, Any]:
    import torch

    from .. import __version__, _native
    from .finetune import _cpu_name, _versions

    return {
        "cpu": _cpu_name(), "threads": torch.get_num_threads(), "isa": _native.STATE.isa,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": time.strftime("%Y-%m-%d"), "versions": {"peft_ext": __version__, **_versions()},
        "hidden": hidden, "tokens": tokens, "rank": rank,
    }  # fmt: skip


def _machine_line(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    device = "" if about["device"] == "cpu" else f"{about['device']}; "
    return f"machine: {device}{about['cpu']}, {about['threads']} threads, {about['isa']}\nversions: {versions}"


def _label(result: Result) -> str:
    name = {"lora": "LoRA", "dora": "DoRA", "ia3": "IA3"}[result.method]
    return name if result.base == "bf16" else f"Q{name}" if result.method != "ia3" else "IA3, NF4"


def _show(results: list[Result]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("against")
    for column in ("ours ms", "theirs ms", "ours is faster by", "frozen ms", "error: ours", "theirs"):
        table.add_column(column, justify="right")
    for result in results:
        stock, ms = _stock_name(result.base), result.milliseconds
        there = stock in ms
        table.add_row(
            _label(result), stock, f"{ms[_OURS]:.2f}", f"{ms[stock]:.2f}" if there else "-",
            f"{result.ratio[stock]:.2f}x" if there else "-", f"{ms[_FROZEN]:.2f}", f"{result.error[_OURS]:.1e}",
            f"{result.error[stock]:.1e}" if there else "-",
        )  # fmt: skip
    console().print(table)
    print("frozen: PyTorch's bf16 layer without an adapter; error: the largest of y and gradients, against float64")
    for name, reason in {pair: None for result in results for pair in result.absent.items()}:
        print(f"not compared: {name}: {reason}")


def _write(option: str, files: dict[Path, bytes]) -> None:
    """Each file whole or not at all, its folder made. Raises CliError."""
    for path, data in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, "wb") as file:
                file.write(data)
        except OSError as error:
            raise CliError(f"{option} {path}: {error.strerror}") from None


def _drawn(results: list[Result], about: dict[str, Any]) -> bytes:
    """Returns bars of milliseconds, a group for each layer."""
    looks = {_OURS: "ours", "stock": "stock", _FROZEN: "eager"}
    words = ("peft_ext", "PEFT; over NF4 PEFT + bitsandbytes", "PyTorch's bf16 layer, no adapter")
    labels = [_label(result) for result in results]
    groups = [
        {("stock" if name == _stock_name(result.base) else name): ms for name, ms in result.milliseconds.items()}
        for result in results
    ]
    picture = Picture(
        f"A training step of one layer, {about['hidden']} x {about['hidden']}, {about['tokens']} tokens",
        list(zip(looks.values(), words, strict=True)), width=720,
    )  # fmt: skip
    (panel,) = picture.panels(
        1, height=50 * len(results), left=12 + max(map(text_width, labels)), y=rows_scale(len(results)),
        x=Scale(0, 1.1 * max(ms for values in groups for ms in values.values())),
        x_label="ms, forward and backward (less is better)",
    )  # fmt: skip
    panel.x_axis()
    panel.row_labels(labels)
    panel.bars(groups, looks, [identifier("bench", label) for label in labels], form="{:.3g}")
    absent = {f"{name}: {reason}" for result in results for name, reason in result.absent.items()}
    lines = _machine_line(about).splitlines()
    picture.caption(f"Rank {about['rank']}. Medians, {about['date']}.", *sorted(absent), *lines)
    return picture.svg()
