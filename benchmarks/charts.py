"""``python -m benchmarks.charts [--check] [--out FOLDER]``: draws charts in docs/images from the newest result files.

``layers``       time of a LoRA, AdaLoRA or IA3 layer's training step, relative to the frozen bf16 layer
``layers-dora``  time of a DoRA layer's training step, relative to the frozen bf16 layer
``training``     tokens/s and peak memory of whole training steps, relative to PEFT and bitsandbytes
``parts``        time of each part of a training step, relative to the frozen model's step
``losses``       loss curves of each method, with and without acceleration

Each picture shows one result file. For each GPU with a result file, a picture ``layers-<gpu>`` is drawn too. Equal
result files give byte-equal pictures. ``--check`` writes nothing, and fails if a picture in the folder differs from the
picture of its result file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from peft_ext.chart import Picture, Scale, identifier, rows_scale, text_width
from peft_ext.files import atomic_file

from .command import command_parser
from .convergence import NAME as LOSSES
from .convergence_methods import TWINS
from .files import Result, is_of_a_gpu, newest, newest_by_gpu, slug
from .grid import MAIN
from .parts import NAME as STEP_PARTS
from .parts import PARTS
from .tables import DORA, LABELS, LORA, METHODS, ROOT, about, about_gpu

IMAGES = ROOT / "docs" / "images"
TOKENS = {"cpu": 512, "cuda": 2048}  # Charts show rows with this number of tokens, at which torch.compile is measured.
ADAPTED = ("lora_linear", "dora_linear", "ia3_linear")  # Operators of layers with an adapter.
BASES = {"bf16": "bf16 base", "nf4": "NF4 base"}


def _about(result: Result) -> str:
    return f"{about_gpu(result) if is_of_a_gpu(result) else about(result)}."


# --- adapted layers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A row of a result file that a chart shows. ``times``: a dict from the name of a contender to its time divided by
    the frozen bf16 layer's time. ``base``: the kind of the layer's weight, "bf16" or "nf4" (the keys of BASES)."""

    label: str
    base: str
    times: dict[str, float]


def _tokens(result: Result) -> int:
    return TOKENS["cuda" if is_of_a_gpu(result) else "cpu"]


def _label(op: str, case: str) -> tuple[str, str]:
    """Returns the label of a layer in a chart, and the kind of the layer's weight ("bf16" or "nf4"). ``case``: the
    field "case" of a row of a result file, such as "T=512 4096->4096, bf16 base, dropout 0.05"."""
    _, *parts = case.split(", ")
    base = next(key for key, text in BASES.items() if text in parts)
    rest = [part for part in parts if part not in BASES.values()]
    label = ", ".join(rest if "AdaLoRA" in rest else [LABELS[op], *rest])
    return re.sub(r", (dropout \S+) (\w)", r",\n\1 \2", label), base


def adapted_layers(result: Result) -> list[Layer]:
    """Returns the rows of a result file for 4096 x 4096 layers with an adapter, rotating weights and the number of
    tokens of :data:`TOKENS`.

    A contender's time divided by the frozen layer's time is the quotient of two median ratios of the file: the
    contender's time over peft_ext's time, and the frozen layer's time over peft_ext's time.
    """
    layers = []
    for row in result["rows"]:
        ratios, shape = row["speedup"], (row["tokens"], row["k"], row["n"])
        if row["op"] in ADAPTED and shape == (_tokens(result), int(MAIN), int(MAIN)) and row["weights"] == "rotating":
            if frozen := ratios.get("frozen"):
                times = {name: ratio / frozen for name, ratio in ratios.items() if name != "frozen"}
                layers.append(Layer(*_label(row["op"], row["case"]), {"ours": 1 / frozen, **times}))
    return layers


def _contender(name: str) -> str:
    return "stock" if name.startswith("PEFT") else name


# LOOKS has the CSS class of each contender. WORDS has the legend's text of contenders whose text is not their name.
LOOKS = {"ours": "ours", "stock": "stock", "torch eager": "eager", "torch.compile": "compiled"}
WORDS = {"ours": "peft_ext", "stock": "PEFT; over NF4 PEFT + bitsandbytes"}


def layers(result: Result) -> Optional[Picture]:
    """Draws a bar for each layer and contender: the contender's time divided by the frozen layer's time. Returns None
    if :func:`adapted_layers` finds no layer in the result file."""
    found = adapted_layers(result)
    if not found:
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
    drops = any("on the low rank" in layer.label and "stock" in times[layer.label, layer.base] for layer in found)
    picture.caption(
        f"One {MAIN} x {MAIN} linear layer, {_tokens(result)} tokens, rank 16, float32 adapter, forward and backward. "
        "Each call reads its weight from memory, not from a cache. Dashed: PyTorch's bf16 layer without an adapter, in "
        "the same run.",
        "PEFT cannot drop on the low rank alone: PEFT's bar is its own function, which drops on the base term too."
        if drops
        else "",
        _about(result),
    )
    return picture


def _gutter(labels: list[str]) -> float:
    """Returns the width that a picture needs for the labels of its rows."""
    return 12 + max(text_width(line) for label in labels for line in label.split("\n"))


# --- whole steps ------------------------------------------------------------------------------------------------------


def training(result: Result) -> Optional[Picture]:
    """Draws tokens/s and peak memory of each method relative to PEFT and bitsandbytes. Returns None if the result file
    has no row."""
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
        _about(result),
    )
    return picture


def parts(result: Result) -> Optional[Picture]:
    """Draws, for each width of the model, the time of each part of a step divided by the time of the frozen model's
    whole step. Returns None if the result file has no row.
    """
    rows = result["rows"]
    if not rows:
        return None
    looks = {"frozen": "other", "stock": "stock", "ours": "ours"}
    picture = Picture("Where a training step's time goes; the frozen model's whole step = 1",
                      [("other", "the frozen model"), ("stock", "PEFT"), ("ours", "peft_ext")])  # fmt: skip
    times = [
        {part: {kind: of[kind][part] / of["frozen"]["step"] for kind in looks} for part in (*PARTS, "step")}
        for of in (row["milliseconds"] for row in rows)
    ]
    labels = [*PARTS, "whole step"]
    panels = picture.panels(
        len(rows), height=46 * len(labels), left=_gutter(labels), titles=[row["what"] for row in rows],
        x=Scale(0, 1.15 * max(time for row in times for values in row.values() for time in values.values())),
        y=rows_scale(len(labels)), x_label="time / time of the frozen model's step (less is better)",
    )  # fmt: skip
    panels[0].row_labels(labels)
    for panel, row, values in zip(panels, rows, times, strict=True):
        panel.x_axis()
        panel.reference(identifier("parts", row["shape"], "frozen"), 1)
        panel.bars(list(values.values()), looks, [identifier("parts", row["shape"], part) for part in values])
    picture.caption(
        f"{result['what'][0].upper()}{result['what'][1:]}. PEFT's adapters are partly linear layers (their products) "
        "and partly other operators (dropout, casts, sums). The frozen model's step is a forward, and a backward to "
        "the embeddings' output. Each part is the sum of its operators' own times in PyTorch's profiler.",
        _about(result),
    )
    return picture


# --- loss curves ------------------------------------------------------------------------------------------------------


def losses(result: Result) -> Optional[Picture]:
    """Draws a panel for each method, with the loss curves of two bfloat16 runs, the accelerated run and its twin (the
    run without peft_ext's kernels, if there is one), and the largest difference of the two curves."""
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
        _about(result),
    )
    return picture


CURVES = {"ours": "ours thick", "twin": "stock"}


def _notes(row: Result, exact: Optional[Result]) -> str:
    """Returns the notes on a method's panel: the twin (the run that is compared with the accelerated run), if the twin
    is not PEFT, and the largest difference of the losses of the two runs in each dtype."""
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


CHARTS = {"layers": (LORA, layers), "layers-dora": (DORA, layers), "training": (METHODS, training),
          "parts": (STEP_PARTS, parts), "losses": (LOSSES, losses)}  # fmt: skip


def pictures() -> Iterator[tuple[str, Optional[bytes], str]]:
    """Yields, for each picture, its name, its SVG (None if the picture cannot be drawn), and the reason why the picture
    cannot be drawn ("" if it can)."""
    todo = [(name, draw, newest(file), f"no result file {file}-<date>.json") for name, (file, draw) in CHARTS.items()]
    todo += [(f"layers-{slug(found['machine']['gpu']['name'])}", layers, found, "") for found in newest_by_gpu()]
    for name, draw, result, why in todo:
        picture = None if result is None else draw(result)
        if picture is None:
            yield name, None, why if result is None else "the result file has no row for it"
        else:
            yield name, picture.svg(), ""


def main(argv: Optional[list[str]] = None) -> None:
    parser = command_parser("benchmarks.charts", __doc__)
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
