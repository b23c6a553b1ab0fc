"""docs/convergence.md, drawn from what a result file of :mod:`.convergence` holds."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any, Optional

from .convergence_methods import METHODS, TWINS
from .e2e import PROMPT

__all__ = ["DTYPES", "LONGEST", "Row", "curve_text", "differences", "draw", "held_out_text", "max_difference"]

DTYPES = ("bfloat16", "float32")
LONGEST = 80  # characters of a question
ENDS = 5  # steps over which the first and the last loss are means

Row = dict[str, Any]


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Of two curves, step by step, as far as the shorter one goes."""
    return [abs(a - b) for a, b in zip(one, other, strict=False)]


def max_difference(row: Row) -> Optional[float]:
    """Between the two runs; None where there is no twin."""
    return max(differences(row["losses"]["ours"], row["losses"]["twin"])) if row["twin"] else None


def _ends(losses: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(losses[:ENDS]), statistics.mean(losses[-ENDS:])


def curve_text(row: Row, kind: str) -> str:
    first, last = _ends(row["losses"][kind])
    return f"{first:.3f} → {last:.3f}"


def held_out_text(row: Row, kind: str) -> str:
    found = row["held_out"][kind]
    return f"{found['before']:.3f} → {found['after']:.3f}"


def _figure(value: Optional[float]) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.4f}"


def _table(rows: list[Row]) -> str:
    lines = ["| method | compared with | fused | loss | the other's | held out | the other's | curves differ, most "
             "(mean) | reloaded | time |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        two = bool(row["twin"])
        mean = statistics.mean(differences(row["losses"]["ours"], row["losses"]["twin"])) if two else None
        cells = (
            row["method"],
            TWINS[row["twin"]],
            f"{row['fused']} of {row['layers']}" if row["layers"] else "–",
            curve_text(row, "ours"),
            curve_text(row, "twin") if two else "–",
            held_out_text(row, "ours"),
            held_out_text(row, "twin") if two else "–",
            f"{_figure(max_difference(row))} ({_figure(mean)})" if two else "–",
            _figure(row["reload_difference"]["max"]),
            f"{row['time_ratio']:.2f}x" if two else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rounding_table(narrow: list[Row], wide: list[Row]) -> str:
    """How far both bfloat16 runs are from the float32 run that they round, over the latter's steps."""
    exact = {row["method"]: row["losses"]["twin"] for row in wide if row["twin"]}
    lines = ["| method | ours, mean (most) | the other's, mean (most) |", "|---|---|---|"]
    for row in narrow:
        if row["method"] in exact:
            found = [differences(losses, exact[row["method"]]) for losses in row["losses"].values()]
            cells = [f"{_figure(statistics.mean(part))} ({_figure(max(part))})" for part in found]
            lines.append(f"| {row['method']} | {' | '.join([*cells, '–'][:2])} |")
    return "\n".join(lines)


def _agreement(rows: list[Row]) -> str:
    """Whose curves are the same bits, and the largest difference of the rest; masks that differ are left out."""
    compared = {
        row["method"]: max_difference(row) for row in rows if row["twin"] and not METHODS[row["method"]].dropout
    }
    if not compared:
        return "nothing was compared"
    same = [name for name, found in compared.items() if found == 0]
    rest = {name: found for name, found in compared.items() if found}
    parts = [f"the curves of {', '.join(same)} are the same to the last digit recorded"] if same else []
    if rest:
        worst = max(rest, key=rest.get)
        parts.append(f"those of {', '.join(rest)} differ by {_figure(rest[worst])} at most ({worst})")
    return "; ".join(parts)


def _reload_text(rows: list[Row]) -> str:
    changed = [row for row in rows if row["reload_difference"]["max"]]
    if not changed:
        return "Every adapter, saved and read again over a fresh base, gives the very same logits."
    listed = ", ".join(
        f"{row['method']} in {row['dtype']} {_figure(row['reload_difference']['max'])} of "
        f"{row['reload_difference']['largest']:.0f}"
        for row in changed
    )
    why = " AdaLoRA is read without the ranks it gave up, which are other sums."
    return (
        f"An adapter, saved and read again over a fresh base, gives the very same logits, except (largest difference, "
        f"of the largest logit): {listed}.{why if any(row['method'] == 'AdaLoRA' for row in changed) else ''}"
    )


def _pruning_text(rows: list[Row]) -> str:
    """What the pruning in the middle of a run costs, and what is won back after it."""
    texts = []
    for row in rows:
        if (at := row["pruned"]) is not None and at + 1 < len(row["losses"]["ours"]):
            losses, method = row["losses"]["ours"], METHODS[row["method"]]
            texts.append(
                f"{row['method']} keeps {100 * method.keep:g}% of the entries after step {at + 1}, which takes the "
                f"loss from {losses[at]:.2f} to {losses[at + 1]:.2f}; training what is kept brings it to "
                f"{statistics.mean(losses[-ENDS:]):.2f}. Its gates have no time to close in so few steps."
            )
    return " ".join(texts) or "nothing was pruned."


def draw(result: dict[str, Any]) -> str:
    """docs/convergence.md from what a result file holds."""
    about, settings = result["machine"], result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    narrow, wide = ([row for row in result["rows"] if row["dtype"] == dtype] for dtype in DTYPES)
    masked = [row for row in result["rows"] if row["twin"] and METHODS[row["method"]].dropout]
    masks = "".join(
        f" the masks of {row['method']} come from the same generator and are not the same, so its curves can't be "
        f"compared step by step: they differ by {_figure(max_difference(row))} at most, rounding included, and end at "
        f"a held-out loss of {row['held_out']['ours']['after']:.3f} and {row['held_out']['twin']['after']:.3f}."
        for row in masked
    )
    steps = max((row["steps"] for row in wide), default=0)
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    paragraphs = [
        f"""SmolLM2-135M-Instruct learns BANKING77 as text: "{PROMPT.partition("{")[0].strip()} ...", then the intent's
        name, whose tokens alone have a loss. {settings["steps"]} steps of {settings["batch"]} questions of {LONGEST}
        characters at most, padded; {settings["held_out"]} other questions are held out. AdamW, a constant rate. It
        shows that training goes where it should and where PEFT's goes, not what a method is worth: the runs are short
        and no rate was searched for.""",
        f"""Drawn by `python -m benchmarks.convergence --draw` from what `python -m benchmarks.convergence` measured; no
        figure is typed by hand. {about["cpu"]}, {threads}, path {about["isa"]}; {about["date"]}; {versions}.""",
        f"""**How it is compared.** Both runs of a method start from the same adapter, see the same batches in the same
        order, and take each step one after the other. "PEFT": its own layers, over the same base; QLoRA's is the same
        `NF4Linear` in both, not accelerated in the other. "PyTorch": the adapter's formula on PyTorch's operators. "the
        model's own parameters": no adapter at all, the parameters that it stands for are trained. "–": nothing else has
        the method. A loss is the mean over the label tokens, without the terms that AdaLoRA and Diff Pruning add;
        "loss" is the mean of the first {ENDS} steps and of the last {ENDS}. "fused" counts the layers that `explain`
        names. "reloaded" is the largest difference of a logit between the trained model and a fresh base with the saved
        adapter. "time" is the other's step over ours, the median of neighbouring steps, on a shared machine.""",
        f"## bfloat16 base, float32 adapter\n\n{_table(narrow)}",
        "## float32",
        f"The same starts widened to float32, the first {steps} of the {settings['steps']} steps.",
        _table(wide),
        "## What agrees, and how far",
        f"In float32 {_agreement(wide)}.",
        f"""In bfloat16 {_agreement(narrow)}. That is no error by itself: both runs round, at different places, and each
        optimizer step carries a rounding on. PEFT adds an adapter's term to a base output that is rounded already,
        which swallows part of a young adapter's small terms; a fused layer rounds the sum once. What both of them round
        is the float32 run, and over its steps they are as far from it as this:""",
        _rounding_table(narrow, wide),
        f"Dropout:{masks or ' nothing was compared.'}",
        f"Saved adapters: {_reload_text(result['rows'])}",
        f"Pruning: {_pruning_text(narrow)}",
        """Prefix and prompt tuning add no layer that could be fused, and BitFit, Diff Pruning and partial fine-tuning
        run the layers' own code: over a dense base acceleration has nothing to do there, and must change nothing.""",
    ]
    return "# Convergence\n\n" + "\n\n".join(map(_wrapped, paragraphs)) + "\n"


def _wrapped(paragraph: str) -> str:
    """Prose in lines of 120 characters; headings and tables as they are."""
    if paragraph.startswith(("#", "|")):
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), 120, break_long_words=False, break_on_hyphens=False)
