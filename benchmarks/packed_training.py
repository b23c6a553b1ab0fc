"""Trains LoRA over packed weights and over the same weights decoded to dense bfloat16, on SmolLM2-135M-Instruct.

``python -m benchmarks.packed_training``                  every format whose library is installed; writes a result file
``python -m benchmarks.packed_training --formats mxfp4``  one format
``python -m benchmarks.packed_training --table``          prints the newest result file as a table

Each run is a process of its own: the process quantizes the linear layers of the bfloat16 model (or reads the packed
weights of the model's GGUF file, or loads a checkpoint that GPTQModel wrote), adds LoRA of rank 16 to all linear
layers, and trains on the language reference of Python, which is the data of ``make demo``. The run "packed" trains
over the packed layers. The run "decoded" replaces each packed layer by an ``nn.Linear`` with the decoded weight in
bfloat16. Both runs are accelerated, begin with equal adapters and see the same batches.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # a missing kernel is an error, so that no reference is measured

import torch
from torch import nn

from .command import command_parser, markdown, measured, run_alone
from .files import result_path, write
from .harness import machine
from .packed_formats import FORMATS, pack

NAME = "run-packed-avx512_bf16"  # without its date, the name of the result file that the documents show
KINDS = ("packed", "decoded")


def status_mib(field: str) -> float:
    """Returns the field ``field`` of /proc/self/status in MiB: VmRSS is the resident memory, and VmHWM the peak of the
    resident memory since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"status_mib: /proc/self/status has no {field}")


def reset_peak() -> None:
    """Sets VmHWM to VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def _trimmed() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Sequence[torch.Tensor]) -> float:
    model.eval()
    losses = [model(input_ids=block, labels=block).loss.item() for block in blocks]
    model.train()
    return math.exp(sum(losses) / len(losses))


def train(
    name: str, kind: str, steps: int, batch: int, length: int, held_out: int, checkpoint: Optional[Path] = None
) -> dict[str, Any]:
    """Trains the run ``kind`` of the format ``name`` in this process. Returns a dict with the packed layers' formats
    and bits per weight, the losses, the perplexities, the memory, and the numbers of fused adapter layers and of
    adapter layers.

    ``checkpoint``: the folder of a quantized checkpoint, which PackedConfig loads; if None, the bfloat16 model is
    packed.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import peft_ext
    from peft_ext.integrations.transformers import keep_freed_memory
    from peft_ext.nn import PackedLinear
    from peft_ext.run.data import read_corpus, tokenize
    from peft_ext.run.demo_model import demo_model

    logging.disable_progress_bar()
    keep_freed_memory()
    folder = demo_model()
    examples = tokenize(read_corpus("python-docs"), AutoTokenizer.from_pretrained(folder), length)
    rows = {"train": examples.train, "test": examples.held_out}
    blocks = {split: torch.tensor([row["input_ids"] for row in found]) for split, found in rows.items()}
    torch.manual_seed(0)
    order = torch.randperm(len(blocks["train"]))
    batches = blocks["train"][order].repeat(1 + steps * batch // len(order), 1).split(batch)[:steps]
    tests = blocks["test"][:held_out].split(batch)

    _trimmed()
    before = status_mib("VmRSS")
    packed = {} if checkpoint is None else {"quantization_config": peft_ext.PackedConfig()}
    model = AutoModelForCausalLM.from_pretrained(checkpoint or folder, dtype=torch.bfloat16, **packed)
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    if checkpoint is None:
        pack(name, model)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    bits = 8 * sum(layer.packed.nbytes for layer in layers) / sum(math.prod(layer.packed.shape) for layer in layers)
    formats = sorted({layer.packed.format.name for layer in layers})
    if kind == "decoded":
        peft_ext.dequantize_packed(model, progress=False)
    del layers
    for tensor in (*model.parameters(), *model.buffers()):  # a tensor of a mapped file keeps the whole file mapped
        tensor.data = tensor.data.clone()
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)  # packed and dense layers get equal adapters only from equal states of the random generator
    for module in model.modules():
        if hasattr(module, "reset_lora_parameters") and "default" in module.lora_A:
            module.reset_lora_parameters("default", True)
    peft_ext.accelerate(model)
    explained = peft_ext.explain(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.0)
    _trimmed()
    made = status_mib("VmRSS")
    reset_peak()
    first = perplexity(model, tests)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 6))
    adapters = [row for row in explained.rows if " over " in row.kind]
    return {
        "formats": formats,
        "bits": round(bits, 3),
        "losses": losses,
        "perplexity": {"before": round(first, 4), "after": round(perplexity(model, tests), 4)},
        "model_mib": round(made - before),
        "peak_mib": round(status_mib("VmHWM") - before),
        "fused": sum(row.fused for row in adapters),
        "layers": len(adapters),
    }


def measure(options: argparse.Namespace, out: Path) -> None:
    """Trains the two runs of each format that the result file ``out`` lacks, and writes the file after each format.
    Leaves out formats whose library is not installed."""
    settings = {name: getattr(options, name) for name in ("steps", "batch", "length", "held_out")}
    result = {"machine": machine(), "settings": settings, "rows": []}
    if out.exists():
        result = json.loads(out.read_text())
        if result["settings"] != settings:
            raise SystemExit(f"{out} is of a run with {result['settings']}, wanted {settings}; name another")
    done = {row["format"] for row in result["rows"]}
    for name in options.formats or FORMATS:
        if name in done:
            continue
        if (reason := FORMATS[name].missing()) is not None:
            print(f"{name}: left out, {reason}", flush=True)
            continue
        row: dict[str, Any] = {"format": name, "quantized_by": FORMATS[name].quantized_by}
        with tempfile.TemporaryDirectory() as folder:
            given = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
            if FORMATS[name].write:
                given.append(f"--checkpoint={folder}/model")
                writing = [sys.executable, "-m", "benchmarks.packed_training", "--write", name, f"{folder}/model"]
                subprocess.run(writing, check=True, stdout=subprocess.DEVNULL)
            for kind in KINDS:
                row[kind] = run_alone("packed_training", "--run", name, kind, *given)
        row["max_loss_difference"] = max(
            abs(a - b) for a, b in zip(*(row[kind]["losses"] for kind in KINDS), strict=True)
        )
        result["rows"].append(row)
        write(out, result)
        print(table([row]).splitlines()[-1], flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of a result file as a Markdown table."""
    titles = ("| format | quantized by | bits a weight | perplexity, packed | perplexity, decoded | largest difference "
              "of a step's losses | peak MiB, packed | peak MiB, decoded |")  # fmt: skip
    cells = []
    for row in rows:
        packed, dense = (row[kind] for kind in KINDS)
        cells.append((
            row["format"], row["quantized_by"], f"{packed['bits']:.2f}",
            *(f"{run['perplexity']['before']:.2f} → {run['perplexity']['after']:.2f}" for run in (packed, dense)),
            f"{row['max_loss_difference']:.4f}",
            *(f"{run['peak_mib']:.0f}" for run in (packed, dense)),
        ))  # fmt: skip
    return markdown(titles, cells)


def result_text(result: dict[str, Any]) -> str:
    """Returns the settings and the rows of a result file as Markdown."""
    steps, batch, length, held_out = (result["settings"][name] for name in ("steps", "batch", "length", "held_out"))
    return (f"LoRA r=16 on all linear layers of SmolLM2-135M-Instruct, {steps} steps of {batch} x {length} tokens, "
            f"{held_out} held-out sequences; the left figure of a perplexity is before the training.\n\n"
            f"{table(result['rows'])}")  # fmt: skip


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = command_parser("benchmarks.packed_training", __doc__)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, metavar="NAME", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--table", action="store_true", help="print the newest result as a table; train nothing")
    parser.add_argument("--run", nargs=2, metavar=("FORMAT", "KIND"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, metavar=("FORMAT", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--held-out", type=int, default=8, help="sequences of the perplexity")
    parser.add_argument(
        "--out", type=Path, help="result file; default: benchmarks/results/run-packed-<isa>-<date>.json"
    )
    options = parser.parse_args(argv)
    if options.run:
        name, kind = options.run
        settings = (options.steps, options.batch, options.length, options.held_out, options.checkpoint)
        print(json.dumps(train(name, kind, *settings)))
        return
    if options.write:
        from peft_ext.run.demo_model import demo_model

        FORMATS[options.write[0]].write(demo_model(), Path(options.write[1]))
        return
    if options.table:
        print(table(measured(parser, NAME, options.out)["rows"]))
        return
    out = result_path("run-packed", machine(), options.out)
    measure(options, out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
