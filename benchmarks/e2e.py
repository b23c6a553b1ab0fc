"""Compares training runs and training steps of peft_ext with those of PEFT and bitsandbytes alone.

``python -m benchmarks.e2e speed``                   peft-ext finetune: tokens/s, peak memory and losses
``python -m benchmarks.e2e methods``                 steps of LoRA, DoRA, AdaLoRA and IA3 on random weights
``python -m benchmarks.e2e experts``                 steps of LoRA and DoRA on a mixture's experts
``python -m benchmarks.e2e parts``                   the parts of a step: linear layers, attention, loss, the rest
``python -m benchmarks.e2e compiled``                steps under torch.compile and eager steps
``python -m benchmarks.e2e intents --data FOLDER``   accuracy on BANKING77 (train.csv, test.csv) over seeds

Each run whose peak memory is measured is a process of its own. Each of the six commands writes a result file. With
``--device cuda`` the command methods trains on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # a missing kernel is an error, so that no reference is timed

from . import compiled, cuda, mixture, parts
from .command import command_parser
from .files import record, result_path, write
from .harness import machine
from .turns import in_turn, serve

PROMPT = "Question of a bank's customer: {text}\nIntent:"


def finetune(output: Path, *arguments: str) -> dict[str, Any]:
    """Runs ``peft-ext finetune`` once and returns the content of run.json."""
    command = [sys.executable, "-m", "peft_ext", "finetune", "--output", str(output), "--overwrite", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "run.json").read_text())


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Compares ``peft-ext finetune`` with ``peft-ext finetune --stock``. The two run in turn, and a ratio divides
    figures of two runs of the same turn.

    The losses are compared in two more runs without dropout, because with dropout the two draw different masks.
    """
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
        "speedup": _ratio(runs["ours"], runs["stock"], "tokens_per_s"),
        "memory": _ratio(runs["ours"], runs["stock"], "peak_mib"),
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


def _ratio(over: list[dict[str, Any]], under: list[dict[str, Any]], name: str) -> float:
    """Returns the median, over the turns, of a run's figure ``name`` in ``over`` divided by the figure of the run of
    the same turn in ``under``.
    """
    return round(statistics.median(a[name] / b[name] for a, b in zip(over, under, strict=True)), 3)


def _short(run: dict[str, Any]) -> str:
    return (f"{run['tokens_per_s']:.0f} tokens/s, peak {run['peak_mib']:.0f} MiB, "
            f"perplexity {run['perplexity']['before']:.2f} -> {run['perplexity']['after']:.2f}")  # fmt: skip


def intents(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes the demo's model on the questions and the intents' names of BANKING77, and measures the fraction of
    test questions that the model answers with the right intent's name.
    """
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
    """Returns the fraction of ``questions`` that the demo's model in NF4 with the adapter answers right."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peft_ext
    from peft_ext.run.demo_model import demo_model

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


# --- every method's training step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A PEFT method. With ``quantized``, the base layers of the contenders "ours" (peft_ext) and "stock" (PEFT alone)
    are bitsandbytes' Linear4bit (nested NF4), if bitsandbytes is installed."""

    peft_type: str
    quantized: bool = False
    dropout: float = 0.0
    use_dora: bool = False


METHODS = {
    "QLoRA, dropout 0.05": Method("LORA", quantized=True, dropout=0.05),
    "QDoRA": Method("LORA", quantized=True, use_dora=True),
    "QDoRA, dropout 0.05": Method("LORA", quantized=True, use_dora=True, dropout=0.05),
    "DoRA": Method("LORA", use_dora=True),
    "LoRA, dropout 0.05": Method("LORA", dropout=0.05),
    "LoRA": Method("LORA"),
    "IA3": Method("IA3"),
    "AdaLoRA": Method("ADALORA"),
}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
# Sizes of a Llama with the width of Llama 3.2 1B, and with 4 layers instead of 16.
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}  # fmt: skip
# Sizes of a Llama with the width of Llama 3 8B, and with 4 layers instead of 32. The vocabulary is smaller in nearly
# the same proportion, so that the head takes nearly the same share of a step as in Llama 3 8B.
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 16384, "tie_word_embeddings": False}  # fmt: skip
TINY = {**SMOLLM2, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 96}  # fmt: skip
SHAPES = {
    "smollm2": (SMOLLM2, "SmolLM2-135M's shape"),
    "1b": (LLAMA_1B, "Llama-3.2-1B's width and 4 layers"),
    "8b": (LLAMA_8B, "Llama-3-8B's width and 4 layers"),
    "tiny": (TINY, "a test, one layer of 64 columns,"),
}
# "frozen" is the dense bfloat16 model without an adapter and without peft_ext. A step of "frozen" computes the gradient
# of the embeddings' output, so that the gradient passes through every layer, and updates nothing.
KINDS = ("ours", "stock", "frozen")
WARMING = 2  # steps of a contender before the timed steps


def peft_config(method: Method, steps: int) -> Any:
    """Returns PEFT's configuration of a method.

    LoRA and DoRA have rank 16, and AdaLoRA begins with rank 16. Every method adapts each linear layer except the head.
    """
    import peft

    if method.peft_type == "IA3":
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return peft.IA3Config(target_modules=linears, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    common = {
        "lora_alpha": 32,
        "lora_dropout": method.dropout,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    if method.peft_type == "ADALORA":  # AdaLoRA prunes ranks in every timed step
        return peft.AdaLoraConfig(
            init_r=16, target_r=8, tinit=0, tfinal=1, deltaT=1, total_step=steps + WARMING + 1, **common
        )
    return peft.LoraConfig(r=16, use_dora=method.use_dora, **common)


def build_model(method: Method, kind: str, steps: int, sizes: dict[str, Any], device: str = "cpu") -> Any:
    """Returns a Llama of ``sizes`` in training mode, with an adapter unless ``kind`` is "frozen".

    All contenders get equal random bf16 weights. If bitsandbytes is not installed, the quantized layers of the kind
    "ours" are NF4Linear, and a quantized model of the kind "stock" raises ImportError.
    """
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import peft_ext
    from peft_ext.integrations.bitsandbytes import to_linear4bit

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))
    finally:
        torch.set_default_dtype(before)
    if kind == "frozen":
        return model.requires_grad_(False).train()
    if method.quantized:
        peft_ext.quantize_nf4(model, progress=False)
    if method.quantized and (kind == "stock" or importlib.util.find_spec("bitsandbytes")):
        to_linear4bit(model, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, peft_config(method, steps)).train()


def stepper(
    method: Method, kind: str, steps: int, sizes: dict[str, Any] = SMOLLM2, checkpointing: bool = False,
    device: str = "cpu", compiles: bool = False,
) -> Callable[[Any, int], Any]:  # fmt: skip
    """Returns a function ``step(tokens, turn)`` that runs a training step and returns the loss; ``step.model`` is the
    model. With ``compiles``, torch.compile compiles the model at the first step.

    A step is a forward, a backward, a step of AdamW over the adapters, and zero_grad; with the kind "frozen", a forward
    and a backward.
    """
    import torch

    import peft_ext
    from peft_ext.integrations.transformers import keep_freed_memory

    keep_freed_memory()  # malloc gets the same settings for each contender
    model = build_model(method, kind, steps, sizes, device)
    if kind == "frozen":
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind == "ours":
        peft_ext.accelerate(model)
    if compiles:
        model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3) if trained else None

    def step(tokens: Any, turn: int) -> Any:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            if method.peft_type == "ADALORA":
                model.base_model.update_and_allocate(turn)
            optimizer.zero_grad()
        return loss

    step.model = model  # type: ignore[attr-defined]
    return step


class Training:
    """Runs training steps of one contender; see :func:`stepper`. ``seconds`` and ``losses`` have the time and the loss
    of each step.

    The peak memory is that of the steps of the first call of :meth:`run`: while a process waits for its next turn, the
    system may take pages from it. On a GPU, it is the peak of PyTorch's allocations after the model was built.
    """

    def __init__(
        self, method: Method, kind: str, steps: int, batch: int, length: int, sizes: dict[str, Any] = SMOLLM2,
        checkpointing: bool = False, device: str = "cpu", compiles: bool = False,
    ) -> None:  # fmt: skip
        import torch

        import peft_ext

        self.step = stepper(method, kind, steps, sizes, checkpointing, device, compiles)
        self.explained = [] if kind == "frozen" else peft_ext.explain(self.step.model).rows  # type: ignore[attr-defined]
        self.device, self.shape, self.words = device, (batch, length), sizes["vocab_size"]
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.before, self.peak = self._peak_mib(), 0.0
        torch.manual_seed(1)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.metered: dict[str, float] = {}

    def _peak_mib(self) -> float:
        import torch

        from peft_ext.integrations.transformers import peak_memory_mib

        return torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else peak_memory_mib() or 0

    def run(self, steps: int) -> None:
        """Takes and times ``steps`` steps."""
        import torch

        on_gpu = self.device == "cuda"
        with cuda.Meter(cuda.uuid() if on_gpu else None) as meter:
            for _ in range(steps):
                tokens = torch.randint(0, self.words, self.shape).to(self.device)
                if on_gpu:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                loss = self.step(tokens, len(self.seconds))
                if on_gpu:
                    torch.cuda.synchronize()
                self.seconds.append(time.perf_counter() - start)
                self.losses.append(loss.item())
            self.metered = meter.lap()
        self.peak = self.peak or self._peak_mib()

    def figures(self) -> dict[str, Any]:
        """Returns the figures of all steps but the first :data:`WARMING` steps, which warm up and, if asked to, compile
        the model. ``step_ms`` has the time of each of the other steps."""
        taken = self.seconds[WARMING:]
        return {
            "tokens_per_s": round(math.prod(self.shape) / statistics.median(taken), 1),
            "milliseconds": round(1e3 * statistics.median(taken), 3),
            "step_ms": [round(1e3 * seconds, 3) for seconds in taken],
            "meter": self.metered,
            "peak_mib": round(self.peak),
            "peak_before_training_mib": round(self.before),
            "losses": [round(loss, 5) for loss in self.losses],
            "fused": sum(row.fused for row in self.explained),
            "layers": len(self.explained),
        }


def train(method: Method, kind: str, steps: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns the figures of ``steps`` steps, after the steps that warm up; see :class:`Training`."""
    training = Training(method, kind, steps, *args, **kwargs)
    training.run(WARMING + steps)
    return training.figures()


def methods(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the contenders of each method, each in its own process. On a CPU the contenders take their steps in turn. On
    a GPU each contender takes all its steps at once, since only one may use the GPU while clock and power are read. A
    ratio is the median over the turns of the ratio of two steps of the same turn.

    The result file is written anew after each method. A run that fails, or that takes more than ``args.limit`` seconds,
    is named in "failed", and the method's row has the other runs.
    """
    about = _machine(args.device)
    out = result_path(_subject(args), about, args.out)
    sizes, shape = SHAPES[args.shape]
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    result = {
        "what": f"a Llama of {shape} with random weights, rank 16 on all linears, {args.batch} x {args.length} tokens, "
        f"{args.steps} steps{', gradient checkpointing' if args.checkpointing else ''}",
        "model": ", ".join(f"{key} {value}" for key, value in sizes.items()),
        "rows": rows,
        "failed": failed,
    }
    for name in args.methods:
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        commands = {
            kind: [sys.executable, "-m", "benchmarks.e2e", "method", name, kind, "--steps", str(args.steps), "--batch",
                   str(args.batch), "--length", str(args.length), "--shape", args.shape, "--device", args.device,
                   *["--checkpointing"] * args.checkpointing]
            for kind in KINDS
        }  # fmt: skip
        steps = [WARMING, *[1] * args.steps] if args.device == "cpu" else [WARMING + args.steps]
        for _ in range(args.repeats):
            found, errors = in_turn(commands, steps, args.limit)
            for kind, run in found.items():
                runs[kind].append(run)
                metered = "".join(f", {field} {value:g}" for field, value in run["meter"].items())
                print(f"{name}, {kind}: {run['tokens_per_s']:.0f} tokens/s, peak {run['peak_mib']} MiB, "
                      f"{run['fused']} of {run['layers']} layers fused{metered}", flush=True)  # fmt: skip
            for kind, error in errors.items():
                failed.append(f"{name}, {kind}: {error}")
                print(f"failed: {failed[-1]}", flush=True)
        if any(runs.values()):
            rows.append(method_row(name, runs))
        if all(runs.values()):
            print(f"{name}: tokens/s {rows[-1]['speedup']:.2f}x stock; peak memory {rows[-1]['memory']:.2f} of stock; "
                  f"{rows[-1]['over_frozen']:.2f} times the frozen step")  # fmt: skip
        write(out, {"machine": about, **result})
    return result


def method_row(name: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns the row of the result file for a method. The row has no ratios if some contender has fewer finished runs
    than another, or if no run finished."""
    ours, stock = runs["ours"], runs["stock"]
    first = (ours or stock or runs["frozen"])[0]
    row = {
        "method": name,
        **{
            field: {kind: [run[field] for run in runs[kind]] for kind in KINDS}
            for field in ("tokens_per_s", "milliseconds", "peak_mib", "peak_before_training_mib", "meter")
        },
        "fused": first["fused"],
        "layers": first["layers"],
        "losses": {kind: runs[kind][0]["losses"] for kind in ("ours", "stock") if runs[kind]},
    }
    if not ours or len({len(runs[kind]) for kind in KINDS}) > 1:
        return row
    differences = [abs(a - b) for a, b in zip(ours[0]["losses"], stock[0]["losses"], strict=True)]
    return row | {
        "speedup": _of_steps(stock, ours),
        "memory": _ratio(ours, stock, "peak_mib"),
        "over_frozen": _of_steps(ours, runs["frozen"]),
        "memory_over_frozen": _ratio(ours, runs["frozen"], "peak_mib"),
        # With dropout, losses are not compared, because the contenders draw different masks.
        "max_loss_difference": None if METHODS[name].dropout else max(differences),
    }


def _of_steps(over: list[dict[str, Any]], under: list[dict[str, Any]]) -> float:
    """Returns the median, over the turns of all runs, of the time of a step in ``over`` divided by the time of the step
    of the same turn in ``under``.
    """
    steps = [pair for a, b in zip(over, under, strict=True) for pair in zip(a["step_ms"], b["step_ms"], strict=True)]
    return round(statistics.median(a / b for a, b in steps), 3)


def _machine(device: str) -> dict[str, Any]:
    return {**machine(), **({"gpu": cuda.about_gpu()} if device == "cuda" else {})}


def _names(text: str) -> list[str]:
    """Returns the methods of METHODS that ``text`` names. ";" separates the names; a name that is no method's name
    stands for all methods whose names begin with it.
    """
    names = {name.lower(): name for name in METHODS}
    found = []
    for part in (part.strip().lower() for part in text.split(";")):
        found += [names[part]] if part in names else [name for low, name in names.items() if low.startswith(part)]
    if not found:
        raise argparse.ArgumentTypeError(f"no method {text!r}; there are {'; '.join(METHODS)}")
    return list(dict.fromkeys(found))


def _subject(args: argparse.Namespace) -> str:
    """Returns the first part of the result file's name, such as "step-methods"."""
    if args.command != "methods":
        return f"{'step' if args.command in ('experts', 'parts', 'compiled') else 'run'}-{args.command}"
    shape = [args.shape] * (args.shape != "smollm2")
    options = shape + ["checkpointing"] * args.checkpointing
    return "-".join(["step", *(options or ["methods"])])


def main() -> None:
    parser = command_parser("benchmarks.e2e", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, one_run_of: str = "", **numbers: int) -> argparse.ArgumentParser:
        """Adds a command to the program, with an integer option for each keyword argument in ``numbers``, whose value
        is the option's default. A command with ``one_run_of`` does one run of the command ``one_run_of`` and prints the
        figures of the run as JSON; any other command writes a result file."""
        about = {"help": f"one run of {one_run_of}: its figures as JSON"} if one_run_of else {}
        made = commands.add_parser(name, **about)
        for option, default in numbers.items():
            made.add_argument(f"--{option}", type=int, default=default)
        if not one_run_of:
            made.add_argument("--out", type=Path, help="result file; default: benchmarks/results/"
                              "<step|run>-<command>-<isa>-<date>.json")  # fmt: skip
        return made

    add("speed", steps=16, repeats=2)
    one = add("intents", steps=150, seeds=2, questions=320)
    one.add_argument("--data", type=Path, required=True, help="folder with train.csv and test.csv (text, category)")
    many = add("methods", repeats=2, steps=5, batch=4, length=256)
    many.add_argument("--methods", type=_names, default=list(METHODS), help=f"'{'; '.join(METHODS)}'; default: all")
    many.add_argument("--limit", type=float, help="seconds after which a run is killed; default: none")
    one = add("method", "methods", steps=5, batch=4, length=256)
    one.add_argument("method", choices=METHODS)
    one.add_argument("kind", choices=KINDS)
    for made in (many, one):
        made.add_argument("--shape", choices=SHAPES, default="smollm2")
        made.add_argument("--checkpointing", action="store_true")
        made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add("experts", repeats=3, steps=15, batch=2, length=256)
    add("mixture", "experts", steps=15, batch=2, length=256).add_argument("kind", choices=mixture.KINDS)
    many = add("parts", repeats=1, steps=3, batch=2, length=512)
    many.add_argument("--shapes", type=lambda text: text.split(","), default=["1b", "8b"], help="default: 1b,8b")
    one = add("part", "parts", steps=3, batch=2, length=512)
    one.add_argument("kind", choices=KINDS)
    one.add_argument("shape", choices=SHAPES)
    many = add("compiled", steps=9, layers=4, batch=4, length=256)
    many.add_argument("--methods", type=_names, default=["LoRA, dropout 0.05", "LoRA"])
    one = add("compiled-peak", "compiled", layers=4, batch=4, length=256)
    one.add_argument("method", choices=METHODS)
    one.add_argument("kind", choices=KINDS)
    one.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.command == "method":
        training = Training(METHODS[args.method], args.kind, args.steps, args.batch, args.length,
                            SHAPES[args.shape][0], args.checkpointing, args.device)  # fmt: skip
        serve(training.run, training.figures)
        return
    one_run: dict[str, Callable[[], dict[str, Any]]] = {
        "mixture": lambda: mixture.train(args.kind, args.steps, args.batch, args.length),
        "part": lambda: parts.train(args.kind, args.shape, args.steps, args.batch, args.length),
        "compiled-peak": lambda: compiled.peak(args.method, args.kind, args.compile, args.layers, args.batch,
                                               args.length),
    }  # fmt: skip
    if args.command in one_run:
        print(json.dumps(one_run[args.command]()))
        return
    measure = {"speed": speed, "parts": parts.compare, "intents": intents, "methods": methods,
               "experts": mixture.compare, "compiled": compiled.compare}[args.command]  # fmt: skip
    result = {"machine": _machine(getattr(args, "device", "cpu")), **measure(args)}
    record(_subject(args), result, args.out)
    if result.get("failed"):
        sys.exit(1)


if __name__ == "__main__":
    main()
