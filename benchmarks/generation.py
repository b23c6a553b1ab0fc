"""Times the generation of text, one token at a time, and compares the tokens of a whole decoder layer's operator.

``python -m benchmarks.generation``              tokens/s of each contender; writes a result file
``python -m benchmarks.generation --prompts 200``  compares the tokens of 200 prompts; writes another result file

The model is SmolLM2-135M-Instruct, and for the last two contenders a model with random weights. Every contender has a
process of its own, and generates the same number of tokens from the same prompt with transformers' ``generate``,
greedily. The contenders generate in turn. The tokens per second are those behind the first token: the time of the
prompt and of the first token is measured by itself and subtracted.

bf16              the bfloat16 model
LoRA              the bfloat16 model with a LoRA adapter of rank 16 on all linear layers
NF4               the linear layers in NF4
NF4, LoRA         the linear layers in NF4, with the adapter
NF4, compiled     as NF4, with transformers' static cache, and with ``torch.compile`` over the forward
NF4, LoRA, Qwen 3 of 0.6B    as "NF4, LoRA", over a model of Qwen3-0.6B's shape, but of 49,152 words
NF4, LoRA, Gemma 3 of 1B     as "NF4, LoRA", over a model of Gemma-3-1B's shape, but of 49,152 words

"stock" is transformers and PEFT, and bitsandbytes for NF4; "ours" is the same model after ``peft_ext.accelerate``. All
models are frozen, and so in particular their heads.

The comparison of tokens: the accelerated NF4 model with an adapter generates from each prompt twice, with fused decoder
layers (``accelerate``'s default, where one operator computes a whole layer) and layer by layer (``blocks=False``). At
the first token that differs, the second way's logits of the two tokens are compared. They are a tie if their difference
is at most twice the largest difference between the second way's logits and the logits of the model in float32.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # a missing kernel is an error, so that no reference is timed

import torch
from torch import Tensor

import peft_ext

from .files import Result, result_path, write
from .harness import machine
from .turns import in_turn, serve

NAME, SAME = "run-generation-avx512_bf16", "run-same_tokens-avx512_bf16"
QWEN = "NF4, LoRA, Qwen 3 of 0.6B"
GEMMA = "NF4, LoRA, Gemma 3 of 1B"
CONTENDERS = ("bf16", "LoRA", "NF4", "NF4, LoRA", "NF4, compiled", QWEN, GEMMA)
THINGS = ("a river", "the price of bread", "a lost key", "the moon", "a train to the north", "an old computer",
          "the first snow", "a garden wall", "the speed of light", "a cup of tea")  # fmt: skip
QUESTIONS = ("Write a sentence about {}.", "What is {}?", "Why do people talk about {}?", "Tell me a story about {}.",
             "List three facts about {}.", "Translate '{}' into French.", "How would you draw {}?",
             "What can a child learn from {}?", "Explain {} to an engineer.", "Write a poem about {}.",
             "Who would need {}?", "Describe {} in ten words.", "What comes to your mind when you think of {}?",
             "Compare {} with a mountain.", "Is {} expensive?", "Where would you look for {}?",
             "Name a book in which {} matters.", "What is the opposite of {}?", "Ask me a question about {}.",
             "What would happen without {}?")  # fmt: skip


def prompts(count: int) -> list[str]:
    """Returns ``count`` different questions, at most 200."""
    return [question.format(thing) for thing in THINGS for question in QUESTIONS][:count]


# --- the contenders ---------------------------------------------------------------------------------------------------


def _to_bitsandbytes(model: Any) -> None:
    from .peers import bitsandbytes_linear

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, peft_ext.nn.NF4Linear):
                setattr(parent, name, bitsandbytes_linear(child.nf4, child.bias))
    # PEFT uses its adapter class for Linear4bit only if is_loaded_in_4bit is set.
    model.is_loaded_in_4bit = True


def _with_adapter(model: Any) -> Any:
    """Returns the model with an adapter whose B is not zero, so that the adapter changes the tokens."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model.requires_grad_(False), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def _qwen() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=49_152, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                         num_attention_heads=16, num_key_value_heads=8, head_dim=128, dtype=torch.bfloat16)  # fmt: skip
    return Qwen3ForCausalLM(config).bfloat16()


def _gemma() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(vocab_size=49_152, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
                              num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
                              dtype=torch.bfloat16)  # fmt: skip
    return Gemma3ForCausalLM(config).bfloat16()


def contender(name: str, kind: str, load: Callable[[], Any]) -> Any:
    """Returns the model of a contender in evaluation mode. ``kind``: "ours" or "stock"."""
    model = {QWEN: _qwen, GEMMA: _gemma}.get(name, load)()
    if name.startswith("NF4"):
        peft_ext.quantize_nf4(model, progress=False)
        if kind == "stock":
            _to_bitsandbytes(model)
    if "LoRA" in name:
        model = _with_adapter(model)
    model.eval().requires_grad_(False)
    if kind == "ours":
        peft_ext.accelerate(model)
    if "compiled" in name:
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward, dynamic=False)
    return model


def generated(model: Any, ids: Tensor, count: int) -> Tensor:
    """Returns the ``count`` tokens ``[count]`` that the model generates greedily behind the prompt ``ids`` ``[1, T]``.
    The end of a text does not end the generation."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=count,
                               max_new_tokens=count, do_sample=False, pad_token_id=0)  # fmt: skip
    return found[0, ids.shape[1] :]


# --- tokens per second ------------------------------------------------------------------------------------------------


class Generation:
    """Runs and times generations of text by one contender's model. ``rates``: the tokens per second of each timed
    generation."""

    def __init__(self, model: Any, ids: Tensor, tokens: int) -> None:
        self.model, self.ids, self.tokens = model, ids, tokens
        self.rates: list[float] = []

    def _seconds(self, count: int) -> float:
        start = time.perf_counter()
        generated(self.model, self.ids, count)
        return time.perf_counter() - start

    def run(self, times: int) -> None:
        for _ in range(times):
            first = self._seconds(1)
            self.rates.append(self.tokens / (self._seconds(1 + self.tokens) - first))

    def figures(self) -> dict[str, Any]:
        """Returns the median of ``rates`` without the first, which warms up."""
        return {"rate": statistics.median(self.rates[1:])}


def rates(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each of ``args.contenders``, with the tokens per second of "ours" and of "stock"."""
    kinds = {name: ("ours",) if "compiled" in name else ("ours", "stock") for name in args.contenders}
    own = ["--tokens", str(args.tokens), "--threads", str(torch.get_num_threads())]
    commands = {
        f"{kind}: {name}": [sys.executable, "-m", "benchmarks.generation", "--contender", name, kind, *own]
        for name in args.contenders
        for kind in kinds[name]
    }
    found, failed = in_turn(commands, [1] * (1 + args.rounds), None)
    for contender, error in failed.items():
        print(f"failed: {contender}: {error}", flush=True)
    rate = {contender: round(figures["rate"], 1) for contender, figures in found.items()}
    return [
        {"model": name, **{kind: rate.get(f"{kind}: {name}") for kind in ("ours", "stock")}} for name in args.contenders
    ]


# --- the tokens of the operator of a layer ----------------------------------------------------------------------------


def compared(load: Callable[[], Any], encode: Callable[[str], Tensor], count: int, tokens: int) -> dict[str, int]:
    """Returns a dict with the number of prompts from which a model with fused decoder layers and a model without them
    generate equal tokens ("equal"), and the numbers of prompts whose tokens first differ at a tie of two logits ("tie")
    or elsewhere ("different")."""
    model = load()
    peft_ext.quantize_nf4(model, progress=False)
    model = _with_adapter(model).eval()
    wide = copy.deepcopy(model).float()
    found = {"prompts": count, "tokens": tokens, "equal": 0, "tie": 0, "different": 0}
    inputs = [encode(text) for text in prompts(count)]
    by_layer = [generated(peft_ext.accelerate(model), ids, tokens) for ids in inputs]
    peft_ext.accelerate(model, blocks=False)
    for ids, ours in zip(inputs, by_layer, strict=True):
        other = generated(model, ids, tokens)
        if torch.equal(ours, other):
            found["equal"] += 1
            continue
        at = int((ours != other).nonzero()[0])
        read = torch.cat([ids, other[None, :at]], dim=1)
        with torch.no_grad():
            logits, exact = (one(input_ids=read).logits[0, -1].float() for one in (model, wide))
        rounding = (logits - exact).abs().max()
        is_tie = (logits[other[at]] - logits[ours[at]]).abs() <= 2 * rounding
        found["tie" if is_tie else "different"] += 1
    return found


# --- the command ------------------------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """Returns the Markdown table of a result."""
    lines = ["| model | ours, tokens/s | stock, tokens/s | ours over stock |", "|---|---|---|---|"]
    for row in result["rows"]:
        ours, stock = (f"{row[kind]:.1f}" if row[kind] else "" for kind in ("ours", "stock"))
        ratio = f"{row['ours'] / row['stock']:.2f}" if ours and stock else ""
        lines.append(f"| {row['model']} | {ours} | {stock} | {ratio} |")
    return f"**Generation**: {result['what']}.\n\n" + "\n".join(lines)


def same_text(found: Result) -> str:
    """Returns the result of the comparison of tokens as a sentence."""
    return (
        f"Of {found['prompts']} prompts, the model with one operator for each decoder layer and the model without this "
        f"operator generate the same {found['tokens']} tokens for {found['equal']}, first differ at a tie for "
        f"{found['tie']}, and differ elsewhere for {found['different']}. Two tokens tie if the difference of their "
        "logits is at most twice the largest error of a logit of the same step, where the error of a logit is the "
        "difference from the logit of the model in float32. The adapter's values are random, so that ties are frequent."
    )


def measure(args: argparse.Namespace) -> Result:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_ext.run.demo_model import demo_model

    folder = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def encode(text: str) -> Tensor:
        turn = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]

    if args.contender:
        torch.set_num_threads(args.threads)
        generation = Generation(contender(*args.contender, load), encode(prompts(1)[0]), args.tokens)
        serve(generation.run, generation.figures)
        return {}
    if args.prompts:
        return dict(compared(load, encode, args.prompts, args.new))
    rows = rates(args)
    for row in rows:
        print(row, flush=True)
    what = (
        f"{args.tokens} tokens behind a short prompt, greedy, {args.rounds} rounds, by SmolLM2-135M-Instruct, and in "
        "the rows of Qwen 3 and Gemma 3 by models of the shapes of Qwen3-0.6B and Gemma-3-1B with random weights and "
        "49,152 words"
    )
    return {"what": what, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=CONTENDERS, help="default: all")
    parser.add_argument("--tokens", type=int, default=64, help="tokens behind the first token; default: 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=0, help="compare the tokens of this many prompts, at most 200")
    parser.add_argument("--new", type=int, default=32, help="tokens of each of these prompts; default: 32")
    parser.add_argument("--contender", nargs=2, metavar=("NAME", "KIND"), help="generate for one contender, when asked")
    parser.add_argument("--threads", type=int, help="threads of that contender")
    parser.add_argument("--out", type=Path, help=f"result file; default: benchmarks/results/{NAME}-<date>.json")
    args = parser.parse_args()
    if args.contender:
        measure(args)
        return
    about = machine()
    out = result_path("run-same_tokens" if args.prompts else "run-generation", about, args.out)
    write(out, {"machine": about, **measure(args)})
    print(f"written: {out}")


if __name__ == "__main__":
    main()
