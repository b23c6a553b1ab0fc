"""``peft-ext bench``: times an adapted layer's training step on this machine, fused and with PEFT and bitsandbytes.

The docstrings of :mod:`peft_ext.bench.layer` and :mod:`peft_ext.bench.timer` document the measurement. ``--output
FOLDER`` writes ``bench.json``, the JSON that ``--json`` prints, and a chart, ``bench.svg``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer

from .. import __version__
from ..bench.layer import BASES, FROZEN, METHODS, OURS, NotTimed, Result, measure_layer, stock_name
from ..chart import Picture, Scale, identifier, rows_scale, text_width
from ..files import atomic_file
from ..machine import versions
from ..run.errors import RunError, need
from ..run.progress import bar, quiet
from ..run.record import machine
from ._common import Threads, check_range, console, new_table, print_json

# If the quartiles of a ratio of times differ by more than this share of the ratio, bench says that the machine is busy.
_BUSY = 0.25


def bench(
    method: Annotated[
        Optional[list[str]], typer.Option(help="lora, qlora, dora, qdora, ia3; repeatable. Default: all.")
    ] = None,
    base: Annotated[Optional[list[str]], typer.Option(help="bf16 or nf4; repeatable. Default: both.")] = None,
    hidden: Annotated[int, typer.Option(help="Width: the layer is hidden x hidden.")] = 4096,
    tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 512,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank methods.")] = 16,
    seconds: Annotated[float, typer.Option(help="Time of all measurements, about.")] = 20.0,
    threads: Threads = None,
    chart: Annotated[Optional[Path], typer.Option(help="File for a chart, .svg.")] = None,
    output: Annotated[Optional[Path], typer.Option(help="Folder for bench.json and bench.svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check an adapted layer's training step, and time it on this machine against PEFT and bitsandbytes."""
    check_range(16, hidden=hidden)
    check_range(1, tokens=tokens, rank=rank, threads=threads)
    cases = _check(method, base, seconds, chart, output)
    need("bench", "transformers", "peft")
    quiet()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        about = {
            **machine(), "date": time.strftime("%Y-%m-%d"), "versions": {"peft_ext": __version__, **versions()},
            "hidden": hidden, "tokens": tokens, "rank": rank,
        }  # fmt: skip
        if not as_json:
            print(_machine_line(about))
            print(f"layer: {hidden} x {hidden}, {tokens} tokens, rank {rank}; forward and backward", flush=True)
        results = []
        for case in bar(cases, "timing", "layer", " over ".join):
            results.append(measure_layer(*case, hidden, tokens, rank, seconds / len(cases)))
    except NotTimed as error:
        raise RunError(f"bench: {error}") from None
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
    method: Optional[Sequence[str]], base: Optional[Sequence[str]], seconds: float, chart: Optional[Path],
    output: Optional[Path],
) -> list[tuple[str, str]]:  # fmt: skip
    """Checks the options and returns pairs of method and base without repetition. Raises RunError for a wrong value of
    an option."""
    cases: list[tuple[str, str]] = []
    for name in method or METHODS:
        plain = name if name in METHODS else name.removeprefix("q")
        if plain not in METHODS:
            raise RunError(f"--method {name}: wanted one of {', '.join(METHODS)}, or qlora, qdora: those over nf4")
        cases += [(plain, held) for held in (("nf4",) if plain != name else base or BASES)]
    if wrong := [held for held in base or () if held not in BASES]:
        raise RunError(f"--base {wrong[0]}: wanted one of {', '.join(BASES)}")
    if not 0 < seconds <= 3600:
        raise RunError(f"--seconds {seconds:g}: wanted more than 0 and at most 3600")
    if chart is not None:
        if chart.suffix != ".svg":
            raise RunError(f"--chart {chart}: wanted a name that ends in .svg")
        if not chart.absolute().parent.is_dir():
            raise RunError(f"--chart {chart}: {chart.parent} is no folder")
    if output is not None:
        there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        if not there.is_dir():
            raise RunError(f"--output {output}: {there} is no folder")
    return list(dict.fromkeys(cases))


# --- the screen -------------------------------------------------------------------------------------------------------


def _machine_line(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    device = "" if about["device"] == "cpu" else f"{about['device']}; "
    return f"machine: {device}{about['cpu']}, {about['threads']} threads, {about['isa']}\nversions: {versions}"


def _label(result: Result) -> str:
    name = {"lora": "LoRA", "dora": "DoRA", "ia3": "IA3"}[result.method]
    return name if result.base == "bf16" else f"Q{name}" if result.method != "ia3" else "IA3, NF4"


def _show(results: list[Result]) -> None:
    numbers = ("ours ms", "theirs ms", "ours is faster by", "quartiles", "frozen ms", "error: ours", "theirs")
    table = new_table("layer", "against", *numbers, right=numbers, unfolded=("layer",))
    for result in results:
        stock, ms = stock_name(result.base), result.milliseconds
        there = stock in ms
        table.add_row(
            _label(result), stock, f"{ms[OURS]:.2f}", f"{ms[stock]:.2f}" if there else "-",
            f"{result.ratio[stock]:.2f}x" if there else "-",
            "{:.2f} - {:.2f}".format(*result.quartiles[stock]) if there else "-", f"{ms[FROZEN]:.2f}",
            f"{result.error[OURS]:.1e}", f"{result.error[stock]:.1e}" if there else "-",
        )  # fmt: skip
    console().print(table)
    print("quartiles: half of the rounds are between them; frozen: PyTorch's bf16 layer without an adapter; error: the "
          "largest of y and gradients, against float64")  # fmt: skip
    if busy := [_label(result) for result in results if _spread(result) > _BUSY]:
        print(f"the machine is too busy to judge {', '.join(busy)}: the quartiles are more than {_BUSY:.0%} apart; try "
              "again when it is quiet, or with more --seconds")  # fmt: skip
    for name, reason in {pair: None for result in results for pair in result.absent.items()}:
        print(f"not compared: {name}: {reason}")


def _spread(result: Result) -> float:
    """Returns the largest relative spread of the contenders' ratios, which are times divided by peft_ext's time: the
    distance of a ratio's quartiles, divided by the ratio."""
    return max((high - low) / result.ratio[name] for name, (low, high) in result.quartiles.items())


def _write(option: str, files: dict[Path, bytes]) -> None:
    """Writes each file of ``files`` (path -> content) atomically, and makes the folder of the file if it is missing.

    Raises RunError, with the name of the option that asked for the file, where a file can't be written.
    """
    for path, data in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, "wb") as file:
                file.write(data)
        except OSError as error:
            raise RunError(f"{option} {path}: {error.strerror}") from None


def _drawn(results: list[Result], about: dict[str, Any]) -> bytes:
    """Returns an SVG chart with a group of bars for each measured layer; a bar shows the milliseconds of a contender,
    such as peft_ext or PEFT."""
    looks = {OURS: "ours", "stock": "stock", FROZEN: "eager"}
    words = ("peft_ext", "PEFT; over NF4 PEFT + bitsandbytes", "PyTorch's bf16 layer, no adapter")
    labels = [_label(result) for result in results]
    groups = [
        {("stock" if name == stock_name(result.base) else name): ms for name, ms in result.milliseconds.items()}
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
