"""Functions that the checks of distributed/ share: they make and train a model in one or several processes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft_models import quantize, spread
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import peft_ext
from peft_ext.integrations.adapter_layers import siblings
from peft_ext.integrations.adapter_layers.ia3 import IA3Layer
from peft_ext.integrations.adapter_layers.lora import LowRank
from peft_ext.integrations.model_blocks.pending import Call
from peft_ext.nn import NF4Linear

LLAMA = ARCHITECTURES["Llama"]
LAYERS = 14  # linear layers that LoRA adapts in the model
STEPS = 3
METHODS = ("LoRA", "DoRA", "IA3", "AdaLoRA")

# Bounds for the rounding of sums over a batch in two or four parts, in float32: a few units in the last place of a loss
# near 5, and of the largest entry of a gradient. Adapters, losses and gradients are float32 over every base.
LOSS = 4e-6
GRADIENT = 2e-5

CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


# --- models and steps -------------------------------------------------------------------------------------------------


def make(method: str = "LoRA", base: str = "float32", accelerated: bool = True, **config: Any) -> PeftModel:
    """Returns a Llama with an adapter as after some training, in training mode, equal in every process."""
    model = quantize(LLAMA.build(), base)
    if method == "AdaLoRA":
        chosen = AdaLoraConfig(
            init_r=4, target_r=2, total_step=9, lora_alpha=6, target_modules="all-linear", init_lora_weights=False,
            task_type="CAUSAL_LM", **config,
        )  # fmt: skip
    elif method == "IA3":
        chosen = LLAMA.peft_config("IA3")
    else:
        chosen = LoraConfig(
            r=config.pop("r", 4), lora_alpha=6, use_dora=method == "DoRA", init_lora_weights=False,
            target_modules="all-linear", task_type="CAUSAL_LM", **config,
        )  # fmt: skip
    torch.manual_seed(3)
    model = peft_ext.get_peft_model(model, chosen)
    spread(model)
    return (model if accelerated else peft_ext.restore(model)).train()


def batch() -> dict[str, Tensor]:
    """Returns the whole batch. Each process gets a part of the batch, with an equal number of tokens."""
    return LLAMA.batch()


def long_batch() -> dict[str, Tensor]:
    """Returns a whole batch with enough tokens in each process for layers of one input to be computed together."""
    ids = torch.arange(160).reshape(4, 40) % LLAMA.batch()["input_ids"].max()
    return {"input_ids": ids, "labels": ids}


def part(whole: dict[str, Tensor], rank: Optional[int] = None) -> dict[str, Tensor]:
    """Returns the part of the batch ``whole`` for the process ``rank``, by default for this process."""
    rank = dist.get_rank() if rank is None else rank
    return {name: tensor.chunk(dist.get_world_size())[rank] for name, tensor in whole.items()}


def mine() -> dict[str, Tensor]:
    return part(batch())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # The optimizer is SGD, because Adam makes a step of full size even from a gradient that is only rounding.
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def step(model: nn.Module, inputs: dict[str, Tensor], optimizer: Optional[torch.optim.Optimizer] = None) -> Tensor:
    loss = model(**inputs).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


class LossOutside(nn.Module):
    """Computes the loss outside of the model, as some training loops do, from the logits of the wrapped model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, **inputs: Tensor) -> SimpleNamespace:
        logits = self.model(**inputs).logits
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


class Entropy(LossOutside):
    """Adds another loss of the logits to the model's own loss."""

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        out = self.model(**inputs)
        return SimpleNamespace(loss=out.loss + 0.1 * out.logits.logsumexp(-1).mean())


def mean(loss: Tensor) -> float:
    total = loss.clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train(model: nn.Module, steps: int = STEPS, optimizer: Optional[torch.optim.Optimizer] = None) -> list[float]:
    """Trains the wrapped model, each process on a part of the batch, and returns the losses over the whole batch."""
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    return [mean(step(model, mine(), optimizer)) for _ in range(steps)]


def train_alone(model: nn.Module, steps: int = STEPS) -> list[float]:
    """Trains one process on the whole batch and returns the losses."""
    optimizer = optimizer_of(model)
    return [step(model, batch(), optimizer).item() for _ in range(steps)]


def whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:  # gloo can't gather 8-bit floats
        codes = DTensor.from_local(tensor.to_local().view(torch.uint8), tensor.device_mesh, tensor.placements,
                                   shape=tensor.shape, stride=tensor.stride())  # fmt: skip
        return codes.full_tensor().view(tensor.dtype)
    return tensor.full_tensor()


def unwrapped(name: str) -> str:
    return name.removeprefix("module.")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {unwrapped(name): whole(grad).clone() for name, grad in found.items() if grad is not None}


def adapter(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {unwrapped(name): whole(parameter.detach()).clone() for name, parameter in found.items()}


def shard(model: PeftModel, **options: Any) -> PeftModel:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def assert_close(came: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = GRADIENT) -> None:
    assert came.keys() == wanted.keys() and came
    for name, tensor in came.items():
        assert tensor.shape == wanted[name].shape and tensor.dtype == wanted[name].dtype, name
        moved = (tensor - wanted[name]).abs().max().item()
        assert moved <= bound * wanted[name].abs().max().item(), (name, moved, wanted[name].abs().max().item())


def assert_losses(came: list[float], wanted: list[float], bound: float = LOSS) -> None:
    assert len(came) == len(wanted)
    assert max(abs(a - b) for a, b in zip(came, wanted, strict=True)) <= bound, (came, wanted)
    assert max(wanted) - min(wanted) > 100 * bound, wanted  # the training changes the loss by much more than the bound


def assert_same_everywhere(tensors: dict[str, Tensor]) -> None:
    """Tests that tensors are equal to the bit in all processes."""
    flat = torch.cat([tensor.flatten().float() for tensor in tensors.values()])
    parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, flat)
    assert all(torch.equal(part, parts[0]) for part in parts)


@contextlib.contextmanager
def counted_calls() -> Iterator[dict[str, int]]:
    """Counts the calls of adapter layers.

    "fused" are calls of one layer's operator, also together with the activation in front of it, "joint" calls of the
    operator for several layers with one input, "stock" calls of PEFT's own code.
    """
    counts = {"fused": 0, "joint": 0, "stock": 0}
    kinds = (LowRank, IA3Layer)
    before = [kind._fused for kind in kinds]

    def counting(inner: Callable) -> Callable:
        def run(layer: Any, x: Tensor) -> Optional[Tensor]:
            y = inner(layer, x)
            counts["stock" if y is None else "fused"] += 1
            return y

        return run

    def counting_joint(layer: Any, x: Tensor) -> Optional[Tensor]:
        y = joint(layer, x)
        counts["joint"] += y is not None
        return y

    def counting_gated(layer: Any, *args: Any) -> Optional[Tensor]:
        y = gated(layer, *args)
        counts["fused"] += y is not None
        return y

    joint, gated = siblings.output_of, LowRank.output_of_gated
    LowRank.output_of_gated = counting_gated
    for kind, inner in zip(kinds, before, strict=True):
        kind._fused = counting(inner)
    siblings.output_of = counting_joint
    try:
        yield counts
    finally:
        siblings.output_of, LowRank.output_of_gated = joint, gated
        for kind, inner in zip(kinds, before, strict=True):
            kind._fused = inner


@contextlib.contextmanager
def counted_losses() -> Iterator[dict[str, int]]:
    """Counts losses that were computed without logits, and whole logits that were computed for a loss."""
    found, loss, logits = {"fused": 0, "whole": 0}, Call.loss, Call.compute

    def counted_loss(call: Call, *args: Any, **kwargs: Any) -> Optional[Tensor]:
        value = loss(call, *args, **kwargs)
        found["fused"] += value is not None
        return value

    def counted_logits(call: Call) -> Tensor:
        found["whole"] += call.logits is None
        return logits(call)

    Call.loss, Call.compute = counted_loss, counted_logits
    try:
        yield found
    finally:
        Call.loss, Call.compute = loss, logits


def assert_loss(model: nn.Module, reason: str) -> None:
    """Tests the row of the loss in ``explain``."""
    (row,) = (row for row in peft_ext.explain(model).blocks if row.kind == "loss")
    assert row.reason == reason and row.fused == (reason == "logits in chunks"), row


def assert_same_gradients(model: nn.Module, alone: nn.Module, bound: float = GRADIENT) -> None:
    """Tests that gradients are equal in all processes, and equal to those of one process with the whole batch."""
    found = gradients(model)
    assert_same_everywhere(found)
    assert_close(found, gradients(alone), bound)


def assert_joins(model: nn.Module, alone: nn.Module) -> None:
    """Tests that q, k and v, and gate and up, of two layers are computed together, with one process's gradients."""
    step(alone, long_batch())
    with counted_calls() as calls:
        step(model, part(long_batch()))
    assert calls["joint"] == 10 and not calls["stock"], calls
    assert_same_gradients(model, alone)


def assert_trains(model: nn.Module, wanted: list[float], fused: int = STEPS * LAYERS, stock: int = 0) -> None:
    """Tests that training gives the losses ``wanted``, with the given numbers of fused and stock calls of adapter
    layers.
    """
    with counted_calls() as calls:
        assert_losses(train(model), wanted)
    assert (calls["fused"], calls["stock"]) == (fused, stock), calls


@contextlib.contextmanager
def raises(kind: type[BaseException], text: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert text in str(error), str(error)
        return
    raise AssertionError(f"no {kind.__name__} about {text!r} was raised")


def assert_all_fused(model: nn.Module) -> None:
    rows = peft_ext.explain(model).rows
    assert rows and all(row.fused and not row.reason for row in rows), rows


def assert_same_files(one: Path, several: Path) -> None:
    """Tests that two adapters have one format and equal values up to rounding."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in several.iterdir())
    assert (one / "adapter_config.json").read_bytes() == (several / "adapter_config.json").read_bytes()
    assert_close(*(load_file(path / "adapter_model.safetensors") for path in (several, one)))


def nf4_layers(model: nn.Module) -> list[tuple[str, NF4Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear)]
