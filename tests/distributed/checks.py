"""What test_distributed.py runs in several processes: ``torchrun checks.py FOLDER CHECK...``.

Every process runs every check and writes ``FOLDER/<rank>.json``: by check, "ok" or the traceback. A process that fails
stops, and torchrun ends the others: they would wait for it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch.distributed.checkpoint as dcp
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft_models import quantize, spread
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import peft_ext
from peft_ext.integrations.fused.ia3 import IA3Layer
from peft_ext.integrations.fused.lora import LowRank
from peft_ext.nn import NF4Linear

LLAMA = ARCHITECTURES["Llama"]
LAYERS = 14  # that LoRA adapts of it
STEPS = 3
METHODS = ("LoRA", "DoRA", "IA3", "AdaLoRA")

# Sums of a batch in two or four parts round otherwise than whole ones: a few units in the last place of a loss near 5,
# and of the largest entry of a gradient, in float32, in which adapters, losses and gradients are whatever the base.
LOSS = 4e-6
GRADIENT = 2e-5

CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


# --- models and steps -------------------------------------------------------------------------------------------------


def make(method: str = "LoRA", base: str = "float32", accelerated: bool = True, **config: Any) -> PeftModel:
    """The same model in every process: Llama with an adapter as after some training, in training mode."""
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


def batch(rank: Optional[int] = None) -> dict[str, Tensor]:
    """The whole batch, or one process's part of it: as many tokens as any other's."""
    whole = LLAMA.batch()
    return whole if rank is None else {name: part.chunk(dist.get_world_size())[rank] for name, part in whole.items()}


def mine() -> dict[str, Tensor]:
    return batch(dist.get_rank())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # Not Adam, which makes steps of one size out of gradients that are rounding alone.
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def step(model: nn.Module, inputs: dict[str, Tensor], optimizer: Optional[torch.optim.Optimizer] = None) -> Tensor:
    loss = model(**inputs).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def mean(loss: Tensor) -> float:
    total = loss.clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train(model: nn.Module, steps: int = STEPS, optimizer: Optional[torch.optim.Optimizer] = None) -> list[float]:
    """The losses over the whole batch, of which each process sees its part."""
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    return [mean(step(model, mine(), optimizer)) for _ in range(steps)]


def train_alone(model: nn.Module, steps: int = STEPS) -> list[float]:
    """The same of one process with the whole batch."""
    optimizer = optimizer_of(model)
    return [step(model, batch(), optimizer).item() for _ in range(steps)]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
    assert max(wanted) - min(wanted) > 100 * bound, wanted  # the steps did something


def assert_same_everywhere(tensors: dict[str, Tensor]) -> None:
    """To the bit."""
    flat = torch.cat([tensor.flatten().float() for tensor in tensors.values()])
    parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, flat)
    assert all(torch.equal(part, parts[0]) for part in parts)


@contextlib.contextmanager
def counted_calls() -> Iterator[dict[str, int]]:
    """How many calls of adapter layers ran on the op, "fused", and on PEFT's own path, "stock"."""
    counts = {"fused": 0, "stock": 0}
    kinds = (LowRank, IA3Layer)
    before = [kind._fused for kind in kinds]

    def counting(inner: Callable) -> Callable:
        def run(layer: Any, x: Tensor) -> Optional[Tensor]:
            y = inner(layer, x)
            counts["stock" if y is None else "fused"] += 1
            return y

        return run

    for kind, inner in zip(kinds, before, strict=True):
        kind._fused = counting(inner)
    try:
        yield counts
    finally:
        for kind, inner in zip(kinds, before, strict=True):
            kind._fused = inner


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


# --- DDP --------------------------------------------------------------------------------------------------------------


@check
def ddp_takes_the_steps_of_one_process(folder: Path) -> None:
    for method, base in (("LoRA", "float32"), ("DoRA", "nf4"), ("IA3", "float32"), ("AdaLoRA", "nf4")):
        wanted = train_alone(make(method, base))
        model = DDP(make(method, base))
        assert_all_fused(model)
        with counted_calls() as calls:
            assert_losses(train(model), wanted)
        assert calls["fused"] >= STEPS * 2 and not calls["stock"]
        assert_same_everywhere(adapter(model))


@check
def ddp_gradients_are_the_same_everywhere(folder: Path) -> None:
    for method, base in (("LoRA", "float32"), ("DoRA", "nf4"), ("LoRA", "bnb nested"), ("IA3", "nf4")):
        alone, model = make(method, base), DDP(make(method, base))
        step(alone, batch())
        step(model, mine())
        assert_same_everywhere(gradients(model))
        assert_close(gradients(model), gradients(alone))


@check
def ddp_over_bfloat16(folder: Path) -> None:
    """A product's sums may go in another order for another number of rows, and then round to the next bfloat16: half of
    2^-8, at each of some thirty products on the way."""
    alone, model = make(base="nf4 bfloat16"), DDP(make(base="nf4 bfloat16"))
    assert_all_fused(model)
    assert abs(mean(step(model, mine())) - step(alone, batch()).item()) <= 2**-8
    assert_same_everywhere(gradients(model))
    assert_close(gradients(model), gradients(alone), bound=2**-5)


@check
def ddp_saves_the_adapter_of_one_process(folder: Path) -> None:
    for method in METHODS:
        one, several = folder / f"{method}-one", folder / f"{method}-ddp"
        alone, model = make(method, "nf4"), DDP(make(method, "nf4"))
        train_alone(alone)
        train(model)
        if dist.get_rank() == 0:
            alone.save_pretrained(one)
            model.module.save_pretrained(several)
            assert_same_files(one, several)
            loaded = PeftModel.from_pretrained(quantize(LLAMA.build(), "float32"), several)
            assert loaded.peft_config["default"].peft_type == alone.peft_config["default"].peft_type
        dist.barrier()


def assert_same_files(one: Path, several: Path) -> None:
    """Two adapters of one format, equal to rounding."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in several.iterdir())
    assert (one / "adapter_config.json").read_bytes() == (several / "adapter_config.json").read_bytes()
    assert_close(*(load_file(path / "adapter_model.safetensors") for path in (several, one)))


@check
def ddp_accumulates_without_sending(folder: Path) -> None:
    """Two half batches, the first within no_sync: the gradients of one step, and before the second each its own."""
    alone, model = make(base="nf4"), DDP(make(base="nf4"))
    step(alone, batch())
    halves = [{name: part[half::2] for name, part in mine().items()} for half in (0, 1)]
    with model.no_sync():
        (model(**halves[0]).loss / 2).backward()
    with raises(AssertionError, ""):
        assert_same_everywhere(gradients(model))
    (model(**halves[1]).loss / 2).backward()
    assert_same_everywhere(gradients(model))
    assert_close(gradients(model), gradients(alone))
    model.zero_grad()
    ((model(**mine()).loss + model(**mine()).loss) / 2).backward()  # as DPO's loss is of two forwards
    assert_close(gradients(model), gradients(alone))


class Branches(nn.Module):
    """Of its two layers a call may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.side = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        y = self.up(x)
        return y + self.side(x) if both else y


@check
def ddp_finds_unused_parameters(folder: Path) -> None:
    def build() -> PeftModel:
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["up", "side"], init_lora_weights=False)
        return peft_ext.get_peft_model(Branches(), config)

    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    alone, model = build(), DDP(build(), find_unused_parameters=True)
    part = x.chunk(dist.get_world_size())[dist.get_rank()]
    for both in (False, True, False):
        alone(x, both).square().mean().backward()
        model(part, both).square().mean().backward()
    assert_same_everywhere(gradients(model))
    assert_close(gradients(model), gradients(alone))


@check
def ddp_leaves_the_buffers_alone_where_told(folder: Path) -> None:
    """The scales of NF4Linear are buffers, which DDP sends before each forward unless it is told not to."""
    scales = 4 * LAYERS  # absmax and what decodes it
    assert len(DDP(make(base="nf4")).modules_buffers) >= scales
    wanted = train_alone(make(base="nf4"))
    names = {"broadcast_buffers", "forward_sync_buffers"} & set(inspect.signature(DDP).parameters)
    for name in sorted(names):
        quiet = DDP(make(base="nf4"), **{name: False})
        assert not quiet.will_sync_module_buffers()
        assert_losses(train(quiet), wanted)


# --- what DDP and FSDP2 have in common --------------------------------------------------------------------------------


@check
def gradient_checkpointing_changes_nothing(folder: Path) -> None:
    """With dropout, whose masks the recomputation has to draw again."""
    for base in ("float32", "nf4"):
        for wrap in (DDP, shard):
            found = []
            for checkpointing in (False, True):
                model = make(base=base, lora_dropout=0.2)
                if checkpointing:
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                    model.enable_input_require_grads()
                model = wrap(model)
                torch.manual_seed(7 + dist.get_rank())
                with counted_calls() as calls:
                    losses = [mean(step(model, mine()))]
                assert calls["fused"] > LAYERS * (1 + checkpointing) - 4 and not calls["stock"], calls
                found.append((losses, gradients(model)))
            assert found[0][0] == found[1][0]
            for name, grad in found[0][1].items():
                assert torch.equal(grad, found[1][1][name]), name


@check
def dropout_is_each_process_its_own(folder: Path) -> None:
    """Masks follow the process's generator: the same seed gives the same, one of its own another."""
    for wrap in (DDP, shard):
        model = wrap(make(base="nf4", lora_dropout=0.5))
        losses = []
        for seed in (7, 7, 7 + dist.get_rank()):
            torch.manual_seed(seed)
            losses.append(model(**batch(0)).loss.detach().reshape(1))
        gathered = [torch.empty(3) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, torch.cat(losses))
        found = torch.stack(gathered)
        assert torch.equal(found[0, :2], found[1, :2]) and found[0, 0] == found[0, 1]
        assert found[0, 2] != found[1, 2]


@check
def accelerate_before_and_after_wrapping(folder: Path) -> None:
    for base in ("nf4", "bnb nested"):
        for wrap in (DDP, shard):
            before = wrap(make(base=base))
            after = wrap(make(base=base, accelerated=False))
            assert all(row.reason == "accelerate(model) was not called on it" for row in peft_ext.explain(after).rows)
            assert peft_ext.accelerate(after) is after
            assert_all_fused(before)
            assert_all_fused(after)
            with counted_calls() as calls:
                assert train(before) == train(after)
            assert calls == {"fused": 2 * STEPS * LAYERS, "stock": 0}, calls
            peft_ext.restore(after)
            assert not any(row.fused for row in peft_ext.explain(after).rows)


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


@check
def fsdp2_takes_the_steps_of_one_process(folder: Path) -> None:
    runs = [("LoRA", base) for base in ("float32", "nf4", "bnb", "bnb nested")]
    for method, base in (*runs, ("DoRA", "nf4"), ("DoRA", "bnb nested"), ("IA3", "float32")):
        alone, model = make(method, base), shard(make(method, base))
        assert_all_fused(model)
        step(alone, batch())
        with counted_calls() as calls:
            step(model, mine())
        assert calls["fused"] >= 2 and not calls["stock"]
        found = gradients(model)
        assert_same_everywhere(found)
        assert_close(found, gradients(alone))
        assert_all_fused(model)
        alone.zero_grad()
        model.zero_grad()
        assert_losses(train(model), train_alone(alone))
        assert_close(adapter(model), adapter(alone))


@check
def fsdp2_without_resharding_and_with_two_forwards(folder: Path) -> None:
    """As DPO's and GRPO's trainers call a model: twice before a backward."""
    alone, model = make(base="nf4"), shard(make(base="nf4"), reshard_after_forward=False)
    for _ in range(2):
        for trained, inputs in ((alone, batch()), (model, mine())):
            (trained(**inputs).loss + trained(**inputs).loss).backward()
    assert_close(gradients(model), gradients(alone))


@check
def fsdp2_with_whole_codes(folder: Path) -> None:
    """For PyTorch 2.11, which shards floats alone."""
    model = make(base="nf4")
    codes = {parameter for parameter in model.parameters() if parameter.dtype is torch.uint8}
    shard(model, ignored_params=codes)
    assert len(codes) == LAYERS and not any(isinstance(layer.weight, DTensor) for _, layer in _nf4_layers(model))
    assert_all_fused(model)
    assert_losses(train(model), train_alone(make(base="nf4")))


@check
def fsdp2_accumulates_without_sending(folder: Path) -> None:
    alone, model = make(base="nf4"), shard(make(base="nf4"))
    step(alone, batch())
    for half in (0, 1):
        model.set_requires_gradient_sync(half == 1)
        (model(**{name: part[half::2] for name, part in mine().items()}).loss / 2).backward()
    assert_close(gradients(model), gradients(alone))


@check
def fsdp2_shards_the_codes(folder: Path) -> None:
    """Each process has its part of the packed bytes, and whole scales; what is gathered is the very bytes."""
    whole_model, model = make(base="nf4"), shard(make(base="nf4"))
    size, rank = dist.get_world_size(), dist.get_rank()
    seen = []
    for (name, alone), part in zip(_nf4_layers(whole_model), (layer for _, layer in _nf4_layers(model)), strict=True):
        weight = part.weight
        assert isinstance(weight, DTensor) and weight.dtype is torch.uint8 and not weight.requires_grad, name
        count = alone.weight.numel()
        rows = -(-count // size)
        wanted = max(0, min(rows, count - rank * rows))
        assert tuple(weight.to_local().shape) == (wanted, 1), (name, weight.to_local().shape)
        for scale in ("absmax", "nested_absmax", "nested_code", "nested_offset"):
            assert type(getattr(part, scale)) is Tensor and torch.equal(getattr(part, scale), getattr(alone, scale))
        part.register_forward_pre_hook(lambda layer, _, bits=alone.weight: seen.append(torch.equal(layer.weight, bits)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**mine())
    assert seen == [True] * LAYERS


def _nf4_layers(model: nn.Module) -> list[tuple[str, NF4Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear)]


@check
def fsdp2_shards_unevenly(folder: Path) -> None:
    """165 bytes of codes, 11 rows and rank 3: nothing of it divides by the processes, and some of them hold nothing."""

    def build() -> PeftModel:
        torch.manual_seed(1)
        model = peft_ext.quantize_nf4(nn.Sequential(nn.Linear(30, 11), nn.GELU(), nn.Linear(11, 1)), progress=False)
        config = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False, use_dora=True)
        return peft_ext.get_peft_model(model, config)

    x = torch.randn(8, 30, generator=torch.Generator().manual_seed(2))
    alone, model = build(), build()
    fully_shard(model)
    sizes = [parameter.to_local().numel() for parameter in model.parameters()]
    everywhere = [torch.empty(len(sizes), dtype=torch.long) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, torch.tensor(sizes))
    assert (torch.stack(everywhere) == 0).any()
    alone(x).square().mean().backward()
    assert_all_fused(model)
    with counted_calls() as calls:
        model(x.chunk(dist.get_world_size())[dist.get_rank()]).square().mean().backward()
    assert calls == {"fused": 2, "stock": 0}
    assert_close(gradients(model), gradients(alone))
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(full[name], tensor), name


@check
def fsdp2_casts_no_codes(folder: Path) -> None:
    """A mixed precision policy casts parameters as it gathers them: floats, and not the codes and scales."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    alone = make(base="nf4").to(torch.bfloat16)
    model = shard(make(base="nf4"), mp_policy=policy)
    assert_all_fused(model)
    with counted_calls() as calls:
        loss = step(model, mine())
    assert calls == {"fused": LAYERS, "stock": 0}
    # Both compute in bfloat16, whose products a batch's size may sum in another order.
    assert abs(mean(loss) - step(alone, batch()).item()) <= 2**-7
    for (name, before), (_, after) in zip(_nf4_layers(make(base="nf4")), _nf4_layers(model), strict=True):
        assert torch.equal(whole(after.weight), before.weight), name
        assert after.absmax.dtype is torch.uint8 and after.nested_absmax.dtype is torch.float32, name


@check
def fsdp2_saves_the_adapter_of_one_process(folder: Path) -> None:
    for method in ("LoRA", "DoRA", "IA3"):
        one, several = folder / f"{method}-alone", folder / f"{method}-fsdp2"
        alone, model = make(method, "nf4"), shard(make(method, "nf4"))
        train_alone(alone)
        train(model)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(model, options=options)
        if dist.get_rank() == 0:
            alone.save_pretrained(one)
            model.save_pretrained(several, state_dict=state)
            assert_same_files(one, several)
            PeftModel.from_pretrained(quantize(LLAMA.build(), "float32"), several)
        dist.barrier()


@check
def fsdp2_state_dict_goes_both_ways(folder: Path) -> None:
    """bitsandbytes' keys: gathered, loaded by one process, and loaded into shards of another model."""
    model = shard(make(base="nf4"))
    model.eval()
    with torch.no_grad():
        wanted = model(**batch()).logits
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert not any(isinstance(tensor, DTensor) for tensor in full.values())
    other = _moved(make(base="nf4")).eval()
    assert full.keys() == other.state_dict().keys()
    with torch.no_grad():
        assert not torch.equal(other(**batch()).logits, wanted)
        other.load_state_dict(full)
        assert torch.equal(other(**batch()).logits, wanted)
        for options in ({}, {"broadcast_from_rank0": True}):
            sharded = shard(_moved(make(base="nf4"))).eval()
            state = copy.copy(full) if not options or dist.get_rank() == 0 else _scales_alone(full)
            set_model_state_dict(sharded, state, options=StateDictOptions(full_state_dict=True, **options))
            assert torch.equal(sharded(**batch()).logits, wanted), options
        parts = shard(_moved(make(base="nf4"))).eval()
        parts.load_state_dict(model.state_dict())
        assert torch.equal(parts(**batch()).logits, wanted)
        with raises(RuntimeError, "weight is a DTensor, wanted a plain tensor"):
            _moved(make(base="nf4")).load_state_dict(model.state_dict())


def _scales_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every process has to bring: broadcast_from_rank0 sends parameters, and scales are none."""
    return {name: tensor for name, tensor in state.items() if ".weight." in name}


def _moved(model: PeftModel) -> PeftModel:
    """The same with other weights."""
    torch.manual_seed(11)
    with torch.no_grad():
        for name, layer in _nf4_layers(model):
            layer.set_nf4(peft_ext.ops.nf4_quantize(torch.randn(layer.out_features, layer.in_features), 64, True))
            assert layer.weight.dtype is torch.uint8, name
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1.5)
    return model


@check
def fsdp2_goes_on_from_a_checkpoint(folder: Path) -> None:
    """Sharded files of torch.distributed.checkpoint, the adapter and its optimizer alone; the unbroken run's losses."""
    options = StateDictOptions(ignore_frozen_params=True)

    def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = get_model_state_dict(model, options=options)
        state = {name: tensor for name, tensor in state.items() if "base_layer" not in name}
        return {"adapter": state, "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}

    model = shard(make("DoRA", "nf4"))
    optimizer = optimizer_of(model)
    train(model, 2, optimizer)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "checkpoint")
    wanted = train(model, 2, optimizer)
    resumed = make("DoRA", "nf4")
    with torch.no_grad():
        for parameter in resumed.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    resumed = shard(resumed)
    optimizer = optimizer_of(resumed)
    state = state_of(resumed, optimizer)
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(resumed, state["adapter"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(resumed, optimizer, state["optimizer"], options=options)
    assert train(resumed, 2, optimizer) == wanted


@check
def fsdp2_around_single_layers(folder: Path) -> None:
    """An adapter's layer wrapped by itself: fused if it was accelerated before, and otherwise explain says why not."""
    wanted = train_alone(make(base="nf4"))

    def wrap(model: PeftModel, chosen: Callable[[Any], bool]) -> PeftModel:
        for module in [module for module in model.modules() if chosen(module)]:
            fully_shard(module)
        return fully_shard(model)

    def is_adapted(module: Any) -> bool:
        return hasattr(module, "lora_A")

    before, after = wrap(make(base="nf4"), is_adapted), wrap(make(base="nf4", accelerated=False), is_adapted)
    assert_all_fused(before)
    with counted_calls() as calls:
        assert_losses(train(before), wanted)
    assert calls == {"fused": STEPS * LAYERS, "stock": 0}
    with raises(RuntimeError, "fully_shard wrapped base_model.model.model.layers.0.self_attn.q_proj itself"):
        peft_ext.restore(before)
    peft_ext.accelerate(after)
    assert {row.reason for row in peft_ext.explain(after).rows} == {
        "fully_shard wrapped the layer itself, and so changed its class: call accelerate(model) before that"
    }
    assert_losses(train(after), wanted)

    bases = wrap(make(base="nf4"), lambda module: isinstance(module, NF4Linear))
    reasons = {row.reason for row in peft_ext.explain(bases).rows}
    assert reasons == {"the adapter's part: hooks on base_layer would not run"}
    with counted_calls() as calls:
        assert_losses(train(bases), wanted)
    assert calls == {"fused": STEPS * LAYERS, "stock": 0}

    def is_trained(module: Any) -> bool:  # as PEFT's fsdp_auto_wrap_policy chooses
        return type(module) is nn.Linear and module.weight.requires_grad

    leaves = wrap(make(base="nf4"), is_trained)
    reasons = {row.reason for row in peft_ext.explain(leaves).rows}
    assert reasons == {"lora_A is a FSDPLinear, lora_B a FSDPLinear, wanted plain nn.Linear"}
    with counted_calls() as calls:
        assert_losses(train(leaves), wanted)
    assert calls == {"fused": 0, "stock": STEPS * LAYERS}


@check
def shards_say_that_they_are_shards(folder: Path) -> None:
    """What can't be done to a shard says so, and changes nothing."""
    model = shard(make(base="nf4"))
    (name, layer), *_ = _nf4_layers(model)
    for call in (layer.dequantize, lambda: layer(torch.ones(1, layer.in_features)), model.merge_adapter):
        with raises(RuntimeError, "NF4Linear: its weight is a DTensor with placements (Shard(dim=0),)"):
            call()
    inner = model.get_submodule(name.removesuffix(".base_layer"))
    with raises(AssertionError, "lora_A is a DTensor, wanted a plain parameter"):  # asked without what gathers it
        assert_all_fused(inner)
    with raises(TypeError, "weight is a DTensor, wanted a plain parameter"):
        peft_ext.quantize_nf4(shard(make()), progress=False)
    assert_losses(train(model), train_alone(make(base="nf4")))


@check
def hybrid_sharding(folder: Path) -> None:
    """Shards in each half of the processes, whole copies across: the mesh of several machines."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    alone, model = make("DoRA", "nf4"), shard(make("DoRA", "nf4"), mesh=mesh)
    assert_all_fused(model)
    wanted = train_alone(alone)
    with counted_calls() as calls:
        assert_losses(train(model), wanted)
    assert calls == {"fused": STEPS * LAYERS, "stock": 0}
    assert_close(adapter(model), adapter(alone))


# --- tensor parallelism -----------------------------------------------------------------------------------------------


@check
def tensor_parallel_layers_run_stock(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))

    def layer(base: str) -> tuple[PeftModel, Any]:
        model = make(base=base)
        return model, model.get_base_model().model.layers[0].self_attn.q_proj

    wanted = layer("float32")[1](x)
    gathered = {"base_layer": ColwiseParallel(output_layouts=Replicate())}
    columns = {"base_layer": ColwiseParallel(), "lora_B.default": ColwiseParallel()}
    reasons = (
        "hooks on base_layer would not run; base_layer.weight is a shard (FSDP, ZeRO-3 or tensor parallelism)",
        "hooks on lora_A, lora_B or lora_dropout would not run",
    )
    for plan, reason, mine_of in zip((gathered, columns), reasons, (lambda y: y, _my_columns), strict=True):
        model, parallel = layer("float32")
        parallelize_module(parallel, mesh, plan)
        assert peft_ext.explain(model).rows[0].reason == reason
        y = parallel(x)
        assert (y - mine_of(wanted)).abs().max() <= 4e-6 * wanted.abs().max()
        model, parallel = layer("nf4")
        parallelize_module(parallel, mesh, plan)
        assert peft_ext.explain(model).rows[0].reason == reason
        with raises(RuntimeError, "leave the layer out of tensor parallelism"):
            parallel(x)
    # What fully_shard gathers of a tensor parallel layer is a DTensor still.
    model, parallel = layer("float32")
    parallelize_module(parallel, mesh, gathered)
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "tensor"))
    model, parallel = layer("float32")
    parallelize_module(parallel, mesh["tensor"], gathered)
    shard(model, mesh=mesh["data"])
    assert peft_ext.explain(model).rows[0].reason == reasons[0]
    assert all(row.fused for row in peft_ext.explain(model).rows[1:])
    assert torch.isfinite(step(model, batch()))


def _my_columns(y: Tensor) -> Tensor:
    return y.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]


# --- Hugging Face accelerate ------------------------------------------------------------------------------------------


@check
def accelerate_library(folder: Path) -> None:
    """Accelerator over DDP, with accumulation; and what its FSDP2 plugin does to a model, which on the CPU its own
    prepare leaves out."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    kwargs = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, kwargs_handlers=kwargs)
    alone, model = make(base="nf4"), make(base="nf4")
    optimizer = optimizer_of(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, DDP) and not model.broadcast_buffers
    assert_all_fused(model)
    step(alone, batch())
    for half in (0, 1):
        with accelerator.accumulate(model):
            loss = model(**{name: part[half::2] for name, part in mine().items()}).loss
            accelerator.backward(loss)
    assert accelerator.sync_gradients
    assert_same_everywhere(gradients(model))
    assert_close(gradients(model), gradients(alone))
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder / "accelerate")
        assert "adapter_model.safetensors" in {path.name for path in (folder / "accelerate").iterdir()}

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )  # fmt: skip
    accelerator.state.fsdp_plugin = plugin
    for base in ("float32", "nf4"):
        model = fsdp2_prepare_model(accelerator, make(base=base))
        assert isinstance(model, FSDPModule)
        assert_all_fused(model)
        wanted = train_alone(make(base=base))
        with counted_calls() as calls:
            assert_losses(train(model), wanted)
        assert calls == {"fused": STEPS * LAYERS, "stock": 0}, calls


# --- the runner -------------------------------------------------------------------------------------------------------


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    results: dict[str, str] = {}
    try:
        for name in names:
            space = folder / name
            space.mkdir(exist_ok=True)
            try:
                torch.manual_seed(0)
                CHECKS[name](space)
                results[name] = "ok"
            except BaseException:
                results[name] = traceback.format_exc()
                raise
            finally:
                (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # leaving in order would wait for the others


if __name__ == "__main__":
    main()
