"""Evaluation of a run: held-out losses, answers to prompts, and the check that stock PEFT re-reads the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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
HELD_OUT_POINTS = 4  # most evaluations during training; the evaluations before and after training are not counted
HELD_OUT_SHARE = 1 / 4  # wanted ratio of tokens evaluated during training to tokens trained on, see curve_examples
SAMPLES = 3  # most held-out prompts that the model answers in addition to the user's prompt
REREAD = 2  # number of held-out examples for which the logits of the re-read adapter are compared
CHUNK = 64  # number of tokens whose logits are converted to float32 at a time

Losses = list[tuple[float, int]]  # for each example: the sum of the losses of its labels, and the number of labels


# --- losses -----------------------------------------------------------------------------------------------------------


def collate(run: Run, examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Returns the examples as one padded batch of tensors on the run's device."""
    from transformers import DataCollatorForSeq2Seq

    batch = DataCollatorForSeq2Seq(run.tokenizer, label_pad_token_id=IGNORED)([dict(e) for e in examples])
    return {name: tensor.to(run.device) for name, tensor in batch.items()}


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Returns the logits of the batch's tokens, without the logits of the virtual tokens that prompt methods add."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, -batch["input_ids"].shape[1] :]


def held_out_losses(run: Run, model: Any, chosen: Optional[Iterable[int]] = None) -> Losses:
    """Returns, for each held-out example (or only for those with the indices ``chosen``), a pair: the sum of its
    tokens' losses, and the number of its labels.

    Each rank computes the losses of a part of the examples. A signal during training ends ``held_out_losses`` early,
    with fewer losses, unless the run is sharded. Each forward has one example, so an example's loss does not depend on
    the number of ranks.
    """
    model.eval()
    examples, ranks, found = run.examples.held_out, run.ranks, {}
    wanted = list(range(len(examples)) if chosen is None else chosen)
    share = [wanted[place] for place in ranks.mine(len(wanted))]
    if run.sharded:  # each forward needs all ranks: a rank without an example repeats an example
        share += wanted[: math.ceil(len(wanted) / ranks.world) - len(share)]
    for index in bar(share, "held-out loss", "example") if chosen is None else share:
        if run.stop.training and run.stop.signal and not run.sharded:
            break
        batch = collate(run, [examples[index]])
        logits, labels = logits_of(model, batch)[0, :-1], batch["labels"][0, 1:]
        total = 0.0
        for part, targets in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
            total += cross_entropy(part.float(), targets, reduction="sum", ignore_index=IGNORED).item()
        found[index] = total, int((labels != IGNORED).sum())
    return list(ranks.merged(found).values())


def mean_loss(losses: Losses) -> float:
    """Returns the mean loss over all tokens that have a label."""
    return sum(total for total, _ in losses) / sum(count for _, count in losses)


def perplexity(losses: Losses) -> float:
    """Returns ``exp`` of the mean loss over all tokens that have a label; at most ``exp(700)``."""
    return math.exp(min(mean_loss(losses), 700.0))


def curve_examples(run: Run) -> list[int]:
    """Returns the indices of the held-out examples on which each point of the held-out curve is computed.

    The indices are evenly spread over the held-out examples. The number of indices is as large as possible while all
    evaluations during training have at most HELD_OUT_SHARE times the number of training tokens, but at least 4 (or the
    number of held-out examples). A resumed run uses the number of examples in its checkpoint's history.
    """

    def tokens(examples: list[Any]) -> float:
        return sum(len(e["input_ids"]) for e in examples) / len(examples)

    there = len(run.examples.held_out)
    trained = run.steps * run.step_examples * tokens(run.examples.train)
    count = int(HELD_OUT_SHARE * trained / HELD_OUT_POINTS / tokens(run.examples.held_out))
    earlier = trainer_history(run.checkpoint)
    count = next((entry["held_out_examples"] for entry in earlier if "held_out_examples" in entry), count)
    count = min(max(count, 4), there)
    return [index * there // count for index in range(count)]


# --- prompts ----------------------------------------------------------------------------------------------------------


def sample_prompts(run: Run) -> list[dict[str, Any]]:
    """Returns a list of dicts, one for each prompt to answer: the user's or a default prompt, then up to SAMPLES
    prompts of held-out conversations."""
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
    """Returns the model's greedy answer; "" where the prompt leaves no room for an answer."""
    ids = torch.tensor([prompt_ids(run.tokenizer, messages, run.corpus.kind)], device=run.device)
    count = int(min(NEW_TOKENS, run.room_of_prompts - ids.shape[1]))
    if count < 1 or ids.numel() == 0:
        return ""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with status("answering a prompt"):
        return continued(
            model.eval(), run.tokenizer, inputs, count, has_prompt=run.is_prompt_method, together=run.sharded
        )  # fmt: skip


def answers(run: Run, model: Any, prompts: list[list[dict[str, str]]]) -> list[str]:
    """Returns the answers to the prompts. Each prompt is answered by one rank, or by all ranks together in a sharded
    run."""
    if run.sharded:
        return [answer(run, model, messages) for messages in prompts]
    share = {index: answer(run, model, prompts[index]) for index in run.ranks.mine(len(prompts))}
    return list(run.ranks.merged(share).values())


def continued(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    count: int,
    *,
    has_prompt: bool,
    temperature: float = 0.0,
    together: bool = False,
) -> str:
    """Returns the text of up to ``count`` tokens that the model generates after the inputs.

    Each token is the likeliest token, or is sampled where ``temperature`` is not 0. With ``has_prompt``, the adapter is
    of a prompt method, and :func:`greedy` replaces the model's ``generate``. With ``together``, all processes call
    ``continued``, because each forward needs all processes.
    """
    from peft.helpers import DoraCaching

    ids = inputs["input_ids"]
    draws = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.no_grad(), DoraCaching():  # weights do not change during an answer, so DoRA's norms are cached
        if has_prompt:
            out = greedy(model, ids, count, temperature)
        else:
            out = model.generate(  # these arguments overrule huge values in an untrusted generation_config
                **inputs, max_new_tokens=count, use_cache=True, num_beams=1, num_return_sequences=1,
                synced_gpus=together, pad_token_id=tokenizer.pad_token_id,
                **(draws if temperature else {"do_sample": False}),
            )  # fmt: skip
    said = out[0] if getattr(model.config, "is_encoder_decoder", False) else out[0, ids.shape[1] :]
    return tokenizer.decode(said, skip_special_tokens=True).strip()


def greedy(model: Any, input_ids: Any, count: int, temperature: float = 0.0) -> Any:
    """Returns ``input_ids [1, T]`` followed by up to ``count`` generated tokens, computed without a cache.

    Each token is the likeliest token, or is sampled where ``temperature`` is not 0. ``greedy`` replaces ``generate``
    for PEFT's prompt methods, because ``generate`` loses the virtual tokens with transformers 5.
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
    """The largest absolute differences between logits, computed for at most two held-out examples.

    Attributes:
        max_difference: largest difference between the logits of the trained model and of a fresh base with the saved
            adapter, both run by stock PEFT except for the models that ``reread`` names.
        bound: the difference that rounding may cause: 4 times the machine epsilon of the computation's dtype, times
            ``largest``.
        ok: whether ``max_difference`` is at most ``bound``.
        largest: largest absolute logit of the trained model.
        accelerated_difference: largest difference between the trained model's logits with and without fused layers;
            None in a stock run, for a model with packed experts, and for DoRA over NF4 in a sharded run.
    """

    max_difference: float
    bound: float
    ok: bool
    largest: float
    accelerated_difference: Optional[float]


def reread(run: Run, model: Any, fresh_model: Callable[[], Any]) -> Check:
    """Compares the logits of the trained model with those of ``fresh_model()``, a fresh base with the saved adapter.

    Usually, both models run PEFT's own code in the comparison, and the trained model is not accelerated again
    afterwards. Models with packed experts are compared while they are accelerated, because PEFT itself can't adapt
    these experts. Models with DoRA over NF4 in a sharded run stay accelerated during the comparison, too.
    """
    from ..nn import NF4Linear
    from ..nn.experts import FrozenExperts

    batch = collate(run, run.examples.held_out[:REREAD])
    keep = batch["attention_mask"].bool()  # the comparison leaves out padding tokens, whose logits have no meaning
    model.eval()
    kinds = (FrozenExperts, NF4Linear) if run.options.method == "dora" else FrozenExperts
    accelerated, stays = None, any(isinstance(module, kinds) for module in model.modules())
    if not run.options.stock and not stays:
        from ..integrations.peft import restore

        accelerated = logits_of(model, batch)[keep]
        restore(model)
    live = logits_of(model, batch)[keep]
    differs = None if accelerated is None else _largest_difference(accelerated, live)
    del accelerated
    fresh = fresh_model().eval()
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
    """Returns the largest absolute difference, computed in float32; NaN where a difference is NaN."""
    parts = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return torch.stack([(x.float() - y.float()).abs().max() for x, y in parts]).max().item()
