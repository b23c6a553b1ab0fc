"""Loss curves of every method on real data, accelerated and not, from the same start over the same batches.

``python -m benchmarks.convergence``          train what the result file lacks; each method is written as it ends
``python -m benchmarks.convergence --draw``   write docs/convergence.md from the newest result file

SmolLM2-135M-Instruct learns BANKING77 as text: a customer's question, then the intent's name, whose tokens alone have
a loss. The two runs of a method take each step one after the other, so that a time ratio is of neighbours on a busy
machine; what they record is the loss on the labels, without the terms that AdaLoRA and Diff Pruning add to it.

In bfloat16 the base is bfloat16 and the adapter float32. In float32 the same start is widened and trained for the first
steps alone: it is what both bfloat16 runs round.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import random
import statistics
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # the reference would be compared with itself

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from .e2e import PROMPT, RESULTS
from .harness import machine

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "banking77"
DOCUMENT = ROOT / "docs" / "convergence.md"
PATTERN = "e2e-convergence-*.json"
IGNORED = -100  # the label that the loss leaves out
ENDS = 5  # steps over which the first and the last loss are means
WARMUP = 2  # steps that the time ratio leaves out: the first ones allocate
LONGEST = 80  # characters of a question
DTYPES = ("bfloat16", "float32")

Batch = dict[str, Tensor]
Row = dict[str, Any]
MakeBase = Callable[[], nn.Module]


# --- the methods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """How a method is trained, and what with.

    ``config(steps, layers)``: PEFT's configuration for a run of so many steps of a model of so many layers. ``twin``:
    "PEFT", its own layers; "reference", PyTorch's operators in place of ours; "parameters", the model's own parameters
    trained without an adapter, which is the same in float32 alone; "" where nothing else has the method. ``prune_at``:
    the part of the run after which Diff Pruning keeps the part ``keep`` of its entries.
    """

    config: Callable[[int, int], Any]
    lr: float
    twin: str
    quantized: bool = False
    dropout: float = 0.0
    prune_at: Optional[float] = None
    keep: float = 0.05

    def has_twin(self, dtype: str) -> bool:
        return bool(self.twin) and (self.twin != "parameters" or dtype == "float32")


def _lora(**more: Any) -> Callable[[int, int], Any]:
    def config(steps: int, layers: int) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **more)

    return config


def _adalora(steps: int, layers: int) -> Any:
    from peft import AdaLoraConfig

    schedule = {"tinit": max(1, steps // 10), "tfinal": max(1, steps // 3), "deltaT": 1, "total_step": steps}
    return AdaLoraConfig(
        init_r=12, target_r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **schedule
    )


def _ia3(steps: int, layers: int) -> Any:
    from peft import IA3Config

    targets = ["k_proj", "v_proj", "down_proj"]
    return IA3Config(target_modules=targets, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")


def _prefix(steps: int, layers: int) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")


def _prompt(steps: int, layers: int) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")


def _bottleneck(steps: int, layers: int) -> Any:
    from peft_ext.tuners import BottleneckConfig

    return BottleneckConfig(task_type="CAUSAL_LM")


def _bitfit(steps: int, layers: int) -> Any:
    from peft_ext.tuners import BitFitConfig

    return BitFitConfig(add_bias="all-linear", task_type="CAUSAL_LM")


def _diff_pruning(steps: int, layers: int) -> Any:
    from peft_ext.tuners import DiffPruningConfig

    return DiffPruningConfig(layers_to_transform=[layers - 2, layers - 1], task_type="CAUSAL_LM")


def _partial(steps: int, layers: int) -> Any:
    from peft_ext.tuners import PartialConfig

    return PartialConfig(num_last_layers=2, task_type="CAUSAL_LM")


METHODS = {
    "LoRA": Method(_lora(), 5e-4, "PEFT"),
    "LoRA, dropout 0.1": Method(_lora(lora_dropout=0.1), 5e-4, "PEFT", dropout=0.1),
    "QLoRA": Method(_lora(), 5e-4, "PEFT", quantized=True),
    "DoRA": Method(_lora(use_dora=True), 5e-4, "PEFT"),
    "AdaLoRA": Method(_adalora, 2e-3, "PEFT"),
    "IA3": Method(_ia3, 8e-3, "PEFT"),
    "bottleneck": Method(_bottleneck, 1e-3, "reference"),
    "prefix": Method(_prefix, 1e-2, "PEFT"),
    "prompt": Method(_prompt, 3e-2, "PEFT"),
    "BitFit": Method(_bitfit, 3e-3, "parameters"),
    "Diff Pruning": Method(_diff_pruning, 2e-3, "", prune_at=0.5),
    "partial": Method(_partial, 2e-4, "parameters"),
}
# Where in float32 there is something to learn: not from masks that differ, nor of what no kernel of ours computes.
FLOAT32 = ("LoRA", "QLoRA", "DoRA", "AdaLoRA", "IA3", "bottleneck", "BitFit", "partial")
TWINS = {"PEFT": "PEFT", "reference": "PyTorch", "parameters": "the model's own parameters", "": "–"}


def build(method: Method, make_base: MakeBase, steps: int, dtype: str) -> tuple[nn.Module, Optional[nn.Module]]:
    """The accelerated model, and its twin with the same start, or None where there is none in this dtype."""
    import peft_ext
    from peft_ext.nn import BottleneckAdapter

    model = _base(method, make_base, "bfloat16")
    torch.manual_seed(0)
    layers = model.config.num_hidden_layers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_ext.get_peft_model(model, method.config(steps, layers), accelerate=False)
    for key, parameter in model.named_parameters():
        if ".ranknum." in key:  # over a base that is not float32 PEFT trains AdaLoRA's divisor, and does not save it
            parameter.requires_grad_(False)
    if dtype == "float32":
        model = model.float()
    twin = None
    if method.has_twin(dtype):
        twin = _parameters(method, make_base) if method.twin == "parameters" else copy.deepcopy(model)
        if method.twin == "reference":
            for module in twin.modules():
                if isinstance(module, BottleneckAdapter):
                    module.__class__ = _reference_adapter()
    return peft_ext.accelerate(model), twin


def _base(method: Method, make_base: MakeBase, dtype: str) -> nn.Module:
    import peft_ext

    model = make_base()
    if model.dtype is not torch.bfloat16:
        raise ValueError(f"compare: make_base gives {model.dtype}, wanted a model of torch.bfloat16")
    if method.quantized:
        peft_ext.quantize_nf4(model, progress=False)
    return model.float() if dtype == "float32" else model


def _reference_adapter() -> type[nn.Module]:
    from peft_ext import reference
    from peft_ext.nn import BottleneckAdapter

    class ReferenceAdapter(BottleneckAdapter):
        def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
            return reference.bottleneck_adapter(
                x, self.down.weight, self.down.bias, self.up.weight, self.up.bias,
                scale=self.scale, activation=self.activation, residual=residual,
            )  # fmt: skip

    return ReferenceAdapter


def _parameters(method: Method, make_base: MakeBase) -> nn.Module:
    """The base in float32; what BitFit or partial fine-tuning trains requires grad, and nothing else does."""
    model = make_base().float().requires_grad_(False)
    if method.config is _partial:
        for layer in model.base_model.layers[-2:]:
            layer.requires_grad_()
        return model
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.bias = nn.Parameter(torch.zeros(module.out_features))
    return model


# --- training ---------------------------------------------------------------------------------------------------------


def label_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The summed loss on the tokens that have a label, and their number.

    ``logits [B, P + T, V]``, P virtual tokens first where the method has them; ``labels [B, T]``.
    """
    logits, labels = logits[:, -labels.shape[1] : -1], labels[:, 1:]
    chosen = labels != IGNORED
    return cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum"), int(chosen.sum())


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Sequence[Batch]) -> float:
    """Mean over the label tokens; the model is in eval mode for it."""
    was_training = model.training
    model.eval()
    found = [label_loss(model(**_inputs(batch)).logits, batch["labels"]) for batch in held_out]
    model.train(was_training)
    return sum(loss.item() for loss, _ in found) / sum(count for _, count in found)


def _inputs(batch: Batch) -> Batch:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


class _Run:
    """One model in training: its optimizer, its losses, its seconds by step."""

    def __init__(self, method: Method, model: nn.Module, pruned: Optional[int]) -> None:
        self.method, self.model, self.pruned = method, model.train(), pruned
        tuner = getattr(model, "base_model", None)
        self.tuner = tuner if hasattr(model, "peft_config") else None
        if hasattr(self.tuner, "parameter_groups"):
            groups = self.tuner.parameter_groups(method.lr)
        else:
            groups = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(groups, lr=method.lr, weight_decay=0.0)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, number: int, batch: Batch) -> None:
        torch.manual_seed(number)  # two models that draw masks alike draw the same
        start = time.perf_counter()
        output = self.model(**batch)
        output.loss.backward()
        self.optimizer.step()
        if hasattr(self.tuner, "update_and_allocate"):  # it wants the gradients, and the parameters after the step
            self.tuner.update_and_allocate(number)
        self.optimizer.zero_grad()
        if number == self.pruned:
            self.tuner.prune(self.method.keep, optimizer=self.optimizer)
        self.seconds.append(time.perf_counter() - start)
        loss, count = label_loss(output.logits.detach(), batch["labels"])
        self.losses.append(loss.item() / count)


def compare(
    name: str,
    make_base: MakeBase,
    train: Sequence[Batch],
    held_out: Sequence[Batch],
    *,
    dtype: str = "bfloat16",
    steps: Optional[int] = None,
) -> Row:
    """Train method ``name`` and its twin side by side, and let the saved adapter be read again.

    Args:
        name: a key of ``METHODS``.
        make_base: gives a bfloat16 causal language model with Llama's names, a new one with the same weights each time.
        train: a batch for each step of the whole run, see :func:`batches`. held_out: batches of other examples.
        dtype: "bfloat16" or "float32", of the base; a float32 start is the bfloat16 one, widened.
        steps: the first steps alone, of a run that is planned for all of them.

    Returns: a row of the result file.

    Raises: ValueError where name or dtype is unknown, where steps is not between 1 and the number of batches, or where
    the base is not bfloat16.
    """
    if name not in METHODS:
        raise ValueError(f"compare: method is {name!r}, wanted one of {', '.join(METHODS)}")
    if dtype not in DTYPES:
        raise ValueError(f"compare: dtype is {dtype!r}, wanted one of {', '.join(DTYPES)}")
    taken = len(train) if steps is None else steps
    if not 1 <= taken <= len(train):
        raise ValueError(f"compare: steps is {steps}, wanted 1 to {len(train)}, the batches there are")
    import peft_ext

    method = METHODS[name]
    ours, twin = build(method, make_base, len(train), dtype)
    trainable = sum(parameter.numel() for parameter in ours.parameters() if parameter.requires_grad)
    pruned = int(method.prune_at * taken) if method.prune_at is not None else None
    runs = {"ours": _Run(method, ours, pruned)}
    if twin is not None:
        runs["twin"] = _Run(method, twin, pruned)
    explained = peft_ext.explain(ours)
    before = {kind: held_out_loss(run.model, held_out) for kind, run in runs.items()}
    for number, batch in enumerate(train[:taken]):
        kinds = list(runs) if number % 2 else list(reversed(runs))  # neither always finds the caches warm
        for kind in kinds:
            runs[kind].step(number, batch)
    after = {kind: held_out_loss(run.model, held_out) for kind, run in runs.items()}
    measured = [run.seconds[WARMUP if taken > WARMUP else 0 :] for run in runs.values()]
    ratios = [stock / own for own, stock in zip(*measured, strict=True)] if twin is not None else []
    return {
        "method": name,
        "dtype": dtype,
        "twin": method.twin if twin is not None else "",
        "steps": taken,
        "lr": method.lr,
        "pruned": pruned,
        "trainable": trainable,
        "fused": sum(row.fused for row in explained.rows),
        "layers": len(explained.rows),
        "losses": {kind: [round(loss, 6) for loss in run.losses] for kind, run in runs.items()},
        "held_out": {
            kind: {"before": round(before[kind], 6), "after": round(after[kind], 6)} for kind in runs
        },
        "step_s": {kind: round(statistics.median(s), 4) for kind, s in zip(runs, measured, strict=True)},
        "time_ratio": round(statistics.median(ratios), 3) if ratios else None,
        "reload_difference": _reloaded(method, ours, make_base, dtype, held_out[0]),
    }  # fmt: skip


def _reloaded(method: Method, model: nn.Module, make_base: MakeBase, dtype: str, batch: Batch) -> dict[str, float]:
    """The largest difference of the logits on a batch, padding left out, and the largest logit."""
    import peft_ext

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found = model.eval()(**_inputs(batch)).logits[:, -batch["labels"].shape[1] :]
        return found[batch["attention_mask"].bool()].float()

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        fresh = peft_ext.load_adapter(_base(method, make_base, dtype), folder)
        wanted, found = logits(model), logits(fresh)
    return {"max": (wanted - found).abs().max().item(), "largest": wanted.abs().max().item()}


# --- data -------------------------------------------------------------------------------------------------------------


def intents(folder: Path, count: int, split: str = "train", seed: int = 0) -> list[tuple[str, str]]:
    """``count`` prompts and completions of BANKING77, drawn without repetition; questions of ``LONGEST`` characters
    at most.

    Raises: FileNotFoundError where the folder has no such split; ValueError where it has fewer questions.
    """
    path = folder / f"{split}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"intents: {path} is not there, wanted BANKING77's train.csv and test.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row["text"].strip(), row["category"].replace("_", " ")) for row in csv.DictReader(file)]
    rows = [(PROMPT.format(text=text), f" {label}") for text, label in rows if len(text) <= LONGEST]
    if count > len(rows):
        raise ValueError(f"intents: count is {count}, {path.name} has {len(rows)} short questions")
    return random.Random(seed).sample(rows, count)


def tokenize(pairs: Iterable[tuple[str, str]], encode: Callable[[str], list[int]], end: int) -> Iterator[Batch]:
    """``input_ids`` and ``labels``, int64 ``[T]``, of each prompt and completion; ``end`` closes the completion."""
    for prompt, completion in pairs:
        asked, answer = encode(prompt), [*encode(completion), end]
        yield {
            "input_ids": torch.tensor(asked + answer),
            "labels": torch.tensor([IGNORED] * len(asked) + answer),
        }


def batches(examples: Iterable[Batch], size: int, pad: int) -> list[Batch]:
    """``input_ids``, ``labels`` and ``attention_mask`` ``[size, T]``, padded on the right; the last may be smaller."""
    rows, found = list(examples), []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        masks = [torch.ones_like(row["input_ids"]) for row in part]
        columns = {"input_ids": pad, "labels": IGNORED}
        batch = {
            name: pad_sequence([row[name] for row in part], True, padding_value=value)
            for name, value in columns.items()
        }
        found.append({**batch, "attention_mask": pad_sequence(masks, True)})
    return found


# --- the run ----------------------------------------------------------------------------------------------------------


def _smollm2() -> tuple[MakeBase, Callable[[str], list[int]], int, int]:
    """How to make the model, its encoding, its end token and its padding token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from peft_ext.run.demo_model import demo_model

    logging.disable_progress_bar()
    folder = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def make_base() -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model.config.use_cache = False
        return model

    end = tokenizer.eos_token_id
    return make_base, tokenizer.encode, end, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end


def _plan(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Methods and dtypes, those of bfloat16 first."""
    plan = [(name, "bfloat16") for name in METHODS] + [(name, "float32") for name in FLOAT32]
    return [(name, dtype) for name, dtype in plan if name in (options.methods or METHODS)]


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "steps_float32", "batch", "held_out")
    return {name: getattr(options, name) for name in names}


def measure(options: argparse.Namespace, out: Path) -> None:
    """Train what ``out`` lacks; it is written after each method."""
    from peft_ext.integrations.transformers import keep_freed_memory

    result = {"machine": machine(), "settings": _settings(options), "rows": []}
    if out.exists():
        result = json.loads(out.read_text())
        if result["settings"] != _settings(options):
            raise SystemExit(f"{out} is of a run with {result['settings']}, wanted {_settings(options)}; name another")
    done = {(row["method"], row["dtype"]) for row in result["rows"]}
    wanted = [key for key in _plan(options) if key not in done]
    if not wanted:
        return
    keep_freed_memory()
    make_base, encode, end, pad = _smollm2()
    pairs = {"train": options.steps * options.batch, "test": options.held_out}
    found = {split: tokenize(intents(options.data, n, split), encode, end) for split, n in pairs.items()}
    train, held_out = (batches(found[split], options.batch, pad) for split in pairs)
    for name, dtype in wanted:
        start = time.perf_counter()
        steps = options.steps if dtype == "bfloat16" else min(options.steps, options.steps_float32)
        row = compare(name, make_base, train, held_out, dtype=dtype, steps=steps)
        result["rows"].append(row)
        part = out.with_suffix(".json.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(result, indent=2) + "\n")
        part.replace(out)
        difference = max_difference(row)
        print(
            f"{name}, {dtype}: {_curve(row, 'ours')}, held out {_held_out(row, 'ours')}; curves differ by "
            f"{'-' if difference is None else f'{difference:.2g}'}, reloaded by {row['reload_difference']['max']:.2g}; "
            f"{row['fused']} of {row['layers']} fused, time {row['time_ratio']}; {time.perf_counter() - start:.0f} s",
            flush=True,
        )


# --- the document -----------------------------------------------------------------------------------------------------


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Of two curves, step by step, as far as the shorter one goes."""
    return [abs(a - b) for a, b in zip(one, other, strict=False)]


def max_difference(row: Row) -> Optional[float]:
    """Between the two runs; None where there is no twin."""
    return max(differences(row["losses"]["ours"], row["losses"]["twin"])) if row["twin"] else None


def _ends(losses: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(losses[:ENDS]), statistics.mean(losses[-ENDS:])


def _curve(row: Row, kind: str) -> str:
    first, last = _ends(row["losses"][kind])
    return f"{first:.3f} → {last:.3f}"


def _held_out(row: Row, kind: str) -> str:
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
            _curve(row, "ours"),
            _curve(row, "twin") if two else "–",
            _held_out(row, "ours"),
            _held_out(row, "twin") if two else "–",
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


def newest() -> Optional[Path]:
    """The newest result file."""
    return max(RESULTS.glob(PATTERN), default=None, key=lambda path: path.name)


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--draw", action="store_true", help="write the document, train nothing")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {'; '.join(METHODS)}")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with BANKING77's train.csv and test.csv")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--steps-float32", type=int, default=12, help="of them, in float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=64, help="questions")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/e2e-convergence-<date>.json")
    options = parser.parse_args(argv)
    for name, value in _settings(options).items():
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, wanted 1 or more")
    if options.draw:
        if (path := options.out or newest()) is None or not path.exists():
            parser.error("nothing was measured yet: there is no result file")
        DOCUMENT.write_text(draw(json.loads(path.read_text())), encoding="utf-8")
        print(f"written: {DOCUMENT}")
        return
    out = options.out or RESULTS / f"e2e-convergence-{time.strftime('%Y-%m-%d')}.json"
    measure(options, out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
