"""Checks that test_distributed.py runs in several processes: ``torchrun checks.py FOLDER CHECK...``.

Each process runs the named checks and writes ``FOLDER/<rank>.json``, with "ok" or a traceback for each check. If a
check fails in a process, the process stops and torchrun ends the others, which would wait for it. checks_fsdp2.py has
the checks that need only FSDP2, checks_loading.py the checks of shards that are read from files, checks_experts.py the
checks of a mixture of experts, and checks_packed.py the checks of packed base layers.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import checks_deepspeed  # noqa: F401
import checks_experts  # noqa: F401
import checks_fsdp2  # noqa: F401
import checks_loading  # noqa: F401
import checks_packed  # noqa: F401
import checks_tensor_parallel  # noqa: F401
import checks_trainer  # noqa: F401
import torch
import torch.distributed as dist
from checks_common import (
    CHECKS,
    LAYERS,
    LLAMA,
    METHODS,
    STEPS,
    Entropy,
    LossOutside,
    adapter,
    assert_all_fused,
    assert_close,
    assert_joins,
    assert_loss,
    assert_losses,
    assert_same_everywhere,
    assert_same_files,
    assert_same_gradients,
    assert_trains,
    batch,
    check,
    counted_calls,
    counted_losses,
    gradients,
    make,
    mean,
    mine,
    optimizer_of,
    part,
    raises,
    shard,
    step,
    train,
    train_alone,
)
from peft import LoraConfig, PeftModel
from peft_models import quantize
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import peft_ext

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
        assert_same_gradients(model, alone)


@check
def ddp_joins_layers_of_one_input(folder: Path) -> None:
    for method, base in (("LoRA", "float32"), ("LoRA", "nf4"), ("AdaLoRA", "bnb nested")):
        assert_joins(DDP(make(method, base)), make(method, base))


@check
def ddp_over_bfloat16(folder: Path) -> None:
    """Tests DDP over a bfloat16 base. A product of fewer rows may add in another order and round to another bfloat16.

    Each of about thirty products may differ by half of 2^-8.
    """
    alone, model = make(base="nf4 bfloat16"), DDP(make(base="nf4 bfloat16"))
    assert_all_fused(model)
    assert abs(mean(step(model, mine())) - step(alone, batch()).item()) <= 2**-8
    assert_same_gradients(model, alone, bound=2**-5)


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


@check
def ddp_accumulates_without_sending(folder: Path) -> None:
    """Two half batches, the first within no_sync, give the gradients of one step with the whole batch.

    After the first half, the gradients of the processes differ.
    """
    alone, model = make(base="nf4"), DDP(make(base="nf4"))
    step(alone, batch())
    halves = [{name: part[half::2] for name, part in mine().items()} for half in (0, 1)]
    with model.no_sync():
        (model(**halves[0]).loss / 2).backward()
    with raises(AssertionError, ""):
        assert_same_everywhere(gradients(model))
    (model(**halves[1]).loss / 2).backward()
    assert_same_gradients(model, alone)
    model.zero_grad()
    # DPO's loss also calls the model twice before a backward.
    ((model(**mine()).loss + model(**mine()).loss) / 2).backward()
    assert_close(gradients(model), gradients(alone))


class Branches(nn.Module):
    """A module with two layers; a call may skip one of them."""

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
    assert_same_gradients(model, alone)


@check
def ddp_leaves_the_logits_to_the_loss(folder: Path) -> None:
    """Tests DDP also with options that make it copy the model's output: in each step (find_unused_parameters, which
    Trainer sets for a PeftModel), or in the first step (static_graph).
    """
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        for of, counts in ((lambda model: model, (STEPS, 0)), (LossOutside, (0, 0)), (Entropy, (STEPS, STEPS))):
            wanted = train_alone(of(make()))
            model = DDP(make(), **options)
            with counted_losses() as counted:
                assert_losses(train(of(model)), wanted)
            assert tuple(counted.values()) == counts, (options, counted)
            assert_same_everywhere(adapter(model))


@check
def ddp_leaves_the_buffers_alone_where_told(folder: Path) -> None:
    """The scales of NF4Linear are buffers. DDP sends buffers before each forward unless an option says otherwise."""
    scales = 4 * LAYERS  # buffers of a layer: absmax, and three to decode absmax
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
    """The recomputation of gradient checkpointing must draw the dropout masks of the forward again."""
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
    """Dropout masks depend on the generator of the process: equal seeds give equal masks, other seeds other masks."""
    for wrap in (DDP, shard):
        model = wrap(make(base="nf4", lora_dropout=0.5))
        losses = []
        for seed in (7, 7, 7 + dist.get_rank()):
            torch.manual_seed(seed)
            losses.append(model(**part(batch(), 0)).loss.detach().reshape(1))
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
            for model in (before, after):
                assert_all_fused(model)
                blocks = peft_ext.explain(model).blocks
                assert {row.kind for row in blocks if not row.fused} <= {"decoder layer"} and blocks, blocks
            with counted_calls() as calls:
                assert train(before) == train(after)
            assert (calls["fused"], calls["stock"]) == (2 * STEPS * LAYERS, 0), calls
            peft_ext.restore(after)
            assert not any(row.fused for row in peft_ext.explain(after).rows)


@check
def fsdp1_computes_the_logits(folder: Path) -> None:
    """With FSDP1 the model computes whole logits, because FSDP1 frees the flat parameter after the forward."""
    decoder = type(make().get_base_model().model.layers[0])
    for of in (lambda model: model, LossOutside, Entropy):
        wanted = train_alone(of(make(accelerated=False)))
        for after in (False, True):
            model = FullyShardedDataParallel(
                make(accelerated=not after), auto_wrap_policy=ModuleWrapPolicy({decoder}),
                device_id=torch.device("cpu"), use_orig_params=True,
            )  # fmt: skip
            model = peft_ext.accelerate(model)
            with counted_losses() as counted:
                assert_losses(train(of(model)), wanted)
            assert not any(counted.values())
            assert_loss(model, "its weight is a shard (FSDP, ZeRO-3 or tensor parallelism)")


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
        "hooks on base_layer, or its replaced forward, would not run; "
        "base_layer.weight is a shard (FSDP, ZeRO-3 or tensor parallelism)",
        "hooks on lora_A, lora_B or lora_dropout, or a replaced forward, would not run",
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
        with raises(RuntimeError, "leave this layer out of tensor parallelism"):
            parallel(x)
    # fully_shard gathers a tensor parallel layer to a DTensor, not to a plain tensor.
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
    """Tests Accelerator over DDP with gradient accumulation, and the code of its FSDP2 plugin, which
    Accelerator.prepare does not use on a CPU.
    """
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
    assert_same_gradients(model, alone)
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
        assert_trains(model, wanted)


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
        os._exit(1)  # a regular exit would wait for the other processes


if __name__ == "__main__":
    main()
