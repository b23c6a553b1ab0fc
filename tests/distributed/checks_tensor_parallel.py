"""Checks of LoRA over a dense base that transformers splits between processes (``from_pretrained(tp_plan="auto")``)."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checks_common import (
    LLAMA,
    STEPS,
    assert_all_fused,
    assert_close,
    assert_losses,
    assert_same_everywhere,
    batch,
    check,
    counted_calls,
    gradients,
    long_batch,
    optimizer_of,
    raises,
    step,
)
from peft import LoraConfig, PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import tensor_parallel

import peft_ext

COLUMNS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROWS = ["o_proj", "down_proj"]
LAYERS = 14


def checkpoint(folder: Path, bias: bool = False) -> Path:
    """Writes the model in process 0, with a bias in each linear layer of a block or in none. Returns the folder."""
    path = folder / f"llama-{bias}"
    if dist.get_rank() == 0:
        torch.manual_seed(5)
        model = LLAMA.build()
        if bias:
            model.config.attention_bias = model.config.mlp_bias = True
            model = AutoModelForCausalLM.from_config(model.config)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter)
        model.save_pretrained(path)
    dist.barrier()
    return path


def make(path: Path, split: bool, accelerated: bool = True, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Returns the model with an adapter, split between the processes or whole."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **({"tp_plan": "auto"} if split else {}))
    config = {"r": 4, "lora_alpha": 6, "target_modules": COLUMNS + ROWS, "init_lora_weights": False, **config}
    model = peft_ext.get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    return (model if accelerated else peft_ext.restore(model)).train()


def pair(path: Path, accelerated: bool = True, **options: Any) -> tuple[PeftModel, PeftModel]:
    """Returns a whole model, equal in all processes, and the split model with the values of the whole model."""
    alone, model = make(path, False, **options), make(path, True, accelerated, **options)
    found = dict(alone.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                continue
            dist.broadcast(found[name].data, 0)
            if isinstance(parameter, DTensor):
                (placement,) = parameter.placements
                parts = found[name].chunk(dist.get_world_size(), placement.dim)
                parameter.to_local().copy_(parts[dist.get_rank()])
            else:
                parameter.copy_(found[name])
    return alone, model


def widen(model: nn.Module) -> None:
    """Sets ``in_features`` of each split lora_A to the whole width. PEFT sets the width of the shard, which
    transformers takes for the whole width."""
    for name, module in model.named_modules():
        if "lora_A." in name and isinstance(module.weight, DTensor):
            module.in_features = module.weight.shape[1]


def assert_trains(model: PeftModel, alone: PeftModel, fused: int, stock: int) -> None:
    """Tests losses and gradients of three steps against one process. All processes get the whole batch."""
    step(alone, batch())
    with counted_calls() as calls:
        step(model, batch())
    assert (calls["fused"], calls["stock"]) == (fused, stock), calls
    assert_close(gradients(model), gradients(alone))
    assert_same_everywhere(gradients(model))
    for one in (model, alone):
        one.zero_grad()
    optimizers = optimizer_of(model), optimizer_of(alone)
    losses = [
        (step(model, batch(), optimizers[0]).item(), step(alone, batch(), optimizers[1]).item()) for _ in range(STEPS)
    ]
    assert_losses(*map(list, zip(*losses, strict=True)))


def reasons(model: nn.Module) -> set[str]:
    return {row.reason for row in peft_ext.explain(model).rows}


@check
def tensor_parallel_peft_alone(folder: Path) -> None:
    """PEFT's own code trains column layers. PEFT 0.21 gives lora_A of a row layer the width of a shard, and fails with
    the transformers of these tests; with the whole width, PEFT's own code trains row layers too."""
    path = checkpoint(folder)
    alone, model = pair(path, accelerated=False, target_modules=COLUMNS)
    assert_trains(model, alone, 0, 0)
    alone, model = pair(path, accelerated=False)
    with raises(RuntimeError, "is invalid for input of size"):
        step(model, batch())
    alone, model = pair(path, accelerated=False)
    widen(model)
    assert_trains(model, alone, 0, 0)


@check
def tensor_parallel_layers_are_fused(folder: Path) -> None:
    for bias in (False, True):
        alone, model = pair(checkpoint(folder, bias))
        assert_all_fused(model)
        assert_trains(model, alone, LAYERS, 0)
        with torch.no_grad():
            alone.eval(), model.eval()
            torch.testing.assert_close(model(**batch()).logits, alone(**batch()).logits)


@check
def tensor_parallel_joins_layers_of_one_input(folder: Path) -> None:
    """q, k and v, and gate and up, are computed together, and sum the gradient of their input once."""
    for bias in (False, True):
        alone, model = pair(checkpoint(folder, bias))
        step(alone, long_batch())
        with counted_calls() as calls:
            step(model, long_batch())
        assert calls["joint"] == 10 and not calls["stock"], calls
        assert_close(gradients(model), gradients(alone))
        assert_same_everywhere(gradients(model))
        alone, model = pair(checkpoint(folder), target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
        step(alone, long_batch())
        step(model, long_batch())
        assert_close(gradients(model), gradients(alone))


@check
def tensor_parallel_in_bfloat16(folder: Path) -> None:
    """The errors against float32 are at most 1.5 times the larger error of one process and of PEFT's split layers."""
    path = checkpoint(folder, True)
    alone, model = pair(path, dtype=torch.bfloat16)
    stock = make(path, True, False, torch.bfloat16)
    widen(stock)
    copied = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                parameter.copy_(copied[name])
    assert_all_fused(model)
    exact = copy.deepcopy(alone).float()
    losses = {one: step(one, batch()).item() for one in (exact, alone, model, stock)}
    wanted = gradients(exact)

    def moved(one: nn.Module) -> tuple[float, float]:
        found = gradients(one)
        assert found.keys() == wanted.keys()
        apart = [((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted]
        return abs(losses[one] - losses[exact]), sum(apart) / len(apart)

    (loss, gradient), others = moved(model), [moved(alone), moved(stock)]
    assert loss <= 2**-8 * losses[exact], losses.values()
    assert gradient <= 1.5 * max(other for _, other in others), (gradient, others)
    print("bfloat16", loss, gradient, others)


@check
def tensor_parallel_with_checkpointing_and_dropout(folder: Path) -> None:
    path = checkpoint(folder)
    alone, model = pair(path)
    for one in (alone, model):
        one.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        one.enable_input_require_grads()
    step(alone, batch())
    with counted_calls() as calls:
        step(model, batch())
    assert calls["fused"] > LAYERS and not calls["stock"], calls
    assert_close(gradients(model), gradients(alone))

    _, model = pair(path, lora_dropout=0.5)
    assert_all_fused(model)
    torch.manual_seed(7)  # all processes draw equal dropout masks for the input of column-parallel layers
    first = step(model, batch()).item()
    assert_same_everywhere(gradients(model))
    torch.manual_seed(7)
    assert step(model, batch()).item() == first
    assert abs(step(model, batch()).item() - first) > 1e-4


@check
def tensor_parallel_that_stays_stock(folder: Path) -> None:
    path = checkpoint(folder)

    def trains_as_peft(model: PeftModel, alone: PeftModel, reason: str, count: int = LAYERS) -> None:
        found = [row.reason for row in peft_ext.explain(model).rows if not row.fused]
        assert len(found) == count and all(reason in one for one in found), found
        step(alone, batch())
        with counted_calls() as calls:
            step(model, batch())
        assert calls["stock"] == count, calls
        assert_close(gradients(model), gradients(alone))

    alone, model = pair(path)
    widen(model)
    with changed(tensor_parallel.ColwiseParallel, "transform_output_post_forward"):
        trains_as_peft(model, alone, "tensor parallelism: transformers' forward of ColwiseParallel is not known", 10)
    assert_all_fused(model)

    alone, model = pair(path, target_modules=COLUMNS)
    for one in (alone, model):
        for name, module in one.named_modules():
            if name.endswith("q_proj.lora_A.default"):
                module.register_forward_hook(lambda module, args, output: output)
    trains_as_peft(model, alone, "hooks on lora_A", 2)

    alone, model = pair(path, target_modules=COLUMNS, lora_bias=True)
    assert reasons(model) == {"tensor parallelism: a bias of lora_B is not fused"}

    with raises(RuntimeError, "got mixed torch.Tensor and DTensor"):  # PEFT's own error
        make(path, True, use_dora=True)

    alone, model = pair(path, target_modules=COLUMNS)
    for one in (alone, model):
        one.add_adapter("second", one.peft_config["default"])
        one.base_model.set_adapter(["default", "second"])
    assert reasons(model) == {"tensor parallelism: several active adapters are not fused"}

    alone, model = pair(path)
    widen(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert reasons(model) == {"tensor parallelism: autocast takes PEFT's own forward"}
        losses = [step(one, batch()).item() for one in (model, alone)]
    assert abs(losses[0] - losses[1]) <= 2**-6 * losses[1], losses


@contextlib.contextmanager
def changed(kind: type, name: str) -> Any:
    """Replaces a method of transformers by a function with another code and the same result."""
    before = getattr(kind, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    setattr(kind, name, method)
    try:
        yield
    finally:
        setattr(kind, name, before)
