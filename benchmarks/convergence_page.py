"""Draws docs/convergence.md from a result file of :mod:`.convergence`."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any, Optional

from .command import markdown
from .convergence_methods import METHODS, TWINS
from .e2e import PROMPT

DTYPES = ("bfloat16", "float32")
LONGEST = 80  # Largest number of characters of the questions on which the runs train.
ENDS = 5  # The tables show the mean loss of a run's first ENDS steps and of its last ENDS steps.

Row = dict[str, Any]


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Returns the absolute difference of the losses of two loss curves at each step of the shorter curve."""
    return [abs(a - b) for a, b in zip(one, other, strict=False)]


def max_difference(row: Row) -> Optional[float]:
    """Returns the largest difference, over the steps, between the losses of a method's two runs; None if the method has
    no twin (second run without peft_ext's kernels)."""
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
    titles = ("| method | twin | fused | loss | twin's loss | held-out loss | twin's held-out loss | difference, most "
              "(mean) | reloaded |")  # fmt: skip
    cells = []
    for row in rows:
        two = bool(row["twin"])
        mean = statistics.mean(differences(row["losses"]["ours"], row["losses"]["twin"])) if two else None
        cells.append((
            row["method"],
            TWINS[row["twin"]],
            f"{row['fused']} of {row['layers']}" if row["layers"] else "–",
            curve_text(row, "ours"),
            curve_text(row, "twin") if two else "–",
            held_out_text(row, "ours"),
            held_out_text(row, "twin") if two else "–",
            f"{_figure(max_difference(row))} ({_figure(mean)})" if two else "–",
            _figure(row["reload_difference"]["max"]),
        ))  # fmt: skip
    return markdown(titles, cells)


def _rounding_table(narrow: list[Row], wide: list[Row]) -> str:
    """Returns a table of how far the losses of a method's bfloat16 runs are from the losses of the method's twin in
    float32, over the steps of this twin."""
    exact = {row["method"]: row["losses"]["twin"] for row in wide if row["twin"]}
    rows = []
    for row in narrow:
        if row["method"] in exact:
            found = [differences(losses, exact[row["method"]]) for losses in row["losses"].values()]
            cells = [f"{_figure(statistics.mean(part))} ({_figure(max(part))})" for part in found]
            rows.append([row["method"], *[*cells, "–"][:2]])
    return markdown("| method | peft_ext, mean (most) | twin, mean (most) |", rows)


def _listed(names: list[str]) -> str:
    """Returns the names, joined by commas and a last "and"."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _agreement(rows: list[Row]) -> str:
    """Returns text that names the methods whose two loss curves are equal, and the largest difference of the other
    methods' curves. Leaves out methods with dropout, because their two runs draw different masks."""
    compared = {
        row["method"]: max_difference(row) for row in rows if row["twin"] and not METHODS[row["method"]].dropout
    }
    if not compared:
        return "no curves were compared"
    same = [name for name, found in compared.items() if found == 0]
    rest = {name: found for name, found in compared.items() if found}
    parts = [f"the two curves of {_listed(same)} are equal to the last recorded digit"] if same else []
    if rest:
        worst = max(rest, key=rest.get)
        parts.append(f"the two curves of {_listed(list(rest))} differ by {_figure(rest[worst])} at most ({worst})")
    return "; ".join(parts)


def _reload_text(rows: list[Row]) -> str:
    changed = [row for row in rows if row["reload_difference"]["max"]]
    if not changed:
        return "Every adapter that is saved and loaded over a new base gives the same logits, bit for bit."
    listed = ", ".join(
        f"{row['method']} in {row['dtype']} {_figure(row['reload_difference']['max'])} of "
        f"{row['reload_difference']['largest']:.0f}"
        for row in changed
    )
    why = " A saved AdaLoRA adapter has no pruned ranks, so that its sums have fewer terms."
    return (
        f"An adapter that is saved and loaded over a new base gives the same logits, bit for bit, except (largest "
        f"difference of a logit, and largest logit): {listed}."
        f"{why if any(row['method'] == 'AdaLoRA' for row in changed) else ''}"
    )


def _pruning_text(rows: list[Row]) -> str:
    """Returns a text with Diff Pruning's losses before and after the pruning, and at the end of the run."""
    texts = []
    for row in rows:
        if (at := row["pruned"]) is not None and at + 1 < len(row["losses"]["ours"]):
            losses, method = row["losses"]["ours"], METHODS[row["method"]]
            texts.append(
                f"{row['method']} keeps {100 * method.keep:g}% of the entries after step {at + 1}. The pruning takes "
                f"the loss from {losses[at]:.2f} to {losses[at + 1]:.2f}; training the kept entries brings the loss to "
                f"{statistics.mean(losses[-ENDS:]):.2f}. The run has too few steps for gates to close."
            )
    return " ".join(texts) or "no method was pruned."


def draw(result: dict[str, Any]) -> str:
    """Returns the text of docs/convergence.md."""
    about, settings = result["machine"], result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    narrow, wide = ([row for row in result["rows"] if row["dtype"] == dtype] for dtype in DTYPES)
    masked = [row for row in result["rows"] if row["twin"] and METHODS[row["method"]].dropout]
    masks = "".join(
        f" the two runs of {row['method']} draw different masks from the same generator, so that their curves "
        f"cannot be compared step by step. The two curves differ by {_figure(max_difference(row))} at most, by the "
        f"masks and by rounding together, and end at held-out losses of {row['held_out']['ours']['after']:.3f} and "
        f"{row['held_out']['twin']['after']:.3f}."
        for row in masked
    )
    steps = max((row["steps"] for row in wide), default=0)
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    paragraphs = [
        """This page compares short training runs with peft_ext and the same runs with PEFT. The page does not show
        which method is best: the runs are short, and no learning rate was tuned.""",
        f"""SmolLM2-135M-Instruct learns BANKING77 as text: "{PROMPT.partition("{")[0].strip()} ...", then the name of
        the intent. Only the tokens of the intent's name count in the loss. A run with a bfloat16 base has
        {settings["steps"]} steps, and a run in float32 has the first {steps} of these steps. A step trains on
        {settings["batch"]} questions of at most {LONGEST} characters, padded. The held-out loss is the loss of
        {settings["held_out"]} other questions. The optimizer is AdamW with a constant rate.""",
        f"""`python -m benchmarks.convergence` measured the figures, and `python -m benchmarks.convergence --draw` wrote
        this page from them. Machine: {about["cpu"]}, {threads}, path {about["isa"]}; {about["date"]}; {versions}.""",
        """**How two runs are compared.** The two runs of a method start from the same adapter and see the same batches
        in the same order. Of the two runs, peft_ext accelerates one; this page calls the other run the *twin*. The
        twin "PEFT" runs PEFT's own layers over the same base; for QLoRA the base is the same `NF4Linear` in both runs,
        and the twin is not accelerated. The twin "PyTorch" computes the adapter's formula with PyTorch's operators. The
        twin "the model's own parameters" has no adapter and trains the parameters that the adapter stands for. "–"
        means that the method has no twin.""",
        f"""**Columns.** A loss is the mean over the label tokens, without the terms that AdaLoRA and Diff Pruning add.
        "loss" gives the mean of the first {ENDS} steps and of the last {ENDS}. "fused" counts the layers that `explain`
        reports as fused. "difference" is the absolute difference of
        the two curves at a step: the largest one, and in parentheses the mean over the steps. "reloaded" is the largest
        difference of a logit between the trained model and a new base with the saved adapter.""",
        "![Training losses of each method, accelerated and not](images/losses.svg)",
        f"## bfloat16 base, float32 adapter\n\n{_table(narrow)}",
        "## float32",
        "The runs begin with the same weights, converted to float32, "
        f"and have the first {steps} of the {settings['steps']} steps.",
        _table(wide),
        "## How far the runs agree",
        f"In float32 {_agreement(wide)}.",
        f"""In bfloat16 {_agreement(narrow)}. A difference is not an error by itself: both runs round, at different
        places, and each optimizer step carries a rounding on. PEFT adds an adapter's term to a base output that is
        already rounded, which loses part of the small terms of a new adapter; a fused layer rounds the sum of both
        terms once. The two bfloat16 runs of a method approximate the method's float32 run. The table shows how far the
        losses of each bfloat16 run are from the losses of the twin's float32 run, over the {steps} steps of that
        run:""",
        _rounding_table(narrow, wide),
        f"Dropout:{masks or ' no curves were compared.'}",
        f"Saved adapters: {_reload_text(result['rows'])}",
        f"Pruning: {_pruning_text(narrow)}",
        """Prefix and prompt tuning add no layer that peft_ext could fuse. BitFit, Diff Pruning and partial fine-tuning
        run the layers' own code. Over a dense base, `accelerate` fuses no linear layer in the runs of prefix tuning,
        prompt tuning, BitFit, Diff Pruning and partial fine-tuning. The norms, MLPs, attentions and the loss of the
        model may be fused, and change the results by rounding only.""",
    ]
    return "# Convergence\n\n" + "\n\n".join(map(_wrapped, paragraphs)) + "\n"


def _wrapped(paragraph: str) -> str:
    """Returns a paragraph of prose in lines of at most 120 characters, and another paragraph (heading, table or
    picture) unchanged."""
    if paragraph.startswith(("#", "|", "!")):
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), 120, break_long_words=False, break_on_hyphens=False)
