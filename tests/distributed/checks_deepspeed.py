"""Checks of LoRA under DeepSpeed's ZeRO-2 and ZeRO-3, through accelerate, over gloo on the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checks_common import (
    LAYERS,
    STEPS,
    assert_all_fused,
    assert_close,
    assert_losses,
    assert_same_everywhere,
    assert_same_files,
    batch,
    check,
    counted_calls,
    gradients,
    make,
    mean,
    mine,
    optimizer_of,
    raises,
    step,
    train_alone,
)
from checks_packed import make_packed
from torch import Tensor, nn

import peft_ext
from peft_ext.weights.quantizers import PACKED_FORMATS

OF_ITS_OWN = "lora_A is a shard (ZeRO-3), which is gathered for lora_A alone"


def prepare(stage: int, model: nn.Module, leaf: bool = False) -> tuple[Any, Any, Any]:
    """Returns accelerate's Accelerator, the DeepSpeed engine of the model, and the optimizer.

    ZeRO-3 partitions every parameter: by default, ZeRO-3 keeps parameters of fewer than 100,000 elements whole. With
    ``leaf``, ZeRO-3 gathers each decoder layer as a whole.
    """
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", DS_ACCELERATOR="cpu")
    from accelerate import Accelerator, DeepSpeedPlugin
    from deepspeed.utils import set_z3_leaf_modules

    config = {
        "train_micro_batch_size_per_gpu": len(mine()["input_ids"]), "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0.
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,  # SGD needs these two options.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0,
                              "stage3_gather_16bit_weights_on_model_save": True},
    }  # fmt: skip
    forget()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    if leaf:
        model.enable_input_require_grads()
        set_z3_leaf_modules(model, ["LlamaDecoderLayer"])
    return accelerator, *accelerator.prepare(model, optimizer_of(model))


def forget() -> None:
    """Makes accelerate forget DeepSpeed, for the checks that follow."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def check_deepspeed(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Runs a check and then forgets DeepSpeed."""

    @functools.wraps(function)
    def run(folder: Path) -> None:
        try:
            function(folder)
        finally:
            forget()
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)

    return run


def engine_step(engine: Any) -> Tensor:
    loss = engine(**mine()).loss
    engine.backward(loss)
    return loss.detach()


def assert_trains(stage: int, base: str, leaf: bool, accelerated: bool, fused: int, stock: int) -> Any:
    """Tests gradients of one step, and losses of three steps, against one process with the whole batch."""
    from deepspeed.utils import safe_get_full_grad

    alone = make(base=base)
    _, engine, _ = prepare(stage, make(base=base, accelerated=accelerated), leaf)
    step(alone, batch())
    with counted_calls() as calls:
        engine_step(engine)
    assert (calls["fused"], calls["stock"]) == (fused, stock), calls
    named = engine.module.named_parameters()
    found = {name: safe_get_full_grad(parameter) for name, parameter in named if parameter.requires_grad}
    assert_close(found, gradients(alone))
    assert_same_everywhere(found)

    _, engine, optimizer = prepare(stage, make(base=base, accelerated=accelerated), leaf)
    losses = []
    for _ in range(STEPS):
        losses.append(mean(engine_step(engine)))
        engine.step()
    assert_losses(losses, train_alone(make(base=base)))
    return engine


@check
@check_deepspeed
def deepspeed_zero2_is_fused(folder: Path) -> None:
    for base in ("float32", "nf4"):
        engine = assert_trains(2, base, False, True, LAYERS, 0)
        assert_all_fused(engine)


@check
@check_deepspeed
def deepspeed_zero3_runs_pefts_code(folder: Path) -> None:
    for base in ("float32", "nf4", "bnb nested"):
        engine = assert_trains(3, base, False, True, 0, LAYERS)
        found = [row.reason for row in peft_ext.explain(engine).rows]
        assert len(found) == LAYERS and all(reason.startswith(OF_ITS_OWN) for reason in found), found
    assert_trains(3, "float32", False, False, 0, 0)  # without peft_ext


@check
@check_deepspeed
def deepspeed_zero3_is_fused_in_leaf_modules(folder: Path) -> None:
    for base in ("float32", "nf4", "bnb nested"):
        engine = assert_trains(3, base, True, True, LAYERS, 0)
        assert_all_fused(engine)
        rows = {row.kind: row for row in peft_ext.explain(engine).blocks if not row.fused}
        assert "is a shard" in rows["loss"].reason
    assert_trains(3, "float32", True, False, 0, 0)  # without peft_ext


@check
@check_deepspeed
def deepspeed_trains_over_packed_layers(folder: Path) -> None:
    for stage, leaf, format in (
        *((2, False, format) for format in ("mxfp4", "fp8")),
        *((3, True, format) for format in PACKED_FORMATS if format != "fp8"),
        (3, False, "int4"),
    ):
        alone = make_packed(format)
        _, engine, optimizer = prepare(stage, make_packed(format), leaf)
        losses = []
        for _ in range(STEPS):
            with counted_calls() as calls:
                losses.append(mean(engine_step(engine)))
            assert (calls["stock"] == 0) is (stage == 2 or leaf), (stage, leaf, calls)
            engine.step()
        assert_losses(losses, train_alone(alone, STEPS))
        if stage == 2 or leaf:
            assert_all_fused(engine)
    _, engine, _ = prepare(3, make_packed("fp8"), True)
    with raises(RuntimeError, "Invalid scalar type"):  # gloo can't gather 8-bit floats
        engine_step(engine)


@check
@check_deepspeed
def deepspeed_zero3_refuses_partitioned_weights(folder: Path) -> None:
    for base in ("float32", "nf4"):
        for leaf in (False, True):
            _, engine, _ = prepare(3, make(base=base), leaf)
            engine_step(engine)
            with raises(RuntimeError, "merge: base_layer.weight is (0,), partitioned by ZeRO-3"):
                engine.module.merge_adapter()
            layer = engine.module.get_base_model().model.layers[0].mlp.up_proj
            if base == "nf4":
                with raises(RuntimeError, "NF4Linear: weight is (0,), partitioned by ZeRO-3"):
                    layer.base_layer.dequantize()
            else:
                with raises(ValueError, "is partitioned by ZeRO-3, quantize before deepspeed.initialize"):
                    peft_ext.quantize_nf4(engine.module, progress=False)
            if leaf:  # a layer inside of a leaf module gathers nothing if it is called alone
                with raises(RuntimeError, "partitioned by ZeRO-3" if base == "nf4" else "size mismatch"):
                    layer(torch.randn(3, layer.in_features))


@check
@check_deepspeed
def deepspeed_saves_the_adapter_of_one_process(folder: Path) -> None:
    for stage, leaf in ((2, False), (3, True)):
        alone = make(base="nf4")
        train_alone(alone)
        accelerator, engine, _ = prepare(stage, make(base="nf4"), leaf)
        for _ in range(STEPS):
            engine_step(engine)
            engine.step()
        # ZeRO-3 returns the state in process 0 alone.
        state = accelerator.get_state_dict(engine)
        if dist.get_rank() == 0:
            one, several = folder / f"alone-{stage}", folder / f"zero-{stage}"
            alone.save_pretrained(one)
            engine.module.save_pretrained(several, state_dict=state)
            assert_same_files(one, several)
        dist.barrier()
