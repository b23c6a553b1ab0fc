"""``python -m benchmarks.charts [--check] [--out FOLDER]``: draw docs/images/*.svg from the newest result files.

``layers``     the time of each adapted layer's step, the frozen bf16 layer's = 1
``roofline``   what each operator reaches, over what its bytes and products allow
``training``   tokens/s and peak memory of whole training steps, against PEFT and bitsandbytes
``losses``     loss curves of every method, accelerated and not

``layers`` and ``roofline`` are drawn once more for each GPU that was measured, ``-<gpu>`` in their names. Each number
is one of a result file: what is not in it is not drawn, and the chart or its caption says so. The same files and the
same matplotlib give the same bytes. ``--check`` writes nothing and fails where a picture is not what it would draw;
one that another version of matplotlib drew is compared by the result file that it names, not by its bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from peft_ext.cli._chart import (
    COLOURS,
    MUTED,
    TEXT,
    bars,
    beside,
    caption,
    gid,
    hide_frame,
    look,
    new_figure,
    patch,
    render,
)
from peft_ext.files import atomic_file

from . import tables
from .convergence import PATTERN as LOSSES
from .convergence import TWINS
from .cuda import slug
from .grid import MAIN, Options, cases
from .tables import KERNELS, METHODS, Result, about, about_gpu, is_of_a_gpu, newest, newest_by_gpu

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = tables.ROOT / "docs" / "images"
WIDTH = 8.6
TOKENS = {"cpu": 512, "cuda": 2048}  # where torch.compile takes part
# The layers with an adapter, in their order; an operator's benchmark has its name.
ADAPTED = {"lora_linear": "LoRA", "grouped_lora_linear": "Mixed batch", "dora_linear": "DoRA", "ia3_linear": "IA3"}
BASES = {"bf16": "bf16 base", "nf4": "NF4 base"}
MARKERS = {"lora_linear": "o", "dora_linear": "s", "ia3_linear": "^", "grouped_lora_linear": "P", "nf4_linear": "D",
           "bottleneck_adapter": "v", "dora_weight_norm": "X"}  # fmt: skip


def stock_name(row: Result) -> Optional[str]:
    """The row's peer that is PEFT or bitsandbytes, as they come."""
    return next((name for name in row["milliseconds"] if name in ("PEFT", "PEFT + bitsandbytes", "bitsandbytes")), None)


def about_run(result: Result) -> str:
    return about_gpu(result) if is_of_a_gpu(result) else f"{about(result)}."


def _device(result: Result) -> str:
    return "cuda" if is_of_a_gpu(result) else "cpu"


# --- adapted layers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One adapted layer's row. ``times``: by contender, of the frozen layer's; empty where it is not in the file."""

    op: str
    label: str
    base: str
    times: dict[str, float]


def _label(op: str, case: str) -> tuple[str, str]:
    """``(label, base)`` of a case such as "T=512 4096->4096, bf16 base, dropout 0.05"."""
    _, *parts = case.split(", ")
    base = next(key for key, text in BASES.items() if text in parts)
    rest = [part for part in parts if part not in BASES.values()]
    name = rest.pop(0) if "AdaLoRA" in rest else ADAPTED[op]
    label = ", ".join([name, *rest])
    if op == "grouped_lora_linear":
        label += ",\nforward alone"
    return re.sub(r", (dropout \S+) (\w)", r",\n\1 \2", label), base


def adapted_layers(result: Result) -> list[Layer]:
    """What the benchmarks have of 4096 x 4096 at :data:`TOKENS`, rotating weights: each with its times, or with none.

    A time is the quotient of two medians of the file: the contender's ratio to ours over the frozen layer's.
    """
    device = _device(result)
    options = Options((TOKENS[device],), (), (), (), ("rotating",), (), device)
    rows = {(row["op"], row["case"], row.get("weights", "hot")): row for row in result["rows"]}
    layers = []
    for op in ADAPTED:
        variants = importlib.import_module(f"benchmarks.bench_{op.removesuffix('_linear')}").VARIANTS
        for case in cases([variant for variant in variants if variant.op == op], options):
            if case.tokens != TOKENS[device]:
                continue
            ratios = rows.get((op, case.case, "rotating"), {"speedup": {}})["speedup"]
            times = {"ours": 1 / ratios["frozen"]} if ratios.get("frozen") else {}
            if times:
                times |= {name: ratio / ratios["frozen"] for name, ratio in ratios.items() if name != "frozen"}
            layers.append(Layer(op, *_label(op, case.case), times))
    return layers


def _contender(name: str) -> str:
    return "stock" if name.startswith("PEFT") else name


def layers(result: Result) -> Optional[Figure]:
    """Bars of each adapted layer's time, the frozen layer's = 1; None where no such row is in the file."""
    found = adapted_layers(result)
    if not any(layer.times for layer in found):
        return None
    labels = list(dict.fromkeys(layer.label for layer in found))
    times = {(layer.label, layer.base): {_contender(name): time for name, time in layer.times.items()}
             for layer in found}  # fmt: skip
    present = {name for values in times.values() for name in values}
    known = ("ours", "stock", "torch eager", "torch.compile")
    names = {name: name if name in COLOURS else "other" for name in (*known, *sorted(present - {*known}))
             if name in present}  # fmt: skip
    tokens = TOKENS[_device(result)]
    says = {"ours": "peft_ext", "stock": "PEFT; over NF4 PEFT + bitsandbytes"}
    figure = new_figure("Time of an adapted layer's training step; the frozen bf16 layer = 1", WIDTH,
                        1.6 + 0.14 * (len(names) + 0.9) * len(labels),
                        [patch(COLOURS[colour], says.get(name, name)) for name, colour in names.items()])  # fmt: skip
    panels = figure.subplots(1, len(BASES), sharex=True, sharey=True)
    for axes, (base, title) in zip(panels, BASES.items(), strict=True):
        groups = [(label, times.get((label, base), {})) for label in labels]
        bars(axes, groups, names, name=f"layers.{base}")
        axes.set_title(title)
        axes.axvline(1, color=TEXT, linewidth=0.9, linestyle=(0, (4, 2)), gid=gid("layers", base, "frozen"))
        axes.set_xlabel("time / time of the frozen bf16 layer (less is better)")
    axes.set_xlim(0, 1.09 * max(time for values in times.values() for time in values.values()))
    drops = any("on the low rank" in layer.label and "stock" in times[layer.label, layer.base] for layer in found)
    missing = [f"{layer.label} over {layer.base}".replace("\n", " ") for layer in found if not layer.times]
    caption(
        figure,
        f"One {MAIN} x {MAIN} linear layer, {tokens} tokens, rank 16, float32 adapter, weights out of the cache; "
        "forward and backward, where not said otherwise. Dashed: PyTorch's bf16 layer with no adapter, same run.",
        "PEFT has no dropout on the low rank alone: beside it stands its own, which drops the base term too." * drops,
        f"Not in the result file: {'; '.join(missing)}." if missing else "",
        about_run(result),
    )
    return figure


# --- roofline ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A row's floor in FLOP a byte, and what was reached of it in FLOP a second. ``base``: a key of :data:`BASES`."""

    op: str
    case: str
    base: str
    intensity: float
    ours: float
    peer: Optional[float]


def roofline_points(result: Result) -> tuple[list[Point], list[str]]:
    """``(points, operators without products)`` of 4096 x 4096 with weights out of the cache.

    The peer is PEFT or bitsandbytes, or plain PyTorch where these have no such operator.
    """
    points, without = [], []
    for row in result["rows"]:
        if (row["k"], row["n"], row.get("weights", "hot")) != (int(MAIN), int(MAIN), "rotating"):
            continue
        if not row["flops"]:
            without.append(row["op"])
            continue
        times = row["milliseconds"]
        peer = stock_name(row) or next((name for name in ("torch eager", "dense") if name in times), None)
        reached = {name: 1e3 * row["flops"] / times[name] for name in ("ours", peer) if name}
        base = "nf4" if row["op"].startswith("nf4") or BASES["nf4"] in row["case"] else "bf16"
        points.append(Point(row["op"], row["case"], base, row["flops"] / row["bytes_moved"], reached["ours"],
                            reached.get(peer)))  # fmt: skip
    return points, list(dict.fromkeys(without))


def roofline(result: Result) -> Optional[Figure]:
    """Each row a point, ours and the peer's; None where no row has products."""
    from matplotlib.ticker import FuncFormatter

    points, without = roofline_points(result)
    if not points:
        return None
    ops = [op for op in MARKERS if any(point.op == op for point in points)]
    ops += sorted({point.op for point in points} - {*ops})
    figure = new_figure("Roofline: what each operator reaches of what bytes and products allow", WIDTH, 5.6,
                        _roofline_handles(ops), 5)  # fmt: skip
    low, high = min(point.intensity for point in points) / 1.6, max(point.intensity for point in points) * 1.8
    for axes, (base, title) in zip(figure.subplots(1, 2, sharex=True, sharey=True), BASES.items(), strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        _roofs(axes, result["ceilings"], low, high, base)
        for point in points:
            if point.base == base:
                _draw_point(axes, point)
        axes.set_xlim(low, high)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e9:g}"))
        axes.set_title(f"{title}, or none" if base == "bf16" else title)
        axes.set_xlabel("FLOP/byte of the floor")
        axes.grid()
        hide_frame(axes, "top", "right")
    figure.axes[0].set_ylabel("GFLOP/s: FLOP of the floor / time")
    tokens = sorted({row["tokens"] for row in result["rows"] if row["tokens"]})
    counts = f", {tokens[0]} to {tokens[-1]} tokens" if tokens else ""
    caption(
        figure,
        f"{MAIN} x {MAIN}{counts}, weights out of the cache; a grey line joins ours and its peer. The floor is "
        "the bytes and products of the least work that the operator takes, for both alike: what a contender does "
        "beyond it lowers its point. Black: this machine's memory copy and PyTorch's faster product, in the same run.",
        f"Without products, so not here: {', '.join(without)}." if without else "",
        about_run(result),
    )
    return figure


def _roofline_handles(ops: list[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    def handle(label: str, marker: str, **style: Any) -> Line2D:
        return Line2D([], [], marker=marker, linestyle="", label=label, **style)

    return [
        handle("peft_ext", "o", color=COLOURS["ours"], markersize=5.5),
        handle("PEFT or bitsandbytes, else plain PyTorch", "o", **_PEER),
        *(handle(op, MARKERS.get(op, "*"), color=MUTED, markersize=5) for op in ops),
    ]


_PEER = {"color": "white", "markeredgecolor": "#C47F00", "markersize": 4.5, "markeredgewidth": 1.0}


def _draw_point(axes: Axes, point: Point) -> None:
    marker = MARKERS.get(point.op, "*")
    if point.peer is not None:
        axes.plot([point.intensity] * 2, [point.peer, point.ours], color="#D2D2D2", linewidth=0.6, zorder=1)
        axes.plot(point.intensity, point.peer, marker, **_PEER, zorder=2,
                  gid=gid("roofline", point.op, point.case, "peer"))  # fmt: skip
    axes.plot(point.intensity, point.ours, marker, color=COLOURS["ours"], markeredgecolor="white", markersize=5.5,
              markeredgewidth=0.4, zorder=3, gid=gid("roofline", point.op, point.case, "ours"))  # fmt: skip


def _roofs(axes: Axes, ceilings: dict[str, float], low: float, high: float, base: str) -> None:
    copy = 1e9 * ceilings["copy_gb_s"]
    peaks = {"bf16": "matmul_bf16_tflop_s", "float32": "matmul_f32_tflop_s"}
    found = {text: 1e12 * ceilings[key] for text, key in peaks.items() if ceilings.get(key)}
    peak = max(found.values())
    for text, value in found.items():
        black = value == peak
        axes.plot([value / copy, high], [value, value], color=TEXT if black else "#9A9A9A",
                  linewidth=1.1 if black else 0.8, zorder=0, gid=gid("roofline", base, "ceiling", text))  # fmt: skip
        axes.annotate(f"{text} product, {_flops(value)}" if black else f"{text}, {_flops(value)}",
                      (value / copy, value), (4, 3), textcoords="offset points", fontsize=7 if black else 6.5,
                      color=TEXT if black else MUTED)  # fmt: skip
    ridge = peak / copy
    axes.plot([low, ridge], [low * copy, peak], color=TEXT, linewidth=1.1, zorder=0,
              gid=gid("roofline", base, "ceiling", "copy"))  # fmt: skip
    x = low**0.45 * ridge**0.55
    axes.annotate(f"memory copy,\n{ceilings['copy_gb_s']:.3g} GB/s", (x, x * copy), (-5, 3), textcoords="offset points",
                  ha="right", fontsize=7)  # fmt: skip


def _flops(value: float) -> str:
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"


# --- whole steps ------------------------------------------------------------------------------------------------------


def training(result: Result) -> Optional[Figure]:
    """Tokens/s and peak memory as ratios to PEFT and bitsandbytes; None where no method is in the file."""
    rows = result["rows"]
    if not rows:
        return None
    figure = new_figure("A whole training step; stock PEFT = 1", WIDTH, 1.4 + 0.27 * len(rows))
    panels = figure.subplots(1, 2, sharey=True)
    sides = (("speedup", "tokens_per_s", "tokens/s", "more is better"),
             ("memory", "peak_mib", "peak memory of the process", "less is better"))  # fmt: skip
    for axes, (key, pair, title, better) in zip(panels, sides, strict=True):
        values = [row[key] for row in rows]
        for place, (row, value) in enumerate(zip(rows, values, strict=True)):
            axes.barh(place, value, 0.62, color=COLOURS["ours"], gid=gid("training", row["method"], key))
            means = (sum(row[pair][who]) / len(row[pair][who]) for who in ("ours", "stock"))
            unit = "" if key == "speedup" else " MiB"
            text = beside(axes, value, place, f"{value:.2f}", fontsize=7.5, fontweight="bold")
            beside(axes, 1, 0, " / ".join(f"{mean:.0f}" for mean in means) + unit, xycoords=text, xytext=(4, 0),
                   va="bottom", color=MUTED)  # fmt: skip
        axes.axvline(1, color=TEXT, linewidth=0.9, linestyle=(0, (4, 2)), gid=gid("training", "stock", key))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1.32 * max(1.0, *values))
        axes.set_title(f"{title} ({better})")
        axes.set_xlabel("peft_ext / stock")
        axes.grid(axis="x")
        hide_frame(axes, "top", "right", "left")
    caption(
        figure,
        f"{result['what'][0].upper()}{result['what'][1:]}. In grey: the two that are divided. Stock: PEFT's own "
        "layers; the base of QLoRA and QDoRA is bitsandbytes' NF4 layer in both.",
        about_run(result),
    )
    return figure


# --- loss curves ------------------------------------------------------------------------------------------------------


def losses(result: Result) -> Optional[Figure]:
    """A panel for each method in bfloat16, ours and its twin's; how far they are apart, in float32 too."""
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    rows = [row for row in result["rows"] if row["dtype"] == "bfloat16"]
    if not rows:
        return None
    exact = {row["method"]: row for row in result["rows"] if row["dtype"] == "float32"}
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = new_figure(
        "Training loss, accelerated and not: the same start, the same batches",
        WIDTH,
        1.4 + 1.5 * lines,
        [patch(COLOURS["ours"], "peft_ext"), patch(COLOURS["stock"], "PEFT, or what a panel names")],
    )
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, row in zip(panels, rows, strict=False):
        for who, style in _CURVES.items():
            if curve := row["losses"].get(who):
                axes.plot(range(1, len(curve) + 1), curve, **style, gid=gid("losses", row["method"], who))
        axes.set_yscale("log")
        axes.set_title(row["method"])
        axes.text(0.97, 0.96, _notes(row, exact.get(row["method"])), transform=axes.transAxes, ha="right", va="top",
                  fontsize=6.5, color=MUTED, linespacing=1.3)  # fmt: skip
        if row["pruned"] is not None:
            axes.axvline(row["pruned"] + 1.5, ymax=0.8, color=MUTED, linewidth=0.8, linestyle=(0, (1, 1.5)))
            axes.annotate("pruned", (row["pruned"] + 1.5, 0.04), (3, 0), xycoords=axes.get_xaxis_transform(),
                          textcoords="offset points", fontsize=6.5, color=MUTED)  # fmt: skip
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_locator(LogLocator(base=2))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid()
        hide_frame(axes, "top", "right")
    for axes in panels[len(rows) :]:
        axes.remove()
    figure.supylabel("loss on the labels, bfloat16 base", fontsize=8)
    for axes in panels[max(0, len(rows) - columns) : len(rows)]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    settings = result["settings"]
    caption(
        figure,
        f"SmolLM2-135M-Instruct on BANKING77, {settings['steps']} steps of {settings['batch']} questions. In grey: the "
        f"largest difference of the two curves; in float32 over the first {settings['steps_float32']} steps.",
        about_run(result),
    )
    return figure


_CURVES = {
    "ours": {"color": COLOURS["ours"], "linewidth": 2.2},
    "twin": {"color": COLOURS["stock"], "linewidth": 1.1, "linestyle": (0, (3, 1.5))},
}


def _notes(row: Result, exact: Optional[Result]) -> str:
    """With what a method is compared, where that is not PEFT, and how far the two curves are apart."""
    lines = []
    for name, found in (("bf16", row), ("float32", exact)):
        if found and "twin" in found["losses"]:
            if found["twin"] != "PEFT" and not lines:
                lines += [f"beside {TWINS[found['twin']]}".replace("own ", "own\n")]
            lines.append(f"{name}: {_apart(found['losses'])}")
    return "\n".join(lines or ["nothing to compare with"])


def _apart(curves: dict[str, list[float]]) -> str:
    most = max(abs(a - b) for a, b in zip(curves["ours"], curves["twin"], strict=True))
    return "0" if most == 0 else f"{most:.1e}" if most < 1e-3 else f"{most:.2g}"


# --- pictures ---------------------------------------------------------------------------------------------------------


CHARTS = {"layers": (KERNELS, layers), "roofline": (KERNELS, roofline), "training": (METHODS, training),
          "losses": (LOSSES, losses)}  # fmt: skip


def pictures() -> Iterator[tuple[str, Optional[bytes], str]]:
    """``(name, SVG, why there is none)`` of each chart."""
    todo = [(name, draw, newest(pattern), f"no result file {pattern}") for name, (pattern, draw) in CHARTS.items()]
    for result in newest_by_gpu():
        if "rows" in result and "ceilings" in result:
            where = slug(result["machine"]["gpu"]["name"])
            todo += [(f"{name}-{where}", CHARTS[name][1], result, "") for name in ("layers", "roofline")]
    for name, draw, result, why in todo:
        with look():
            figure = None if result is None else draw(result)
            if figure is None:
                yield name, None, why if result is None else "the result file has no row for it"
                continue
            text = " ".join(figure.get_supxlabel().split())
            yield name, render(figure, ".svg", text, source(result)), ""


def source(result: Result) -> str:
    """What tells a result file from another."""
    digest = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
    return f"{result['machine']['date']}, sha256 {digest[:16]}"


def same(there: bytes, drawn: bytes) -> bool:
    """Whether a picture is the one that is drawn now; of another matplotlib's the result file alone is compared."""
    if there == drawn:
        return True
    creators, sources = zip(*((_says(data, "creator"), _says(data, "source")) for data in (there, drawn)), strict=True)
    return creators[0] != creators[1] and sources[0] is not None and sources[0] == sources[1]


def _says(picture: bytes, what: str) -> Optional[str]:
    found = re.search(rf"<dc:{what}>(.*?)</dc:{what}>", picture.decode(errors="replace"), re.DOTALL)
    return found and unescape(re.sub("<[^>]*>", "", found[1])).strip()


def main(argv: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.charts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a picture is not up to date")
    parser.add_argument("--out", type=Path, default=IMAGES, help="the folder; default: docs/images")
    args = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        sys.exit("error: charts need matplotlib: pip install 'peft_ext[bench]'")
    if not args.check:
        args.out.mkdir(parents=True, exist_ok=True)
    stale = []
    for name, data, why in pictures():
        path = args.out / f"{name}.svg"
        if data is None:
            print(f"not drawn: {name}: {why}")
            if path.exists():
                stale.append(path.name)
        elif args.check:
            if not path.exists() or not same(path.read_bytes(), data):
                stale.append(path.name)
        else:
            with atomic_file(path, "wb") as file:
                file.write(data)
            print(f"drawn: {path}")
    if stale:
        sys.exit(f"error: {', '.join(stale)} in {args.out}: not what the result files draw; run python -m "
                 "benchmarks.charts")  # fmt: skip


if __name__ == "__main__":
    main()
