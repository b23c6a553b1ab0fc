"""``python -m benchmarks.charts [--check] [--out FOLDER]``: draw docs/images/*.svg from the newest result files.

``layers``     the time of each adapted layer's step, the frozen bf16 layer's = 1
``roofline``   what each operator reaches, over what its bytes and products allow
``training``   tokens/s and peak memory of whole training steps, against PEFT and bitsandbytes
``losses``     loss curves of every method, accelerated and not

``layers`` and ``roofline`` are drawn once more for each GPU that was measured, ``-<gpu>`` in their names. Each number
is one of a result file: what is not in it is not drawn, and the chart or its caption says so. The same files give the
same bytes. ``--check`` writes nothing and fails where a picture is not what it would draw.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from peft_ext.chart import Panel, Picture, Scale, identifier, rows_scale, text_width
from peft_ext.files import atomic_file

from . import tables
from .convergence import PATTERN as LOSSES
from .convergence_methods import TWINS
from .cuda import slug
from .grid import MAIN, Options, cases
from .tables import KERNELS, METHODS, Result, about, about_gpu, is_of_a_gpu, newest, newest_by_gpu

IMAGES = tables.ROOT / "docs" / "images"
TOKENS = {"cpu": 512, "cuda": 2048}  # where torch.compile takes part
# The layers with an adapter, in their order; an operator's benchmark has its name.
ADAPTED = {"lora_linear": "LoRA", "grouped_lora_linear": "Mixed batch", "dora_linear": "DoRA", "ia3_linear": "IA3"}
BASES = {"bf16": "bf16 base", "nf4": "NF4 base"}
# Of each operator's point in the roofline; one that is not here is a star.
MARK = {"lora_linear": "circle", "dora_linear": "square", "ia3_linear": "up", "grouped_lora_linear": "plus",
        "nf4_linear": "diamond", "bottleneck_adapter": "down", "dora_weight_norm": "cross"}  # fmt: skip


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


# By contender: its colour, and its words in the legend where these are not its name.
LOOKS = {"ours": "ours", "stock": "stock", "torch eager": "eager", "torch.compile": "compiled"}
WORDS = {"ours": "peft_ext", "stock": "PEFT; over NF4 PEFT + bitsandbytes"}


def layers(result: Result) -> Optional[Picture]:
    """Bars of each adapted layer's time, the frozen layer's = 1; None where no such row is in the file."""
    found = adapted_layers(result)
    if not any(layer.times for layer in found):
        return None
    labels = list(dict.fromkeys(layer.label for layer in found))
    times = {(layer.label, layer.base): {_contender(name): time for name, time in layer.times.items()}
             for layer in found}  # fmt: skip
    present = {name for values in times.values() for name in values}
    looks = {name: LOOKS.get(name, "other") for name in (*LOOKS, *sorted(present - {*LOOKS})) if name in present}
    picture = Picture("Time of an adapted layer's training step; the frozen bf16 layer = 1",
                      [(look, WORDS.get(name, name)) for name, look in looks.items()])  # fmt: skip
    panels = picture.panels(
        len(BASES), height=(13 * max(3, len(looks)) + 8) * len(labels), left=_gutter(labels), titles=[*BASES.values()],
        x=Scale(0, 1.13 * max(time for values in times.values() for time in values.values())),
        y=rows_scale(len(labels)), x_label="time / time of the frozen bf16 layer (less is better)",
    )  # fmt: skip
    panels[0].row_labels(labels)
    for panel, base in zip(panels, BASES, strict=True):
        panel.x_axis()
        panel.reference(identifier("layers", base, "frozen"), 1)
        panel.bars([times.get((label, base), {}) for label in labels], looks,
                   [identifier(f"layers.{base}", label) for label in labels])  # fmt: skip
    tokens = TOKENS[_device(result)]
    drops = any("on the low rank" in layer.label and "stock" in times[layer.label, layer.base] for layer in found)
    missing = [f"{layer.label} over {layer.base}".replace("\n", " ") for layer in found if not layer.times]
    picture.caption(
        f"One {MAIN} x {MAIN} linear layer, {tokens} tokens, rank 16, float32 adapter, weights out of the cache; "
        "forward and backward, where not said otherwise. Dashed: PyTorch's bf16 layer with no adapter, same run.",
        "PEFT has no dropout on the low rank alone: beside it stands its own, which drops the base term too." * drops,
        f"Not in the result file: {'; '.join(missing)}." if missing else "",
        about_run(result),
    )
    return picture


def _gutter(labels: list[str]) -> float:
    """Returns the room that the labels of rows take."""
    return 12 + max(text_width(line) for label in labels for line in label.split("\n"))


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


def roofline(result: Result) -> Optional[Picture]:
    """Each row a point, ours and the peer's; None where no row has products."""
    points, without = roofline_points(result)
    if not points:
        return None
    ops = [op for op in MARK if any(point.op == op for point in points)]
    ops += sorted({point.op for point in points} - {*ops})
    roofs = {text: 1e12 * result["ceilings"][key] for text, key in PRODUCTS.items() if result["ceilings"].get(key)}
    best, *lower = sorted(roofs, key=roofs.__getitem__, reverse=True)
    copy = 1e9 * result["ceilings"]["copy_gb_s"]
    picture = Picture(
        "Roofline: what each operator reaches of what bytes and products allow",
        [("ours", "peft_ext", "circle"), ("open stock", "PEFT or bitsandbytes, else plain PyTorch", "circle"),
         *(("soft", op, MARK.get(op, "star")) for op in ops),
         ("ink", f"memory copy, {copy / 1e9:.3g} GB/s, up to {best} product, {_flops(roofs[best])}", "line"),
         *(("ink dash", f"{text} product, {_flops(roofs[text])}", "line") for text in lower)],
    )  # fmt: skip
    reached = [value for point in points for value in (point.ours, point.peer) if value is not None]
    wide = [*(point.intensity for point in points), max(roofs.values()) / copy]
    x = Scale(min(wide) / 1.6, max(wide) * 1.8, log=True)
    y = Scale(min(*reached, *roofs.values()) / 1.6, max(*reached, *roofs.values()) * 1.7, log=True)
    panels = picture.panels(len(BASES), height=340, left=46, titles=["bf16 base, or none", "NF4 base"], x=x, y=y,
                            x_label="FLOP/byte of the floor")  # fmt: skip
    for panel, base in zip(panels, BASES, strict=True):
        panel.x_axis()
        panel.y_axis(unit=1e9, labels=panel is panels[0])
        _roofs(panel, copy, roofs, base)
        here = [point for point in points if point.base == base]
        for point in here:
            if point.peer is not None:
                panel.curve("", [(point.intensity, point.peer), (point.intensity, point.ours)], "compiled thin")
        for point in here:
            if point.peer is not None:
                panel.mark(identifier("roofline", point.op, point.case, "peer"), MARK.get(point.op, "star"),
                           point.intensity, point.peer, "open stock")  # fmt: skip
        for point in here:
            panel.mark(identifier("roofline", point.op, point.case, "ours"), MARK.get(point.op, "star"),
                       point.intensity, point.ours, "ours")  # fmt: skip
    tokens = sorted({row["tokens"] for row in result["rows"] if row["tokens"]})
    counts = f", {tokens[0]} to {tokens[-1]} tokens" if tokens else ""
    picture.caption(
        f"Upwards: GFLOP/s, FLOP of the floor over the time. {MAIN} x {MAIN}{counts}, weights out of the cache; a thin "
        "line joins ours and its peer. The floor is the bytes and products of the least work that the operator takes, "
        "for both alike: what a contender does beyond it lowers its point. The other lines: this machine's memory copy "
        "and PyTorch's products, in the same run.",
        f"Without products, so not here: {', '.join(without)}." if without else "",
        about_run(result),
    )
    return picture


PRODUCTS = {"bf16": "matmul_bf16_tflop_s", "float32": "matmul_f32_tflop_s"}


def _roofs(panel: Panel, copy: float, roofs: dict[str, float], base: str) -> None:
    """Draws the copy's slope up to the faster product, and each product's line from where the copy reaches it."""
    peak = max(roofs.values())
    for text, value in roofs.items():
        panel.curve(identifier("roofline", base, "ceiling", text),
                    [(max(value / copy, panel.x.low), value), (panel.x.high, value)],
                    "ink" if value == peak else "ink dash")  # fmt: skip
    low = max(panel.x.low, panel.y.low / copy)
    panel.curve(identifier("roofline", base, "ceiling", "copy"), [(low, low * copy), (peak / copy, peak)], "ink")


def _flops(value: float) -> str:
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"


# --- whole steps ------------------------------------------------------------------------------------------------------


def training(result: Result) -> Optional[Picture]:
    """Tokens/s and peak memory as ratios to PEFT and bitsandbytes; None where no method is in the file."""
    rows = result["rows"]
    if not rows:
        return None
    sides = (("speedup", "tokens_per_s", "tokens/s (more is better)"),
             ("memory", "peak_mib", "peak memory of the process (less is better)"))  # fmt: skip
    picture = Picture("A whole training step; stock PEFT = 1")
    methods = [row["method"] for row in rows]
    most = max(1.0, *(row[key] for row in rows for key, *_ in sides))
    panels = picture.panels(
        len(sides), height=26 * len(rows), left=_gutter(methods), titles=[title for *_, title in sides],
        x=Scale(0, 1.5 * most), y=rows_scale(len(rows)), x_label="peft_ext / stock",
    )  # fmt: skip
    panels[0].row_labels(methods)
    for panel, (key, pair, _) in zip(panels, sides, strict=True):
        panel.x_axis()
        panel.reference(identifier("training", "stock", key), 1)
        for place, row in enumerate(rows):
            panel.bar(identifier("training", row["method"], key), place, row[key], 0.62, "ours")
            means = (sum(row[pair][who]) / len(row[pair][who]) for who in ("ours", "stock"))
            unit = "" if key == "speedup" else " MiB"
            panel.beside(place, row[key], f"{row[key]:.2f}", "bold", " / ".join(f"{mean:.0f}" for mean in means) + unit)
    picture.caption(
        f"{result['what'][0].upper()}{result['what'][1:]}. In grey: the two that are divided. Stock: PEFT's own "
        "layers; the base of QLoRA and QDoRA is bitsandbytes' NF4 layer in both.",
        about_run(result),
    )
    return picture


# --- loss curves ------------------------------------------------------------------------------------------------------


def losses(result: Result) -> Optional[Picture]:
    """A panel for each method in bfloat16, ours and its twin's; how far they are apart, in float32 too."""
    rows = [row for row in result["rows"] if row["dtype"] == "bfloat16"]
    if not rows:
        return None
    exact = {row["method"]: row for row in result["rows"] if row["dtype"] == "float32"}
    picture = Picture("Training loss, accelerated and not: the same start, the same batches",
                      [("ours", "peft_ext"), ("stock", "PEFT, or what a panel names")])  # fmt: skip
    values = [value for row in rows for curve in row["losses"].values() for value in curve]
    steps = max(len(curve) for row in rows for curve in row["losses"].values())
    columns = min(4, len(rows))
    panels = picture.panels(
        len(rows), columns=columns, height=110, left=30, gap=22, titles=[row["method"] for row in rows],
        x=Scale(0, steps + 1), y=Scale(min(values) / 1.1, max(values) * 1.1, log=True), x_label="step",
    )  # fmt: skip
    for place, (panel, row) in enumerate(zip(panels, rows, strict=True)):
        panel.x_axis(whole=True)
        panel.y_axis(labels=place % columns == 0)
        if row["pruned"] is not None:
            panel.reference("", row["pruned"] + 1.5, "soft dot")
            at = panel.at(row["pruned"] + 1.5, panel.y.low)
            panel.picture.text(at[0] + 4, at[1] - 5, "pruned", "small soft halo")
        for who, look in CURVES.items():
            if curve := row["losses"].get(who):
                panel.curve(identifier("losses", row["method"], who), list(enumerate(curve, 1)), look)
        picture.text(panel.left + panel.width - 2, panel.top + 11, _notes(row, exact.get(row["method"])),
                     "small soft halo", "end")  # fmt: skip
    settings = result["settings"]
    picture.caption(
        f"Upwards: loss on the labels, bfloat16 base. SmolLM2-135M-Instruct on BANKING77, {settings['steps']} steps of "
        f"{settings['batch']} questions. In grey: the largest difference of the two curves; in float32 over the first "
        f"{settings['steps_float32']} steps.",
        about_run(result),
    )
    return picture


CURVES = {"ours": "ours thick", "twin": "stock"}


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
        picture = None if result is None else draw(result)
        if picture is None:
            yield name, None, why if result is None else "the result file has no row for it"
        else:
            yield name, picture.svg(), ""


def main(argv: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.charts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a picture is not up to date")
    parser.add_argument("--out", type=Path, default=IMAGES, help="the folder; default: docs/images")
    args = parser.parse_args(argv)
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
            if not path.exists() or path.read_bytes() != data:
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
