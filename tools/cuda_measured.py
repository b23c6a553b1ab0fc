"""Names the kernels and the benchmarks that belong to the parts of cuda_model.py, and puts computed times beside times
that were measured on a GPU."""

from __future__ import annotations

import cuda_model

# For each layer of cuda_model.LAYERS, the operator and the case of the benchmark that measures the layer.
MEASURED = {
    "LoRA": ("lora_linear", "bf16 base"),
    "LoRA, dropout": ("lora_linear", "bf16 base, dropout 0.05"),
    "QLoRA, dropout": ("lora_linear", "NF4 base, dropout 0.05"),
    "DoRA": ("dora_linear", "bf16 base"),
    "IA3": ("ia3_linear", "bf16 base, output"),
}
# For each part of a layer, a regular expression that the names of the part's kernels match, as slots.kernel_name
# returns the names.
KERNELS = {
    "product": r"gemm|nvjet|cutlass|xmma",
    "S": r"^rank_pass_kernel<(bf16|f16), .*, kRows, kNone>",
    "S, dropout": r"^rank_pass_kernel<.*, kRows, (kDrawn|kKept)>",
    "Y0": r"^expand_kernel<.*, kBias>",
    "dX0": r"^expand_kernel<.*, kBias>",
    "dX0, dropout": r"^expand_kernel<.*, kMask>",
    "P and dB": r"^rank_pass_kernel<.*, kBoth, ",
    "P, dB and dg": r"^rank_pass_kernel<.*, kBothAndDots, ",
    "dA": r"^rank_pass_kernel<.*, kColumns, kNone>",
    "dA, dropout": r"^rank_pass_kernel<.*, kColumns, (kDrawn|kKept)>",
    "dequantize": r"^nf4_dequantize_kernel",
    "norm": r"^rank_pass_kernel<.*, kRowsAndSquares, ",
    "finish": r"^finish_kernel",
    "g in W or in dY": r"^(scale_rows|column_pass)_kernel",
    "column pass, g and dg": r"^(column_pass|scale_rows)_kernel",
    # The small kernels split matrices into terms, add partial sums, scale ranks, or compute A Aᵀ and DoRA's norm.
    "launch": r"^(split|rank_reduce|column_reduce|rank_scale|dora_norm)_kernel|^rank_pass_kernel<float, .*, kRows, ",
    # PyTorch's small kernels compute functions of the elements of a vector.
    "launch by PyTorch": r"^at::native::.*elementwise",
}


def card_of(name: str) -> cuda_model.Card | None:
    """Returns the card of cuda_model.CARDS for a GPU's name, such as "NVIDIA H100 80GB HBM3"; None for another GPU."""
    return next((card for known, card in cuda_model.CARDS.items() if known in name), None)


def kernel_seconds(card: cuda_model.Card, method: str, t: int) -> dict[str, tuple[str, float]]:
    """Returns a dict from each part of a step of a layer of 4096 x 4096 to a regular expression for the names of the
    part's kernels, and the computed seconds. Parts that run the same kernel are one part, with the sum of their
    seconds. ``method``: a key of cuda_model.LAYERS, or "NF4, T <= 8" or "NF4, T <= 16" for a forward over NF4 without
    an adapter.
    """
    if method.startswith("NF4"):
        return {method: (r"^nf4_few_tokens_kernel", cuda_model.decode(card, 4096, 4096, t))}
    computed = cuda_model.parts(card, t)
    by_kernel: dict[str, list[str]] = {}
    for part in ["product", "product", *cuda_model.LAYERS[method]]:
        by_kernel.setdefault(KERNELS[part], []).append(part)
    return {" and ".join(dict.fromkeys(names)): (kernel, sum(computed[part] for part in names))
            for kernel, names in by_kernel.items()}  # fmt: skip


def beside(result: dict, name: str) -> str:
    """Returns a table for the rows of a result file of the GPU ``name``: the measured time of a layer divided by the
    measured time of the frozen layer, and the goal, which is this ratio as :func:`cuda_model.ratio` computes it.
    """
    card = card_of(name)
    lines = ["| time / the frozen layer's time | K -> N | T | measured | goal, computed | measured / goal |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for method, wanted in MEASURED.items():
        for row in result["rows"]:
            frozen = row["speedup"].get("frozen")
            if (row["op"], row["case"].partition(", ")[2]) != wanted or row["weights"] != "rotating" or not frozen:
                continue
            k, n, t = row["k"], row["n"], row["tokens"]
            goal = None if card is None else cuda_model.ratio(method, card, t, n, k)
            computed = "no such card | -" if goal is None else f"{goal:.2f} | {1 / frozen / goal:.2f}"
            lines.append(f"| {method} | {k} -> {n} | {t} | {1 / frozen:.2f} | {computed} |")
    return "\n".join(lines)
