"""Records loss curves of methods on real data: of an accelerated run, and of the twin, which is a second run of the
method without peft_ext's kernels.

Both runs of a method begin with equal weights and train on the same batches. Diff Pruning has no twin; BitFit and
partial fine-tuning have a twin only in float32.

``python -m benchmarks.convergence``          trains the methods that the result file lacks, and writes each result
``python -m benchmarks.convergence --draw``   writes docs/convergence.md from the newest result file

SmolLM2-135M-Instruct learns BANKING77 as text: a customer's question, then the intent's name. Only the tokens of the
intent's name, and the end token after them, have a loss. The two runs of a method record the loss on these tokens,
without the terms that AdaLoRA and Diff Pruning add to the loss.

A bfloat16 run has a bfloat16 base (QLoRA: with the linear layers in NF4) and a float32 adapter. A float32 run begins
with the weights of the bfloat16 run, converted to float32, and trains only the first steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # a missing kernel is an error, so that no reference is compared

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from .command import command_parser
from .convergence_methods import FLOAT32, METHODS, MakeBase, Method, build, quantized_base
from .convergence_page import DTYPES, LONGEST, Row, curve_text, draw, held_out_text, max_difference
from .e2e import PROMPT
from .files import newest, result_path, write
from .harness import machine

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "banking77"
DOCUMENT = ROOT / "docs" / "convergence.md"
NAME = "run-convergence-avx512_bf16"  # Without its date, the name of the result file from which --draw writes the page.
IGNORED = -100  # Label of the tokens that the loss leaves out.

Batch = dict[str, Tensor]


# --- training ---------------------------------------------------------------------------------------------------------


def label_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Returns the summed loss of the tokens that have a label, and the number of these tokens.

    ``logits`` are [B, P + T, V] with P virtual tokens first (P is 0 for methods without them); ``labels`` are [B, T].
    """
    logits, labels = logits[:, -labels.shape[1] : -1], labels[:, 1:]
    chosen = labels != IGNORED
    return cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum"), int(chosen.sum())


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Sequence[Batch]) -> float:
    """Returns the mean loss over all tokens of ``held_out`` that have a label, with the model in eval mode."""
    was_training = model.training
    model.eval()
    found = [label_loss(model(**_inputs(batch)).logits, batch["labels"]) for batch in held_out]
    model.train(was_training)
    return sum(loss.item() for loss, _ in found) / sum(count for _, count in found)


def _inputs(batch: Batch) -> Batch:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


class _Run:
    """A model in training, with its optimizer and the losses of its steps. ``pruned``: index of the step after which
    the model is pruned; None if the model is not pruned."""

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

    def step(self, number: int, batch: Batch) -> None:
        # Two models that run the same dropout code draw equal masks from equal seeds.
        torch.manual_seed(number)
        output = self.model(**batch)
        output.loss.backward()
        self.optimizer.step()
        if hasattr(self.tuner, "update_and_allocate"):  # AdaLoRA's update needs the gradients and the new parameters
            self.tuner.update_and_allocate(number)
        self.optimizer.zero_grad()
        if number == self.pruned:
            self.tuner.prune(self.method.keep, optimizer=self.optimizer)
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
    """Trains the method ``name``, and the method's twin if the method has one for the dtype.

    After the training, :func:`compare` also saves the adapter of the accelerated run and loads it over a new base.

    Args:
        name: a key of ``METHODS``.
        make_base: a function that makes a bfloat16 causal language model with Llama's module names, with equal weights
            in each call.
        train: a batch for each step of the whole run, see :func:`batches`.
        held_out: batches of examples that are not in ``train``.
        dtype: dtype of the base, "bfloat16" or "float32"; a float32 run starts from the values of the bfloat16 run.
        steps: number of steps to train, by default the number of batches; the schedules of the method's configuration
            are planned for all batches.

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
        for run in runs.values():
            run.step(number, batch)
    after = {kind: held_out_loss(run.model, held_out) for kind, run in runs.items()}
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
        "reload_difference": _reloaded(method, ours, make_base, dtype, held_out[0]),
    }  # fmt: skip


def _reloaded(method: Method, model: nn.Module, make_base: MakeBase, dtype: str, batch: Batch) -> dict[str, float]:
    """Saves the adapter and loads it over a new base. Returns the largest difference of a logit between ``model`` and
    the loaded model ("max"), and the largest absolute value of a logit of ``model`` ("largest"), both over the tokens
    that are not padding."""
    import peft_ext

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found = model.eval()(**_inputs(batch)).logits[:, -batch["labels"].shape[1] :]
        return found[batch["attention_mask"].bool()].float()

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        fresh = peft_ext.load_adapter(quantized_base(method, make_base, dtype), folder)
        wanted, found = logits(model), logits(fresh)
    return {"max": (wanted - found).abs().max().item(), "largest": wanted.abs().max().item()}


# --- data -------------------------------------------------------------------------------------------------------------


def intents(folder: Path, count: int, split: str = "train", seed: int = 0) -> list[tuple[str, str]]:
    """Returns ``count`` prompts and completions of BANKING77, drawn without repetition from the questions with at most
    ``LONGEST`` characters.

    Raises: FileNotFoundError if the folder lacks the file of the split; ValueError if the file has too few such
    questions.
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
    """Yields ``input_ids`` and ``labels``, int64 ``[T]``, of each pair; the token ``end`` ends each completion."""
    for prompt, completion in pairs:
        asked, answer = encode(prompt), [*encode(completion), end]
        yield {
            "input_ids": torch.tensor(asked + answer),
            "labels": torch.tensor([IGNORED] * len(asked) + answer),
        }


def batches(examples: Iterable[Batch], size: int, pad: int) -> list[Batch]:
    """Returns batches of ``input_ids``, ``labels`` and ``attention_mask`` ``[size, T]``, padded on the right. The last
    batch may have fewer than ``size`` rows."""
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in examples]
    padding = {"input_ids": pad, "labels": IGNORED, "attention_mask": 0}
    return [
        {name: pad_sequence([row[name] for row in rows[start : start + size]], True, padding_value=value)
         for name, value in padding.items()}
        for start in range(0, len(rows), size)
    ]  # fmt: skip


# --- the run ----------------------------------------------------------------------------------------------------------


def _smollm2() -> tuple[MakeBase, Callable[[str], list[int]], int, int]:
    """Returns a function that makes SmolLM2, a function that encodes text, the end token and the padding token."""
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
    """Returns the pairs of method and dtype that a run trains, the pairs with bfloat16 first."""
    plan = [(name, "bfloat16") for name in METHODS] + [(name, "float32") for name in FLOAT32]
    return [(name, dtype) for name, dtype in plan if name in (options.methods or METHODS)]


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "steps_float32", "batch", "held_out")
    return {name: getattr(options, name) for name in names}


def measure(options: argparse.Namespace, out: Path) -> None:
    """Trains the pairs of method and dtype that the result file ``out`` lacks, and writes the file after each pair.
    Raises SystemExit if the file is of a run with other settings."""
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
        write(out, result)
        difference = max_difference(row)
        print(
            f"{name}, {dtype}: {curve_text(row, 'ours')}, held out {held_out_text(row, 'ours')}; curves differ by "
            f"{'-' if difference is None else f'{difference:.2g}'}, reloaded by {row['reload_difference']['max']:.2g}; "
            f"{row['fused']} of {row['layers']} fused; {time.perf_counter() - start:.0f} s",
            flush=True,
        )


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = command_parser("benchmarks.convergence", __doc__)
    parser.add_argument("--draw", action="store_true", help="write the document; train nothing")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {'; '.join(METHODS)}")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with BANKING77's train.csv and test.csv")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--steps-float32", type=int, default=12, help="first steps in float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=64, help="questions")
    parser.add_argument(
        "--out", type=Path, help="result file; default: benchmarks/results/run-convergence-<isa>-<date>.json"
    )
    options = parser.parse_args(argv)
    for name, value in _settings(options).items():
        if value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, wanted 1 or more")
    if options.draw:
        found = options.out and options.out.exists() and json.loads(options.out.read_text())
        if not (result := found if options.out else newest(NAME)):
            parser.error("nothing was measured yet: there is no result file")
        DOCUMENT.write_text(draw(result), encoding="utf-8")
        print(f"written: {DOCUMENT}")
        return
    out = result_path("run-convergence", machine(), options.out)
    measure(options, out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
