"""Times the generation of text, one token at a time, and compares the tokens of a whole decoder layer's operator.

``python -m benchmarks.generation``              tokens/s of each contender; writes a result file
``python -m benchmarks.generation --prompts 200``  compares the tokens of 200 prompts too

The model is SmolLM2-135M-Instruct. Every contender generates the same number of tokens from the same prompt with
transformers' ``generate``, greedily, and the contenders run in turn. The tokens per second are those behind the first
token: the time of the prompt and of the first token is measured by itself and subtracted.

bf16              the bfloat16 model
LoRA              the bfloat16 model with a LoRA adapter of rank 16 on all linear layers
NF4               the linear layers in NF4
NF4, LoRA         the linear layers in NF4, with the adapter
NF4, compiled     as NF4, with transformers' static cache, and with ``torch.compile`` over the forward

"stock" is transformers and PEFT, and bitsandbytes for NF4; "ours" is the same model after ``peft_ext.accelerate``. All
models are frozen, and so in particular their heads.

The comparison of tokens: the accelerated NF4 model with an adapter generates from each prompt twice, with fused decoder
layers (``accelerate``'s default, where one operator computes a whole layer) and layer by layer (``blocks=False``). At
the first token that differs, the second way's logits of the two tokens are compared: a difference of at most one unit
in the last place of bfloat16 is a tie.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # without kernels the reference would be timed

import torch
from torch import Tensor

import peft_ext

from .files import Result, result_path, write
from .harness import machine

NAME = "run-generation-avx512_bf16"
CONTENDERS = ("bf16", "LoRA", "NF4", "NF4, LoRA", "NF4, compiled")
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
    model.is_loaded_in_4bit = True  # PEFT then uses its class for Linear4bit


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


def contender(name: str, kind: str, load: Callable[[], Any]) -> Any:
    """Returns the model of a contender in evaluation mode. ``kind``: "ours" or "stock"."""
    model = load()
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


def _seconds(model: Any, ids: Tensor, count: int) -> float:
    start = time.perf_counter()
    generated(model, ids, count)
    return time.perf_counter() - start


def rates(models: dict[str, Any], ids: Tensor, tokens: int, rounds: int) -> dict[str, float]:
    """Returns each model's tokens per second, the median over the rounds in which the models run in turn."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(1 + rounds):
        for name, model in models.items():
            first, whole = _seconds(model, ids, 1), _seconds(model, ids, 1 + tokens)
            if turn:  # the first turn warms up
                found[name].append(tokens / (whole - first))
    return {name: statistics.median(values) for name, values in found.items()}


# --- the tokens of the operator of a layer ----------------------------------------------------------------------------


def compared(load: Callable[[], Any], encode: Callable[[str], Tensor], count: int, tokens: int) -> dict[str, int]:
    """Counts the prompts whose tokens are equal in both ways, and those that first differ at a tie or elsewhere."""
    model = load()
    peft_ext.quantize_nf4(model, progress=False)
    model = _with_adapter(model).eval()
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
        with torch.no_grad():
            logits = model(input_ids=torch.cat([ids, other[None, :at]], dim=1)).logits[0, -1].float()
        first, second = logits[other[at]], logits[ours[at]]
        is_tie = (first - second).abs() <= first.abs() * 2**-7  # one unit in the last of bfloat16's 8 bits
        found["tie" if is_tie else "different"] += 1
    return found


# --- the command ------------------------------------------------------------------------------------------------------


def table(result: Result) -> str:
    """Returns the Markdown table of a result."""
    lines = ["| model | ours, tokens/s | stock, tokens/s | ours over stock |", "|---|---|---|---|"]
    for row in result["rows"]:
        ours, stock = row["ours"], row["stock"]
        peer, ratio = ("", "") if stock is None else (f"{stock:.1f}", f"{ours / stock:.2f}")
        lines.append(f"| {row['model']} | {ours:.1f} | {peer} | {ratio} |")
    text = f"**Generation**: {result['what']}.\n\n" + "\n".join(lines)
    if (found := result.get("same_tokens")) is not None:
        text += (
            f"\n\nOf {found['prompts']} prompts with {found['tokens']} tokens each, the operator of a whole layer and "
            f"the layers one by one give equal tokens in {found['equal']}, first differ at a tie of two logits in "
            f"{found['tie']}, and differ otherwise in {found['different']}."
        )
    return text


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

    ids = encode(prompts(1)[0])
    models: dict[tuple[str, str], Any] = {}
    for name in args.contenders:
        for kind in ("ours",) if "compiled" in name else ("ours", "stock"):
            models[name, kind] = contender(name, kind, load)
    named = rates({f"{name}; {kind}": model for (name, kind), model in models.items()}, ids, args.tokens, args.rounds)
    rows = []
    for name in args.contenders:
        stock: Optional[float] = named.get(f"{name}; stock")
        ours = named[f"{name}; ours"]
        rows.append({"model": name, "ours": round(ours, 1), "stock": stock and round(stock, 1)})
        print(rows[-1], flush=True)
    models.clear()
    result: Result = {
        "what": f"SmolLM2-135M-Instruct, {args.tokens} tokens behind a prompt of {ids.shape[1]}, greedy, "
        f"{args.rounds} rounds",
        "rows": rows,
    }
    if args.prompts:
        result["same_tokens"] = compared(load, encode, args.prompts, args.new)
        print(result["same_tokens"], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=CONTENDERS, help="default: all")
    parser.add_argument("--tokens", type=int, default=64, help="tokens behind the first token; default: 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=0, help="prompts whose tokens are compared, at most 200")
    parser.add_argument("--new", type=int, default=32, help="tokens of each of these prompts; default: 32")
    parser.add_argument("--out", type=Path, help=f"result file; default: benchmarks/results/{NAME}-<date>.json")
    args = parser.parse_args()
    about = machine()
    out = result_path("run-generation", about, args.out)
    write(out, {"machine": about, **measure(args)})
    print(f"written: {out}")


if __name__ == "__main__":
    main()
