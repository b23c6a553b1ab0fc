"""``python -m benchmarks.tables [--check]``: draw the documents' tables from the newest result files.

No figure is typed by hand. A place is marked ``<!-- measured NAME: python -m benchmarks.tables -->``, down to
``<!-- /measured -->``; NAME is one of :data:`DRAWN`, and README's summary has none. ``--check`` writes nothing and
fails where a document is not what it would draw.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Optional

from .goals import goals_table
from .harness import floor_ms, rate, ratio_text
from .layers import RANK

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
MARK = re.compile(r"(<!-- measured( [\w-]+)?: python -m benchmarks\.tables -->).*?(<!-- /measured -->)", re.DOTALL)
NOTHING = "Not measured yet."
KERNELS, METHODS = "[!e]*.json", "e2e-methods-*.json"

Result = dict[str, Any]


# --- result files -----------------------------------------------------------------------------------------------------


def results(pattern: str) -> list[Result]:
    """From the oldest to the newest."""
    found = [(path.name, json.loads(path.read_text())) for path in RESULTS.glob(pattern)]
    return [result for _, result in sorted(found, key=lambda item: (item[1]["machine"]["date"], item[0]))]


def is_of_a_gpu(result: Result) -> bool:
    return result["machine"].get("device") == "cuda"


def is_forced(result: Result) -> bool:
    """Whether the run was kept off the best path that its CPU has."""
    return "PEFT_EXT_CPU_ISA" in result["machine"].get("environment", {})


def newest(pattern: str) -> Optional[Result]:
    """The newest of those that ran on their CPU's best path."""
    free = [result for result in results(pattern) if not is_forced(result) and not is_of_a_gpu(result)]
    return free[-1] if free else None


def newest_forced(pattern: str) -> list[Result]:
    """The newest of each path that was forced."""
    forced = [result for result in results(pattern) if is_forced(result) and not is_of_a_gpu(result)]
    return list({result["machine"]["isa"]: result for result in forced}.values())


def newest_by_gpu() -> list[Result]:
    """The newest of each GPU."""
    return list({found["machine"]["gpu"]["name"]: found for found in results("*.json") if is_of_a_gpu(found)}.values())


def about(result: Result) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    environment = "".join(f", {name}={value}" for name, value in machine.get("environment", {}).items())
    return (f"{machine['cpu']}, {machine['threads']} threads, path {machine['isa']}{environment}; {machine['date']}; "
            f"{versions}")  # fmt: skip


def about_ceilings(result: Result) -> str:
    ceilings = result["ceilings"]
    f32 = ceilings.get("matmul_f32_tflop_s")
    read = ceilings.get("read_gb_s")
    return (f"a copy of {ceilings['copy_gb_s']:.0f} GB/s{'' if read is None else f', reading at {read:.0f} GB/s'}, "
            f"a bf16 product of {1e3 * ceilings['matmul_bf16_tflop_s']:.0f} GFLOP/s"
            f"{'' if f32 is None else f', a float32 one of {1e3 * f32:.0f} GFLOP/s'}")  # fmt: skip


# --- kernels ----------------------------------------------------------------------------------------------------------


def roofline(row: Result, result: Result) -> float:
    """The floor in percent of our time."""
    floor = floor_ms(row["bytes_moved"], row["flops"], result["ceilings"], row.get("reads", False))
    return 100 * floor / next(iter(row["milliseconds"].values()))


def ratios(row: Result) -> str:
    return ratio_text(row["speedup"], row.get("quartiles", {}))


def by_operator(rows: list[Result]) -> list[Result]:
    """Those of an operator together, in the order in which they ran."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    return sorted(rows, key=lambda row: ops.index(row["op"]))


def absent_text(rows: list[Result]) -> str:
    absent = {f"{name} ({reason})" for row in rows for name, reason in row.get("absent", {}).items()}
    return f"Absent where no ratio is shown: {'; '.join(sorted(absent))}." if absent else ""


def kernel_table(result: Result, keep: Callable[[Result], bool]) -> str:
    rows = [row for row in result["rows"] if keep(row)]
    if not rows:
        return NOTHING
    lines = ["| operator | case | weights | faster than | % of roofline |", "|---|---|---|---|---|"]
    for row in by_operator(rows):
        lines.append(f"| `{row['op']}` | {row['case']} | {row.get('weights', 'hot')} | {ratios(row)} | "
                     f"{roofline(row, result):.0f} |")  # fmt: skip
    if absent := absent_text(rows):
        lines += ["", absent]
    return "\n".join(lines)


def operator(*ops: str) -> Callable[[], str]:
    def draw() -> str:
        result = newest(KERNELS)
        return NOTHING if result is None else kernel_table(result, lambda row: row["op"] in ops)

    return draw


def of_its_own(run: str, *ops: str) -> Callable[[], str]:
    """Of a run of its own (``python -m benchmarks attention --out benchmarks/results/e2e-attention-...``)."""

    def draw() -> str:
        pattern = f"e2e-{run}-*.json"
        found = [result for result in [newest(pattern), *newest_forced(pattern)] if result is not None]
        return "\n\n".join(
            f"{about(result)}. Ceilings of this run: {about_ceilings(result)}.\n\n"
            f"{kernel_table(result, lambda row: row['op'] in ops)}"
            for result in found
        ) or NOTHING  # fmt: skip

    return draw


def error_table() -> str:
    """By operator: the largest relative error to float64, ours and each peer's, over the cases that both have."""
    result = newest(KERNELS)
    worst: dict[str, dict[str, float]] = {}
    for row in result["rows"] if result else ():
        for name, errors in row.get("errors", {}).items():
            if isinstance(errors, dict):
                of_op = worst.setdefault(row["op"], {})
                of_op[name] = max(of_op.get(name, 0.0), *errors.values())
    if not worst:
        return NOTHING
    names = list(dict.fromkeys(name for errors in worst.values() for name in errors))
    lines = [f"| operator | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for op, errors in worst.items():
        cells = ("" if (error := errors.get(name)) is None else f"{error:.1e}" if error else "0" for name in names)
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine_text() -> str:
    result = newest(KERNELS)
    if result is None:
        return NOTHING
    return f"Machine: {about(result)}.\nCeilings of this run: {about_ceilings(result)}."


def isa_tables() -> str:
    """For each forced path: the rows of the summary, and the slowest against PEFT and bitsandbytes of all rows."""
    parts = []
    for result in newest_forced(KERNELS):
        stock = [(ratio, name, row) for row in result["rows"] for name, ratio in row["speedup"].items()
                 if name.startswith(("PEFT", "bitsandbytes"))]  # fmt: skip
        worst = ""
        if stock:
            ratio, name, row = min(stock, key=lambda item: item[0])
            worst = (f"Of {len(stock)} ratios to PEFT and bitsandbytes the least is {ratio:.2f}x: `{row['op']}`, "
                     f"{row['case']}, {row['weights']}, to {name}.")  # fmt: skip
        parts += [f"### {result['machine']['isa']}", f"{about(result)}. Ceilings: {about_ceilings(result)}. {worst}",
                  kernel_table(result, lambda row: row.get("summary", True))]  # fmt: skip
        parts += [methods_table(found) for found in newest_forced(METHODS)
                  if found["machine"]["isa"] == result["machine"]["isa"]]  # fmt: skip
    return "\n\n".join(parts) or NOTHING


# --- a GPU ------------------------------------------------------------------------------------------------------------


def about_gpu(result: Result) -> str:
    machine, ceilings = result["machine"], result["ceilings"]
    gpu = machine["gpu"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    driver = f", driver {gpu['driver']}" if "driver" in gpu else ""
    clocks = "".join(f", {what} {gpu[key]} of {gpu[most]} MHz" for what, key, most in
                     (("SM clock", "sm_mhz", "max_sm_mhz"), ("memory clock", "memory_mhz", "max_memory_mhz"))
                     if key in gpu and most in gpu)  # fmt: skip
    return (f"{gpu['name']}, capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
            f"{gpu['memory_gib']} GiB{clocks}; CUDA {gpu['cuda']}{driver}; {machine['date']}; {versions}. "
            f"Ceilings of this run: a copy of {ceilings['copy_gb_s']:.0f} GB/s, a bf16 product of "
            f"{ceilings['matmul_bf16_tflop_s']:.0f} TFLOP/s, a float32 one of "
            f"{ceilings['matmul_f32_tflop_s']:.1f} TFLOP/s.")  # fmt: skip


def gpu_kernel_table(result: Result) -> str:
    lines = [
        "| operator | case | weights | ms | faster than | reached | % of roofline |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in by_operator(result["rows"]):
        ours = row["milliseconds"]["ours"]
        reached = rate(row["bytes_moved"], row["flops"], ours, result["ceilings"], row.get("reads", False))
        lines.append(f"| `{row['op']}` | {row['case']} | {row['weights']} | {ours:.3f} | {ratios(row)} | {reached} | "
                     f"{roofline(row, result):.0f} |")  # fmt: skip
    return "\n".join(lines)


def gpu_tables() -> str:
    """For each GPU that was measured: the goals, then every row."""
    parts = []
    for result in newest_by_gpu():
        parts += [f"### {result['machine']['gpu']['name']}", about_gpu(result), goals_table(result),
                  gpu_kernel_table(result)]  # fmt: skip
        if absent := absent_text(result["rows"]):
            parts.append(absent)
        if unfinished := [*result["left_out"], *result.get("failed", ())]:
            parts.append(f"Not measured: {'; '.join(unfinished)}.")
    return "\n\n".join(parts) or "No GPU has been measured."


# --- whole runs -------------------------------------------------------------------------------------------------------


def span(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:.0f}" if round(low) == round(high) else f"{low:.0f}–{high:.0f}"


def speed_table(result: Result) -> str:
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


def methods_table(result: Result) -> str:
    """Ratios alone; the medians are in the result file."""
    lines = [f"**A training step** of {result['what']}, against PEFT + bitsandbytes.", "",
             "| method | tokens/s | peak memory | layers fused |", "|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {row['method']} | **{row['speedup']:.2f}x** | **{row['memory']:.2f}** | {row['fused']} of {row['layers']} |"
        for row in result["rows"]
    ]
    compared = [row["max_loss_difference"] for row in result["rows"] if row["max_loss_difference"] is not None]
    if compared:
        lines += ["", f"Without dropout the losses of the steps differ by {max(compared):.4f} at most."]
    return "\n".join([*lines, "", f"{about(result)}."])


def intents_table(result: Result) -> str:
    def listed(kind: str) -> str:
        return ", ".join(f"{100 * value:.1f}%" for value in result["accuracy"][kind])

    return f"""**Accuracy**, {result["what"]}, one figure a seed: peft_ext {listed("ours")}; PEFT + bitsandbytes
{listed("stock")}."""


def experts_table(result: Result) -> str:
    lines = [f"**A mixture of experts**: forward and backward of {result['what']}; ratios to the frozen model.", "",
             "| | time | peak memory | weights | tokens/s, of PEFT's |", "|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {row['name']} | {row['time']:.2f} | {row['memory']:.2f} | {row['weights']:.2f} | {row['over_stock']:.2f}x |"
        for row in result["rows"]
    ]
    return "\n".join([*lines, "", f"{about(result)}."])


def experts_text() -> str:
    result = newest("e2e-experts-*.json")
    return NOTHING if result is None else experts_table(result)


def methods_text() -> str:
    result = newest(METHODS)
    return NOTHING if result is None else methods_table(result)


def _methods_of(pattern: str) -> str:
    result = newest(pattern)
    return NOTHING if result is None else methods_table(result)


def summary() -> str:
    drawers = (("e2e-speed-*.json", speed_table), (METHODS, methods_table), ("e2e-intents-*.json", intents_table))
    parts = [draw(result) for pattern, draw in drawers if (result := newest(pattern)) is not None]
    return "\n\n".join(parts) or NOTHING


def calls_text() -> str:
    if (result := newest("e2e-calls-*.json")) is None:
        return NOTHING
    calls = [name for name in result["rows"][0] if name != "method"]
    lines = ["| microseconds a layer: PEFT, ours (ours over PEFT) | " + " | ".join(calls) + " |",
             "|---" * (1 + len(calls)) + "|"]  # fmt: skip
    for row in result["rows"]:
        cells = (f"{row[c]['stock']:.0f}, {row[c]['ours']:.0f} ({row[c]['of_stock']:.2f})" for c in calls)
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{about(result)}."])


def float32_text() -> str:
    found = [result for result in results("e2e-float32-*.json") if not is_of_a_gpu(result)]
    if not found:
        return NOTHING
    result = found[-1]  # forced, mostly
    shapes = list(dict.fromkeys((row["k"], row["n"]) for row in result["rows"]))
    cells = {(row["method"], row["k"], row["n"]): row for row in result["rows"]}
    lines = ["| of the frozen layer's time; times as fast as PEFT's | " + " | ".join(f"{k}->{n}" for k, n in shapes)
             + " |", "|---" * (1 + len(shapes)) + "|"]  # fmt: skip
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        rows = (cells[(method, *shape)] for shape in shapes)
        told = (f"{row['of_frozen']['median']:.2f}; {_spread(row['over_stock'])}" for row in rows)
        lines.append(f"| {method} | " + " | ".join(told) + " |")
    return "\n".join([*lines, "", f"{about(result)}."])


def layers_text() -> str:
    result = newest("e2e-layers-*.json")
    if result is None:
        return NOTHING
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    cells = {(row["k"], row["n"], row["tokens"], row["method"]): row for row in result["rows"]}
    lines = ["| layer | T | floor | " + " | ".join(methods) + " |", "|---" * (3 + len(methods)) + "|"]
    for k, n, tokens in dict.fromkeys(key[:3] for key in cells):
        rows = [cells[(k, n, tokens, method)] for method in methods]
        told = (f"{_spread(row['of_frozen'])}; {_spread(row['over_stock'])}" for row in rows)
        lines.append(f"| {k}->{n} | {tokens} | {_rank_floor(rows[0], result):.2f} | " + " | ".join(told) + " |")
    return "\n".join([*lines, "", f"{about(result)}. Ceilings of this run: {about_ceilings(result)}."])


def _rank_floor(row: Result, result: Result) -> float:
    """Of the frozen layer's time: that, and the products of the rank at the rate of PyTorch's float32 product."""
    products = 6 * row["tokens"] * RANK * (row["k"] + row["n"])
    return 1 + products / result["ceilings"]["matmul_f32_tflop_s"] / 1e9 / row["milliseconds"]["frozen"]


def _spread(ratio: dict[str, Any]) -> str:
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"


# --- documents --------------------------------------------------------------------------------------------------------

DRAWN: dict[str, Callable[[], str]] = {
    "": summary,
    "machine": machine_text,
    "errors": error_table,
    "nf4": of_its_own("nf4", "nf4_quantize", "nf4_dequantize", "nf4_linear"),
    "lora": of_its_own("lora", "lora_linear"),
    "mixed": operator("grouped_lora_linear"),
    "bottleneck": operator("bottleneck_adapter"),
    "dora": of_its_own("dora", "dora_linear", "dora_weight_norm"),
    "ia3": of_its_own("lora", "ia3_linear", "ia3_scale"),
    "attention": of_its_own("attention", "scaled_dot_product_attention"),
    "dropout": of_its_own("dora", "dropout"),
    "methods": methods_text,
    "experts": experts_text,
    "calls": calls_text,
    "float32": float32_text,
    "layers": layers_text,
    "1b": partial(_methods_of, "e2e-steps-1b-*.json"),
    "checkpointing": partial(_methods_of, "e2e-steps-checkpointing-*.json"),
    "paths": isa_tables,
    "gpu": gpu_tables,
}


def draw(text: str, where: str = "the document") -> str:
    """``text`` with every marked place drawn anew. Raises SystemExit where there is none, or a name is unknown."""

    def place(match: re.Match[str]) -> str:
        name = (match[2] or "").strip()
        if name not in DRAWN:
            raise SystemExit(f"error: {where} marks a place {name!r}, wanted one of {', '.join(filter(None, DRAWN))}")
        return f"{match[1]}\n\n{DRAWN[name]()}\n\n{match[3]}"

    drawn, count = MARK.subn(place, text)
    if count == 0:
        raise SystemExit(f"error: {where} has no place marked <!-- measured: python -m benchmarks.tables -->")
    return drawn


def main(argv: Optional[list[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document is not up to date")
    args = parser.parse_args(argv)
    for path in DOCUMENTS:
        before = path.read_text()
        after = draw(before, path.name)
        if args.check and after != before:
            sys.exit(f"error: {path.relative_to(ROOT)} is not what the result files draw; run python -m "
                     "benchmarks.tables")  # fmt: skip
        if not args.check:
            path.write_text(after)


if __name__ == "__main__":
    main()
