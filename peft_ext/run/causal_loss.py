"""The check that a causal language model computes the loss of the next token.

Some classes of transformers that are made for other tasks, such as PegasusForCausalLM, XLNetLMHeadModel and
WhisperForCausalLM, compare the logits at a position with the label at the same position, because they expect labels
that the caller has shifted. The labels of a run are not shifted, so a model that compares labels and logits at one
position would learn to repeat each token that it has just read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..sources.json_file import raised_as
from ..sources.model import base_model
from .data import IGNORED
from .errors import RunError

_TOKENS = 8  # largest number of tokens that a forward of the check reads
# _SHARE: the largest error of the model's difference of two losses, as a share of the distance between the wanted
# difference and the difference of a class that does not shift the labels. Where the rounding of the logits' dtype makes
# a larger error, an error up to the share _MOST of this distance is allowed.
_SHARE, _MOST = 0.01, 0.25


def is_causal(model: nn.Module) -> bool:
    """Returns whether the base of ``model`` can generate text and is, by its configuration, no encoder-decoder."""
    base = base_model(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    return hasattr(base, "can_generate") and bool(base.can_generate())


def check_causal_loss(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises RunError if ``model`` is a causal language model whose forward with labels raises ValueError or TypeError,
    or whose loss is not the mean cross-entropy of each token under the logits of the position before the token.

    The check makes three forwards of at most 8 tokens of the longest of ``rows``, without gradients and in evaluation
    mode. The first forward has no labels. The other two forwards have labels that are chosen from the logits of the
    first forward, so that a class that does not shift the labels gives a very different difference of the two losses.
    A term of the loss that does not depend on the labels, such as the load-balancing loss of a mixture of experts,
    cancels in the difference. No error is raised if no row has two tokens, or if the logits have NaNs or are nearly
    equal at all positions.

    The check changes neither the modes of the modules nor the states of PyTorch's random generators. In a sharded
    model, all processes have to call ``check_causal_loss``, with equal rows. In a model of a prompt method, the check
    calls the base, without the virtual tokens.
    """
    row = max(rows, key=lambda row: len(row["input_ids"]), default={"input_ids": ()})
    count = min(len(row["input_ids"]), _TOKENS)
    if count < 2 or not is_causal(model):
        return
    config = getattr(model, "active_peft_config", None)
    called = base_model(model) if config is not None and config.is_prompt_learning else model
    device = next(model.parameters()).device
    inputs = {name: torch.tensor([list(values[:count])], device=device)
              for name, values in row.items() if name != "labels"}  # fmt: skip
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))

    def forward(labels: Any = None) -> Any:
        # fork_rng restores the random states after each forward, so the three forwards draw the same random numbers.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return called(**inputs, **({} if labels is None else {"labels": labels}))

    with _evaluating(model), torch.no_grad():
        given = forward().logits[0]
        logits = given.float()
        # For each token, the logits at the position before the token minus the logits at the token's own position. A
        # difference with a logit of -inf is NaN or infinite, and becomes 0.
        change = (logits[:-1] - logits[1:]).nan_to_num(0.0, 0.0, 0.0)
        labels = torch.full((2, count), IGNORED, device=device)
        labels[0, 1:], labels[1, 1:] = change.argmin(-1), change.argmax(-1)
        if count > 3:
            # One token gets no label, so that a loss that counts tokens without a label is noticed.
            labels[:, count // 2] = IGNORED
        with raised_as(RunError, f"{_name(model)}: its loss fails (", ValueError, TypeError, after=")"):
            losses = [forward(one[None]).loss.float() for one in labels]
    found = (losses[0] - losses[1]).item()
    wanted, unshifted = _difference(logits[:-1], labels[:, 1:]), _difference(logits[1:], labels[:, 1:])
    distance = abs(wanted - unshifted)
    rounding = 4 * torch.finfo(given.dtype).eps * logits.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    bound = min(max(_SHARE * distance, rounding), _MOST * distance)
    # If the logits have NaNs, or are nearly equal at all positions, the losses can't show a missing shift.
    if not distance > rounding or abs(found - wanted) <= bound:
        return
    is_unshifted = abs(found - unshifted) <= _MOST * distance
    what = "the token itself" if is_unshifted else "something else"
    raise RunError(f"{_name(model)}: its loss compares the logits at each token with {what}, wanted a causal language "
                   "model whose loss is the mean cross-entropy of the next tokens")  # fmt: skip


def _name(model: nn.Module) -> str:
    return type(base_model(model)).__name__


def _difference(logits: Tensor, labels: Tensor) -> float:
    """Returns the mean cross-entropy of ``logits`` with the first row of ``labels``, minus the mean cross-entropy with
    the second row."""
    one, other = (cross_entropy(logits, row, ignore_index=IGNORED) for row in labels)
    return (one - other).item()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts all modules into evaluation mode, and restores the mode of each module at the end of the block."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
