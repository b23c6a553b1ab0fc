"""``python -m benchmarks.tables [--check]``: draws the measured tables of README.md and of four pages of docs.

The tables are between ``<!-- measured NAME: python -m benchmarks.tables -->`` and ``<!-- /measured -->``. NAME is a key
of :data:`DRAWN`; the mark in README.md has no NAME. A table shows the newest result file of one name or of one GPU,
with the machine and the date of the file. ``--check`` writes nothing, and fails if a document differs from its result
files.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Optional

from . import compiled, generation, llama_cpp, llama_speed, packed_memory, packed_training
from .command import command_parser, markdown
from .files import Result, newest, newest_by_gpu
from .harness import ratio_text, spread_text

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("performance.md", "formats.md", "llama-cpp.md",
                                                                     "gguf.md")))  # fmt: skip
MARK = re.compile(r"(<!-- measured( [\w-]+)?: python -m benchmarks\.tables -->).*?(<!-- /measured -->)", re.DOTALL)
NOTHING = "Not measured yet."

# Names, without the date, of some of the result files that the documents show.
LORA, DORA = "layer-lora_ia3-avx512_bf16", "layer-dora_dropouts-avx512_bf16"
NF4, ATTENTION = "layer-nf4-avx512_bf16", "layer-attention-avx512_bf16"
METHODS = "step-methods-avx512_bf16"

LABELS = {"lora_linear": "LoRA", "dora_linear": "DoRA", "ia3_linear": "IA3", "nf4_linear": "NF4",
          "scaled_dot_product_attention": "attention"}  # fmt: skip


def about(result: Result) -> str:
    """Returns, as text, the processor, the number of threads, the CPU path, the environment variables, the date and the
    versions of the packages of a run."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    environment = "".join(f", {name}={value}" for name, value in machine.get("environment", {}).items())
    return (f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}, path {machine['isa']}"
            f"{environment}; {machine['date']}; {versions}")  # fmt: skip


def about_gpu(result: Result) -> str:
    """Returns, as text, the GPU of a run and its clocks, the versions of CUDA and of the driver, the date, and the
    versions of the packages."""
    machine = result["machine"]
    gpu = machine["gpu"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    driver = f", driver {gpu['driver']}" if "driver" in gpu else ""
    clock = f", SM clock {gpu['sm_mhz']} of {gpu['max_sm_mhz']} MHz" if "max_sm_mhz" in gpu else ""
    return (f"{gpu['name']}, capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
            f"{gpu['memory_gib']} GiB{clock}; CUDA {gpu['cuda']}{driver}; {machine['date']}; {versions}")  # fmt: skip


def _table(corner: str, cells: dict[tuple[str, str], str]) -> str:
    """Returns a Markdown table of ``{(row, column): text}``, with rows and columns in the order of the dictionary. A
    " | " in ``corner`` and in the names of the rows makes one more column of names."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    titles = f"| {' | '.join([corner, *columns])} |"
    return markdown(titles, [[row, *(cells.get((row, column), "") for column in columns)] for row in rows])


# --- operators and layers ---------------------------------------------------------------------------------------------


def peers_table(result: Result, op: str, peers: Iterable[str]) -> str:
    """Returns a table of each peer's time divided by peft_ext's time.

    The table has a row for each case and peer, and a column for each number of tokens.
    """
    found = {(row["case"].partition(", ")[2], row["tokens"]): row for row in result["rows"] if row["op"] == op}
    cases, all_tokens = dict.fromkeys(case for case, _ in found), sorted({tokens for _, tokens in found})
    cells = {}
    for case, peer, tokens in itertools.product(cases, peers, all_tokens):
        row = found.get((case, tokens))
        if row and peer in row["speedup"]:
            layer = case if case.startswith("AdaLoRA") else f"{LABELS.get(op, op)}, {case}"
            ratio = f"{row['speedup'][peer]:.2f}{spread_text(row['quartiles'][peer])}"
            cells[f"{layer} | {peer}", f"T={tokens}"] = ratio
    return _table("layer | compared with", cells)


def cases_table(rows: Iterable[Result]) -> str:
    """Returns a table with a row for each case: peft_ext's time, and each peer's time divided by peft_ext's time."""
    rows = list(rows)
    metered = any(row.get("meter") for row in rows)
    titles = "| operator | case | weights | ms | faster than |" + " W; MHz |" * metered
    cells = []
    for row in rows:
        meter = row.get("meter") or {}
        cells.append((f"`{row['op']}`", row["case"], row["weights"], f"{row['milliseconds']['ours']:.3f}",
                      ratio_text(row["speedup"], row["quartiles"]),
                      *[f"{meter.get('power_w', '-')}; {meter.get('sm_mhz', '-')}"] * metered))  # fmt: skip
    return markdown(titles, cells)


def quantize_table(result: Result) -> str:
    return cases_table(row for row in result["rows"] if row["op"] in ("nf4_quantize", "nf4_dequantize"))


def gpu_tables() -> str:
    """Returns tables with all rows of each measured GPU."""
    parts = []
    for result in newest_by_gpu():
        parts += [f"### {result['machine']['gpu']['name']}", f"{about_gpu(result)}.", cases_table(result["rows"])]
        absent = {f"{peer} ({why})" for row in result["rows"] for peer, why in row["absent"].items()}
        if missing := [*sorted(absent), *result["left_out"], *result["failed"]]:
            parts.append(f"Not measured: {'; '.join(missing)}.")
    return "\n\n".join(parts) or "No GPU has been measured."


def _of_frozen(row: Result) -> str:
    return f"{row['of_frozen']['median']:.2f}; {row['over_stock']['median']:.2f}"


def shapes_table(result: Result) -> str:
    rows = sorted(result["rows"], key=lambda row: row["method"])
    cells = {(f"{row['method']} | {row['k']}->{row['n']}", f"T={row['tokens']}"): _of_frozen(row) for row in rows}
    return _table("method | layer", cells)


def float32_table(result: Result) -> str:
    return _table("method", {(row["method"], f"{row['k']}->{row['n']}"): _of_frozen(row) for row in result["rows"]})


def calls_table(result: Result) -> str:
    cells = {(row["method"], call): f"{value['stock']:.0f}, {value['ours']:.0f} ({value['of_stock']:.2f})"
             for row in result["rows"] for call, value in row.items() if call != "method"}  # fmt: skip
    return _table("microseconds a layer: PEFT, ours (ours over PEFT)", cells)


# --- whole steps and runs ---------------------------------------------------------------------------------------------


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

Without dropout, the losses of the run with peft_ext and of the run with PEFT + bitsandbytes differ by
{result["mean_loss_difference"]:.4f} in the mean over the steps and by {result["max_loss_difference"]:.4f} at most.
PEFT's 4-bit layer rounds the adapter's term to bfloat16 and adds that
term to a base output that is already rounded, which loses part of the small terms of a new adapter. peft_ext rounds the
sum of both terms once."""


def methods_table(result: Result) -> str:
    # Older result files have no runs of the frozen model.
    of_frozen = all("over_frozen" in row for row in result["rows"])
    titles = "| method | tokens/s | peak memory |" + " time over the frozen step |" * of_frozen + " layers fused |"
    rows = [(row["method"], f"**{row['speedup']:.2f}x**", f"**{row['memory']:.2f}**",
             *([f"{row['over_frozen']:.2f}"] if of_frozen else []), f"{row['fused']} of {row['layers']}")
            for row in result["rows"]]  # fmt: skip
    text = f"**A training step** of {result['what']}, against PEFT + bitsandbytes.\n\n{markdown(titles, rows)}"
    compared = [row["max_loss_difference"] for row in result["rows"] if row["max_loss_difference"] is not None]
    if compared:
        text += ("\n\nWithout dropout, the losses of a step with peft_ext and with PEFT + bitsandbytes differ by "
                 f"{max(compared):.4f} at most.")  # fmt: skip
    return text


def intents_table(result: Result) -> str:
    def listed(kind: str) -> str:
        return ", ".join(f"{100 * value:.1f}%" for value in result["accuracy"][kind])

    return f"""**Accuracy**, {result["what"]}, one figure for each seed: peft_ext {listed("ours")}; PEFT + bitsandbytes
{listed("stock")}."""


def experts_table(result: Result) -> str:
    rows = [(row["name"], *(f"{row[name]:.2f}" for name in ("time", "memory", "weights")), f"{row['over_stock']:.2f}x")
            for row in result["rows"]]  # fmt: skip
    text = f"**A mixture of experts**: forward and backward of {result['what']}; ratios to the frozen model."
    return text + "\n\n" + markdown("| | time | peak memory | weights | tokens/s, of PEFT's |", rows)


def shown(*parts: tuple[str, Callable[[Result], str]]) -> str:
    """Returns a text: for each pair of a result file's name and a function that makes a table, the table and a line
    about the run. Leaves out pairs without a result file, and returns NOTHING if no pair has one."""
    found = [(table, result) for name, table in parts if (result := newest(name)) is not None]
    return "\n\n".join(f"{table(result)}\n\n{about(result)}." for table, result in found) or NOTHING


# --- documents --------------------------------------------------------------------------------------------------------


def _operator(name: str, op: str, *peers: str) -> Callable[[], str]:
    return partial(shown, (name, partial(peers_table, op=op, peers=peers)))


STOCK = ("PEFT", "PEFT + bitsandbytes", "frozen")


def packed_table(result: Result) -> str:
    """Returns a table of layers over packed weights, with a row for each format."""
    cells = {}
    for row in result["rows"]:
        ours, name = row["milliseconds"]["ours"], row["case"].split(", ", 1)[1]
        frozen, decoded = row["speedup"]["frozen"], row["speedup"]["PyTorch decode"]
        if row["op"] == "nf4_linear":
            name = name.removesuffix(", few tokens")
            at = f"T = {row['tokens']}"
            cells[name, f"{at}: GB/s"] = f"{row['bytes_moved'] / ours / 1e6:.1f} ({row['roofline']['ours']:.0f}%)"
            cells[name, f"{at}: frozen, PyTorch decode"] = f"{frozen:.2f}, {decoded:.0f}"
        else:
            name = name.removesuffix(" base, dropout 0.05")
            at = f"LoRA, {row['k']} -> {row['n']}, T = {row['tokens']}"
            cells[name, f"{at}: frozen, PyTorch decode"] = f"{frozen:.2f}, {decoded:.2f}"
    return _table("format", cells)


DRAWN: dict[str, Callable[[], str]] = {
    "": partial(shown, ("run-speed-avx512_bf16", speed_table), (METHODS, methods_table),
                ("run-intents-avx512", intents_table)),
    "methods": partial(shown, (METHODS, methods_table)),
    "1b": partial(shown, ("step-1b-avx512_bf16", methods_table)),
    "8b": partial(shown, ("step-8b-avx512_bf16", methods_table)),
    "checkpointing": partial(shown, ("step-checkpointing-avx512_bf16", methods_table)),
    "compiled": partial(shown, (compiled.NAME, compiled.table)),
    "experts": partial(shown, ("step-experts-avx512_bf16", experts_table)),
    "lora": _operator(LORA, "lora_linear", *STOCK),
    "ia3": _operator(LORA, "ia3_linear", *STOCK),
    "dora": _operator(DORA, "dora_linear", *STOCK),
    "dropout": _operator(DORA, "dropout", "torch eager"),
    "nf4": _operator(NF4, "nf4_linear", "bitsandbytes", "bitsandbytes, repacked", "frozen"),
    "generation": partial(shown, (generation.NAME, generation.table), (generation.SAME, generation.same_text)),
    "quantize": partial(shown, (NF4, quantize_table)),
    "attention": _operator(ATTENTION, "scaled_dot_product_attention", "torch eager"),
    "shapes": partial(shown, ("layer-shapes-avx512_bf16", shapes_table)),
    "shapes-rank8": partial(shown, ("layer-shapes_rank8-avx512_bf16", shapes_table)),
    "calls": partial(shown, ("layer-calls-avx512_bf16", calls_table)),
    "float32": partial(shown, ("layer-float32-avx2", float32_table)),
    "packed": partial(shown, ("layer-packed-avx512_bf16", packed_table),
                      ("layer-packed_wide-avx512_bf16", packed_table)),
    "packed-memory": partial(shown, (packed_memory.NAME, packed_memory.table)),
    "packed-training": partial(shown, (packed_training.NAME, packed_training.result_text)),
    "llama-cpp": partial(shown, (llama_cpp.NAME, llama_cpp.result_text)),
    "llama-speed": partial(shown, (llama_speed.NAME, llama_speed.table)),
    "gpu": gpu_tables,
}  # fmt: skip


def draw(text: str, where: str = "the document") -> str:
    """Returns ``text`` with newly drawn tables between its marks. Raises SystemExit if a mark has an unknown NAME, or
    if ``text`` has no mark."""

    def place(match: re.Match[str]) -> str:
        name = (match[2] or "").strip()
        if name not in DRAWN:
            raise SystemExit(f"error: {where} marks a place {name!r}, wanted one of {', '.join(filter(None, DRAWN))}")
        return f"{match[1]}\n\n{DRAWN[name]()}\n\n{match[3]}"

    after, count = MARK.subn(place, text)
    if count == 0:
        raise SystemExit(f"error: {where} has no place marked <!-- measured: python -m benchmarks.tables -->")
    return after


def main(argv: Optional[list[str]] = None) -> None:
    parser = command_parser("benchmarks.tables", __doc__)
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
