"""``python -m benchmarks.tables``: draw README's tables from the newest result files; no figure is typed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Optional

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- measured: python -m benchmarks.tables -->", "<!-- /measured -->"


def newest(pattern: str) -> Optional[dict[str, Any]]:
    found = sorted(RESULTS.glob(pattern), key=lambda path: json.loads(path.read_text())["machine"]["date"])
    return json.loads(found[-1].read_text()) if found else None


def about(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['cpu']}, {machine['threads']} threads, path {machine['isa']}; {machine['date']}; {versions}"


def speed_table(result: dict[str, Any]) -> str:
    def span(values: list[float]) -> str:
        low, high = min(values), max(values)
        return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f}–{high:.0f}"

    tokens, peak, perplexity = result["tokens_per_s"], result["peak_mib"], result["perplexity"]
    plain = result["perplexity_without_dropout"]
    return f"""**A whole run**: {result["what"]}, dropout 0.05.

| | peft_ext | PEFT + bitsandbytes | ratio |
|---|---|---|---|
| tokens/s | {span(tokens["ours"])} | {span(tokens["stock"])} | **{result["speedup"]:.2f}x** |
| peak memory of the process, MiB | {span(peak["ours"])} | {span(peak["stock"])} | **{result["memory"]:.2f}** |
| held-out perplexity, {perplexity["ours"]["before"]:.2f} before | {perplexity["ours"]["after"]:.2f} | \
{perplexity["stock"]["after"]:.2f} | |
| the same without dropout | {plain["ours"]["after"]:.3f} | {plain["stock"]["after"]:.3f} | |

Without dropout the losses differ by {result["mean_loss_difference"]:.4f} in the mean over the steps and
{result["max_loss_difference"]:.4f} at most. PEFT's 4-bit layer rounds the adapter's term to bfloat16 and adds it to a
base output that is already rounded, which swallows part of a young adapter's small terms; here the sum is rounded once.
{about(result)}."""


def intents_table(result: dict[str, Any]) -> str:
    def listed(kind: str) -> str:
        return ", ".join(f"{100 * value:.1f}%" for value in result["accuracy"][kind])

    return f"""**Accuracy**, {result["what"]}, one figure a seed: peft_ext {listed("ours")}; PEFT + bitsandbytes
{listed("stock")}."""


def kernel_table(result: dict[str, Any]) -> str:
    lines = ["**Kernels**, medians of one interleaved run; 2.00x reads: ours takes half the time.", "",
             "| operator | case | faster than | ours / floor |", "|---|---|---|---|"]  # fmt: skip
    for row in result["rows"]:
        ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["speedup"].items())
        lines.append(f"| `{row['op']}` | {row['case']} | {ratios} | {row['floor_ratio']:.1f} |")
    ceilings = result["ceilings"]
    lines += [
        "",
        f"The floor is bytes or products at the ceilings of the same run: a copy of {ceilings['copy_gb_s']:.0f} GB/s, "
        f"a bf16 product of {1e3 * ceilings['matmul_bf16_tflop_s']:.0f} GFLOP/s. {about(result)}.",
    ]
    return "\n".join(lines)


def main() -> None:
    drawers = (("e2e-speed-*.json", speed_table), ("e2e-intents-*.json", intents_table),
               ("[!e]*.json", kernel_table))  # fmt: skip
    parts = [draw(result) for pattern, draw in drawers if (result := newest(pattern)) is not None]
    text = README.read_text()
    body = "\n\n".join([BEGIN, *parts, END])
    changed, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: body, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"error: {README.name} has {count} places marked {BEGIN}, wanted one")
    README.write_text(changed)


if __name__ == "__main__":
    main()
