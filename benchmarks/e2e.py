"""Whole runs of ``peft-ext finetune``, accelerated against ``--stock`` (PEFT + bitsandbytes), on a real model.

``python -m benchmarks.e2e speed``                   tokens/s and peak memory, runs in turn, and the loss curves
``python -m benchmarks.e2e intents --data FOLDER``   accuracy on BANKING77 (train.csv, test.csv), over seeds

Each run is a process of its own, so that peak memory is its own. Both write a result file.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .harness import machine

RESULTS = Path(__file__).parent / "results"
PROMPT = "Question of a bank's customer: {text}\nIntent:"


def finetune(output: Path, *arguments: str) -> dict[str, Any]:
    """One run; what it wrote into run.json."""
    command = [sys.executable, "-m", "peft_ext", "finetune", "--output", str(output), "--overwrite", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "run.json").read_text())


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Ratios are of runs that follow each other. Losses are compared without dropout: the masks are not the same."""
    steps = ("--max-steps", str(args.steps), "--eval-fraction", "0.03")
    kinds = {"ours": (), "stock": ("--stock",)}
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.repeats):
            for kind, flags in kinds.items():
                runs[kind].append(finetune(Path(folder, f"{kind}{turn}"), *steps, *flags))
                print(f"{kind}: {_short(runs[kind][-1])}", flush=True)
        plain = {kind: finetune(Path(folder, kind), *steps, "--dropout", "0", *flags) for kind, flags in kinds.items()}
    differences = [abs(a - b) for a, b in zip(plain["ours"]["losses"], plain["stock"]["losses"], strict=True)]
    result = {
        "what": f"SmolLM2-135M-Instruct, NF4 nested, LoRA r=16 on all linears, 4 x 256 tokens, {args.steps} steps",
        "tokens_per_s": {kind: [round(run["tokens_per_s"], 1) for run in found] for kind, found in runs.items()},
        "peak_mib": {kind: [round(run["peak_mib"]) for run in found] for kind, found in runs.items()},
        "speedup": _ratio(runs, "tokens_per_s"),
        "memory": _ratio(runs, "peak_mib"),
        "perplexity": {kind: found[0]["perplexity"] for kind, found in runs.items()},
        "perplexity_without_dropout": {kind: run["perplexity"] for kind, run in plain.items()},
        "losses_without_dropout": {kind: run["losses"] for kind, run in plain.items()},
        "max_loss_difference": max(differences),
        "mean_loss_difference": statistics.mean(differences),
    }
    print(f"tokens/s: {result['speedup']:.2f}x stock; peak memory: {result['memory']:.2f} of stock")
    print(
        f"losses without dropout differ by {result['mean_loss_difference']:.4f} (mean), {max(differences):.4f} (most)"
    )
    return result


def _ratio(runs: dict[str, list[dict[str, Any]]], name: str) -> float:
    """Median over the turns of ours over stock."""
    return round(statistics.median(o[name] / s[name] for o, s in zip(*runs.values(), strict=True)), 3)


def _short(run: dict[str, Any]) -> str:
    return (f"{run['tokens_per_s']:.0f} tokens/s, peak {run['peak_mib']:.0f} MiB, "
            f"perplexity {run['perplexity']['before']:.2f} -> {run['perplexity']['after']:.2f}")  # fmt: skip


def intents(args: argparse.Namespace) -> dict[str, Any]:
    """Question to intent as text; right is the generated line that equals the intent's name."""
    train, test = (_read(args.data / name) for name in ("train.csv", "test.csv"))
    picked = random.Random(0).sample(test, args.questions)
    accuracy: dict[str, list[float]] = {"ours": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "train.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in train))
        common = ("--data", str(data), "--max-steps", str(args.steps), "--batch-size", "16", "--block-size", "128",
                  "--lr", "1e-3", "--eval-fraction", "0.005")  # fmt: skip
        for seed in range(args.seeds):
            for kind, flags in {"ours": (), "stock": ("--stock",)}.items():
                output = Path(folder, f"{kind}{seed}")
                run = finetune(output, *common, "--seed", str(seed), *flags)
                accuracy[kind].append(_accuracy(output, picked))
                print(f"{kind}, seed {seed}: {accuracy[kind][-1]:.3f} of {len(picked)} questions, "
                      f"{run['tokens_per_s']:.0f} tokens/s", flush=True)  # fmt: skip
    return {"what": f"BANKING77, {args.steps} steps of 16, {args.questions} test questions", "accuracy": accuracy}


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [
            {"prompt": PROMPT.format(text=row["text"].strip()), "completion": row["category"].replace("_", " ")}
            for row in csv.DictReader(file)
        ]


def _accuracy(adapter: Path, questions: list[dict[str, str]]) -> float:
    """The adapter over the NF4 base, the same way for both kinds: greedy, 32 questions at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peft_ext
    from peft_ext.cli.demo_model import demo_model

    folder = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    peft_ext.quantize_nf4(model, progress=False)
    model = peft_ext.accelerate(PeftModel.from_pretrained(model, str(adapter))).eval()
    right = 0
    for start in range(0, len(questions), 32):
        part = questions[start : start + 32]
        turns = [[{"role": "user", "content": row["prompt"]}] for row in part]
        texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, answer in zip(part, answers, strict=True):
            right += answer.strip().splitlines()[:1] == [row["completion"]]
    return right / len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.e2e", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("speed")
    one.add_argument("--steps", type=int, default=16)
    one.add_argument("--repeats", type=int, default=2)
    two = commands.add_parser("intents")
    two.add_argument("--data", type=Path, required=True, help="folder with train.csv and test.csv (text, category)")
    two.add_argument("--steps", type=int, default=150)
    two.add_argument("--seeds", type=int, default=2)
    two.add_argument("--questions", type=int, default=320)
    for command in (one, two):
        command.add_argument(
            "--out", type=Path, help="result file; default: benchmarks/results/e2e-<command>-<date>.json"
        )
    args = parser.parse_args()
    result = {"machine": machine(), **{"speed": speed, "intents": intents}[args.command](args)}
    out = args.out or RESULTS / f"e2e-{args.command}-{result['machine']['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
