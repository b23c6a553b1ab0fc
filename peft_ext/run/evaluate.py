"""What a model is asked before and after training: held-out losses, prompts, and whether the adapter re-reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .checkpoints import trainer_history
from .data import IGNORED, NEW_TOKENS, PYTHON_DOCS, prompt_ids
from .prepare import Run
from .progress import bar, status

DEMO_PROMPT = "In Python, what is the difference between the `is` operator and `==`?"
HELD_OUT_POINTS = 4  # evaluations within training, beside the one before it and the one after it
HELD_OUT_SHARE = 1 / 4  # what those evaluations read, at most, of the tokens that are trained on: a forward of them
SAMPLES = 3  # held-out prompts that are asked beside the user's
REREAD = 2  # held-out examples that a re-read adapter is compared on
CHUNK = 64  # tokens whose logits are in float32 at a time

Losses = list[tuple[float, int]]  # of each example: the sum of the losses, and of how many tokens


# --- losses -----------------------------------------------------------------------------------------------------------


def collate(run: Run, examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Returns a batch of examples on the run's device."""
    from transformers import DataCollatorForSeq2Seq

    batch = DataCollatorForSeq2Seq(run.tokenizer, label_pad_token_id=IGNORED)([dict(e) for e in examples])
    return {name: tensor.to(run.device) for name, tensor in batch.items()}


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Returns the logits of the given tokens; those of virtual tokens, which prompt methods put first, are left out."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, -batch["input_ids"].shape[1] :]


def held_out_losses(run: Run, model: Any, chosen: Optional[Iterable[int]] = None) -> Losses:
    """Returns the losses of each held-out example, or of the chosen ones."""
    model.eval()
    examples, sums = run.examples.held_out, []
    for index in bar(range(len(examples)), "held-out loss", "example") if chosen is None else chosen:
        batch = collate(run, [examples[index]])
        logits, labels = logits_of(model, batch)[0, :-1], batch["labels"][0, 1:]
        total = 0.0
        for part, wanted in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
            total += cross_entropy(part.float(), wanted, reduction="sum", ignore_index=IGNORED).item()
        sums.append((total, int((labels != IGNORED).sum())))
    return sums


def mean_loss(losses: Losses) -> float:
    """Returns the mean over all tokens, each weighing the same."""
    return sum(total for total, _ in losses) / sum(count for _, count in losses)


def perplexity(losses: Losses) -> float:
    """Returns ``exp`` of the mean loss."""
    return math.exp(min(mean_loss(losses), 700.0))


def curve_examples(run: Run) -> list[int]:
    """Returns the held-out examples that each point of the curve is of.

    They are as many as HELD_OUT_SHARE allows, evenly spread. A resumed run takes the ones that it began with.
    """

    def tokens(examples: list[Any]) -> float:
        return sum(len(e["input_ids"]) for e in examples) / len(examples)

    o, there = run.options, len(run.examples.held_out)
    trained = run.steps * o.batch_size * o.grad_accum * tokens(run.examples.train)
    count = int(HELD_OUT_SHARE * trained / HELD_OUT_POINTS / tokens(run.examples.held_out))
    earlier = trainer_history(run.checkpoint)
    count = next((entry["held_out_examples"] for entry in earlier if "held_out_examples" in entry), count)
    count = min(max(count, 4), there)
    return [index * there // count for index in range(count)]


# --- prompts ----------------------------------------------------------------------------------------------------------


def sample_prompts(run: Run) -> list[dict[str, Any]]:
    """Returns what to ask: the user's prompt, then held-out ones, with what the data answers."""
    prompt = run.options.prompt
    if prompt is None:
        prompt = DEMO_PROMPT if run.corpus.where == PYTHON_DOCS else run.corpus.sample_prompt()
    samples: list[dict[str, Any]] = [{"prompt": prompt, "messages": [{"role": "user", "content": prompt}]}]
    for record in run.corpus.held_out if run.corpus.kind == "chat" else []:
        turn = next(i for i, message in enumerate(record) if message["role"] == "assistant")
        messages, wanted = record[:turn], record[turn]["content"]
        if not messages or not _has_room(run, messages):
            continue
        asked = messages[-1]["content"]
        if asked == prompt and "expected" not in samples[0]:
            samples[0] |= {"messages": messages, "expected": wanted}
        elif all(asked != sample["prompt"] for sample in samples):
            samples.append({"prompt": asked, "messages": messages, "expected": wanted})
        if len(samples) > SAMPLES:
            break
    return samples


def _has_room(run: Run, messages: list[dict[str, str]]) -> bool:
    tokens = len(prompt_ids(run.tokenizer, messages, run.corpus.kind))
    return tokens <= run.options.block_size and tokens + NEW_TOKENS <= run.room_of_prompts


def answer(run: Run, model: Any, messages: list[dict[str, str]]) -> str:
    """Returns the greedy answer; "" where the prompt leaves no room for one."""
    from peft.helpers import DoraCaching

    ids = torch.tensor([prompt_ids(run.tokenizer, messages, run.corpus.kind)], device=run.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    count = int(min(NEW_TOKENS, run.room_of_prompts - ids.shape[1]))
    if count < 1 or ids.numel() == 0:
        return ""
    model.eval()
    with torch.no_grad(), DoraCaching(), status("answering a prompt"):  # no weight changes within an answer
        if run.is_prompt_method:
            out = greedy(model, ids, count)
        else:
            out = model.generate(**inputs, max_new_tokens=count, do_sample=False, use_cache=True,
                                 pad_token_id=run.tokenizer.pad_token_id)  # fmt: skip
    return run.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def greedy(model: Any, input_ids: Any, count: int, temperature: float = 0.0) -> Any:
    """Returns ``input_ids [1, T]`` and up to ``count`` tokens more, from the model's own forward without a cache.

    Each is the likeliest token, or drawn where there is a ``temperature``. This is for PEFT's prompt methods, whose
    ``generate`` loses the virtual tokens with transformers 5.
    """
    stop = model.generation_config.eos_token_id
    stop = stop if isinstance(stop, list) else [stop]
    for _ in range(count):
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits[:, -1]
        if temperature:
            token = torch.multinomial((logits.float() / temperature).softmax(-1), 1)
        else:
            token = logits.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
        if token.item() in stop:
            break
    return input_ids


# --- the adapter's files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """The greatest differences between logits on two held-out examples.

    Attributes:
        max_difference: between the trained model on its stock path and stock PEFT's reading of the saved adapter.
        bound: what rounding explains of it, four units in the last place of the largest logit. ok: it is no more.
        largest: the largest logit.
        accelerated_difference: between the fused and the stock path of the trained model; None in a stock run.
    """

    max_difference: float
    bound: float
    ok: bool
    largest: float
    accelerated_difference: Optional[float]


def reread(run: Run, model: Any, fresh_base: Any) -> Check:
    """Compares the trained model, which loses its acceleration, with ``fresh_base()`` and the saved adapter on it.

    Experts over NF4 have an adapter where they are accelerated alone, and are so in both.
    """
    from peft import PeftConfig, PeftModel

    from ..model import register_layers
    from ..nn import NF4Experts

    batch = collate(run, run.examples.held_out[:REREAD])
    keep = batch["attention_mask"].bool()  # what is computed at padding is nobody's business
    model.eval()
    accelerated, stays = None, any(isinstance(module, NF4Experts) for module in model.modules())
    if not run.options.stock and not stays:
        from ..integrations.peft import restore

        accelerated = logits_of(model, batch)[keep]
        restore(model)
    live = logits_of(model, batch)[keep]
    differs = None if accelerated is None else _largest_difference(accelerated, live)
    del accelerated
    base, folder = fresh_base(), str(run.options.output)
    config = PeftConfig.from_pretrained(folder)
    register_layers(config, base)
    fresh = PeftModel.from_pretrained(base, folder, config=config, torch_device=str(run.device)).eval()
    del base
    if stays:
        from ..integrations.peft import accelerate

        accelerate(fresh)
    difference = _largest_difference(live, logits_of(fresh, batch)[keep])
    largest = live.abs().max().item()
    bound = 4 * torch.finfo(run.dtype).eps * largest
    return Check(
        max_difference=difference, bound=bound, ok=difference <= bound, largest=largest, accelerated_difference=differs
    )


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """Returns it in float32; NaN where there is one."""
    parts = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return torch.stack([(x.float() - y.float()).abs().max() for x, y in parts]).max().item()
