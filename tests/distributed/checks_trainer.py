"""Checks of FSDP2 by transformers' Trainer and TRL's SFTTrainer, whose configuration asks accelerate for FSDP2."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import tokenizers
import torch
import torch.distributed as dist
import transformers as hf
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from checks_common import (
    LLAMA,
    LOSS,
    adapter,
    assert_all_fused,
    assert_close,
    assert_loss,
    assert_losses,
    assert_same_files,
    check,
    counted_calls,
    counted_losses,
    make,
    nf4_layers,
    raises,
    shard,
)
from checks_packed import make_packed
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft_models import quantize, spread
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import peft_ext
from peft_ext.integrations.trainer import PeftExtCallback
from peft_ext.recipes import train_with_peft
from peft_ext.tuners import DiffPruningConfig

ROWS, LENGTH, STEPS = 4, 12, 4  # rows of a step over all processes, tokens of a row, optimizer steps
LR = 0.05


def rows(count: int = 2 * ROWS * STEPS) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 120, (count, LENGTH), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


class InOrder(hf.Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@contextlib.contextmanager
def configured() -> Iterator[None]:
    """Clears the state of the library accelerate, and the variables that accelerate sets, before and after a check."""
    before = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(before)


def options(folder: Path, config: Optional[dict[str, Any]] = None, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "use_cpu": True, "max_steps": STEPS, "optim": "sgd", "learning_rate": LR,
        "per_device_train_batch_size": ROWS // dist.get_world_size(), "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "fsdp": True, "fsdp_config": {"version": 2, **(config or {})}, **more,
    }  # fmt: skip


def trainer_of(model: nn.Module, folder: Path, config: Optional[dict[str, Any]] = None, **more: Any) -> Any:
    arguments = hf.TrainingArguments(**options(folder, config, **more))
    trainer: Any = InOrder(model, arguments, train_dataset=rows(), eval_dataset=rows(4))
    trainer.meter = PeftExtCallback().attach(trainer)
    return trainer


def losses_of(trainer: hf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def alone(model: nn.Module, accumulated: int = 1, max_grad_norm: float = 0.0) -> list[float]:
    """Trains one process on the batches of all processes, and returns the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=LR), []
    data = torch.stack([row["input_ids"] for row in rows()])[: ROWS * accumulated * STEPS]
    for step in data.split(ROWS * accumulated):
        losses.append(0.0)
        for ids in step.split(ROWS):
            loss = model(input_ids=ids, labels=ids).loss / accumulated
            loss.backward()
            losses[-1] += loss.item()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def units(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]


UNITS = ["FSDPPeftModelForCausalLM", "FSDPLlamaDecoderLayer", "FSDPLlamaDecoderLayer"]


@check
def trainer_fsdp2_takes_the_steps_of_one_process(folder: Path) -> None:
    """Tests Trainer over several bases, with gradient accumulation, clipping and gradient checkpointing."""
    everything = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "gradient_checkpointing": True}
    runs = (
        ("LoRA", "float32", {}), ("LoRA", "float32", everything), ("DoRA", "nf4", {"gradient_accumulation_steps": 2}),
        ("LoRA", "nf4", {"max_grad_norm": 0.5}), ("IA3", "bnb nested", {}), ("LoRA", "bfloat16", {}),
    )  # fmt: skip
    for method, base, more in runs:
        one, accumulated = make(method, base), more.get("gradient_accumulation_steps", 1)
        with configured(), counted_losses() as counted, counted_calls() as calls:
            trainer = trainer_of(make(method, base), folder, **more)
            trainer.train()
            model, found = trainer.model, losses_of(trainer)
        (loss,) = (row for row in trainer.meter.explanation.blocks if row.kind == "loss")
        assert loss.fused and trainer.meter.fused_share == 1, trainer.meter.explanation
        assert units(model) == UNITS
        assert_all_fused(model)
        assert_loss(model, "logits in chunks")
        assert counted == {"fused": STEPS * accumulated, "whole": 0} and not calls["stock"], (counted, calls)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        wanted = alone(one, accumulated, more.get("max_grad_norm", 0.0))
        if base == "bfloat16":  # products of fewer rows may round to another bfloat16
            assert_losses(found, wanted, bound=2**-9)
            assert_close(adapter(model), adapter(one), bound=2**-5)
        else:
            assert_losses(found, wanted)
            assert_close(adapter(model), adapter(one))


@check
def trainer_fsdp2_with_tied_heads(folder: Path) -> None:
    """Tests also a configuration of ``accelerate launch``, and an evaluation before the training."""

    def build() -> PeftModel:
        torch.manual_seed(3)
        config = hf.LlamaConfig(**{**LLAMA.build().config.to_dict(), "tie_word_embeddings": True})
        lora = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft_ext.get_peft_model(quantize(hf.LlamaForCausalLM(config), "nf4"), lora)
        spread(model)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return model.train()

    one = build()
    with configured(), counted_losses() as counted:
        # The variables that `accelerate launch --use_fsdp --fsdp_version 2` sets, without a wrapping policy.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
        trainer = trainer_of(build(), folder, fsdp=None)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    assert abs(before - one.eval()(input_ids=ids, labels=ids).loss.item()) <= LOSS
    assert_losses(losses_of(trainer), alone(one.train()))
    assert abs(after - one.eval()(input_ids=ids, labels=ids).loss.item()) <= LOSS
    assert counted == {"fused": STEPS, "whole": 0} and units(trainer.model) == UNITS
    assert trainer.model.get_output_embeddings().weight is trainer.model.get_input_embeddings().weight


@check
def trainer_fsdp2_saves_and_resumes(folder: Path) -> None:
    """Saves PEFT's files, and resumes from a checkpoint with the losses of the uninterrupted run.

    PEFT's files of an adapter on the head have the head's own weight, too.
    """

    def adapted_head() -> PeftModel:
        torch.manual_seed(3)
        config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
        return peft_ext.get_peft_model(quantize(LLAMA.build(), "float32"), config).train()

    for kind, build in (("SHARDED_STATE_DICT", lambda: make("DoRA", "nf4")), ("FULL_STATE_DICT", adapted_head)):
        path, config, one = folder / kind, {"state_dict_type": kind}, build()
        alone(one)
        more = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
        with configured():
            trainer = trainer_of(build(), path, config)
            trainer.train()
            trainer.save_model(str(path / "several"))
        if dist.get_rank() == 0:
            one.save_pretrained(path / "one")
            (path / "several" / "training_args.bin").unlink()
            assert_same_files(path / "one", path / "several")
            stock = PeftModel.from_pretrained(quantize(LLAMA.build(), "float32"), path / "several")
            assert_close(adapter_of(stock), adapter_of(one))
        losses = []
        for checkpoint in (None, str(path / "checkpoint-2")):
            with configured():
                trainer = trainer_of(build(), path, config, **more)
                trainer.train(resume_from_checkpoint=checkpoint)
            losses.append(losses_of(trainer))
        assert losses[0] == losses[1], (kind, losses)
        if dist.get_rank() == 0:
            assert (path / "checkpoint-2" / "adapter_model.safetensors").exists()


@check
def trainer_fsdp2_and_ddp_of_a_recipe_save_in_one_process(folder: Path) -> None:
    """``train_with_peft`` saves the whole trained adapter in process 0, under DDP and under FSDP2."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    tokenizer, saved = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a"), []
    save_adapter = peft_ext.files.save_adapter
    for name, more in (("ddp", {"fsdp": None, "fsdp_config": None}), ("fsdp2", {})):
        model = make(base="nf4")
        chosen = {**options(folder, warmup_steps=0, gradient_accumulation_steps=1), **more}

        def counting(*args: Any, **kwargs: Any) -> None:
            saved.append(args)
            save_adapter(*args, **kwargs)

        with configured(), mock.patch("peft_ext.files.save_adapter", counting):
            train_with_peft(model, tokenizer, rows(), adapter_dir=folder / name, **chosen)
        trained = adapter(model)
        if dist.get_rank() == 0:
            stock = PeftModel.from_pretrained(quantize(LLAMA.build(), "nf4"), folder / name)
            assert_close(adapter_of(stock), trained)
    assert len(saved) == (2 if dist.get_rank() == 0 else 0), saved


def adapter_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


@check
def trainer_fsdp2_takes_a_sharded_model(folder: Path) -> None:
    """Tests a model that was sharded before Trainer gets the model. With four processes, ranks of 2 leave processes
    without a row of lora_A, and all empty shards have the address 0."""
    for base in ("float32", "nf4"):
        one = make(base=base, r=2)
        with configured():
            trainer = trainer_of(shard(make(base=base, r=2)), folder, max_grad_norm=0.5, optim="sgd")
            trainer.train()
            optimizer = trainer.optimizer
        assert_losses(losses_of(trainer), alone(one, max_grad_norm=0.5))
        assert_close(adapter(trainer.model), adapter(one))
        assert_loss(trainer.model, "logits in chunks")
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert optimized == {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}


@check
def trainer_fsdp2_with_a_base_of_one_process(folder: Path) -> None:
    """With cpu_ram_efficient_loading, only process 0 has the weights."""
    model = make(base="nf4")
    if dist.get_rank() != 0:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
    with configured():
        trainer = trainer_of(model, folder, {"cpu_ram_efficient_loading": True})
        assert all(isinstance(layer.weight, DTensor) for _, layer in nf4_layers(model))
        trainer.train()
    assert_losses(losses_of(trainer), alone(make(base="nf4")))


@check
def trainer_fsdp2_keeps_tied_weights_of_one_process(folder: Path) -> None:
    """With cpu_ram_efficient_loading, a weight that the embedding and the head share stays one weight."""

    def tied() -> PeftModel:
        model = make()
        model.lm_head.weight = model.get_input_embeddings().weight
        return model

    model = tied()
    with configured():
        config = options(folder, {"cpu_ram_efficient_loading": True})
        trainer = InOrder(model, hf.TrainingArguments(**config), train_dataset=rows())
        if dist.get_rank() != 0:  # this follows Trainer's constructor, which moves the model to the CPU
            frozen = {p: nn.Parameter(p.to("meta"), False) for p in model.parameters() if not p.requires_grad}
            for module in model.modules():
                module._parameters.update({name: frozen.get(p, p) for name, p in module._parameters.items()})
            assert model.lm_head.weight is model.get_input_embeddings().weight and model.lm_head.weight.is_meta
        PeftExtCallback().attach(trainer)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        trainer.train()
    assert_losses(losses_of(trainer), alone(tied()))


@check
def trainer_fsdp2_in_mixed_precision(folder: Path) -> None:
    """With ``bf16=True``, FSDP2 casts the gathered parameters; the shards of the adapter stay float32."""
    one = make(base="nf4")
    with configured():
        trainer = trainer_of(make(base="nf4").to(torch.bfloat16), folder, bf16=True)
        trainer.train()
    wanted = alone(one)
    assert max(abs(a - b) for a, b in zip(losses_of(trainer), wanted, strict=True)) <= 2**-6, (
        losses_of(trainer),
        wanted,
    )
    assert {tensor.dtype for tensor in adapter(trainer.model).values()} == {torch.float32}
    assert_all_fused(trainer.model)


@check
def trainer_fsdp2_checkpoints_with_dropout(folder: Path) -> None:
    """FSDP's own option of checkpointing draws the masks of the forward again in the recomputation."""
    found = []
    for config in ({}, {"activation_checkpointing": True}):
        with configured(), counted_calls() as calls:
            trainer = trainer_of(make(base="nf4", lora_dropout=0.3), folder, config)
            trainer.train()
        found.append((losses_of(trainer), adapter(trainer.model), calls["fused"]))
    assert found[1][2] > found[0][2]
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


@check
def trainer_fsdp2_refuses_by_name(folder: Path) -> None:
    def diff_pruned() -> PeftModel:
        return peft_ext.get_peft_model(quantize(LLAMA.build(), "float32"), DiffPruningConfig(task_type="CAUSAL_LM"))

    def attached(
        model: nn.Module, change: Callable[[Any], Any] = lambda trainer: None, bf16: bool = False, **config: Any
    ) -> None:
        with configured():
            args = hf.TrainingArguments(**options(folder, config, bf16=bf16))
            trainer = InOrder(model, args, train_dataset=rows())
            change(trainer)
            PeftExtCallback().attach(trainer)

    def with_optimizer(trainer: Any) -> None:
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters())

    def with_context(trainer: Any) -> None:
        state = trainer.accelerator.state
        state.parallelism_config = ParallelismConfig(dp_shard_size=1, cp_size=2)

    with raises(ValueError, "ADALORA does not work with FSDP2: PEFT's orthogonal regularization"):
        attached(make("AdaLoRA"))
    with raises(ValueError, "DIFF_PRUNING does not work with FSDP2"):
        attached(diff_pruned())
    with raises(ValueError, "PREFIX_TUNING does not work with FSDP2: PEFT computes the saved prompt"):
        attached(get_peft_model(LLAMA.build(), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")))
    base = quantize(LLAMA.build(), "float32")
    for layer in base.model.layers:
        fully_shard(layer)
    with raises(ValueError, "q_proj.lora_A.default.weight is trained and not sharded; add adapters before"):
        attached(get_peft_model(base, LoraConfig(target_modules=["q_proj"])))
    with raises(ValueError, "no module of the classes ['Unknown']"):
        attached(make(), transformer_layer_cls_to_wrap="Unknown")
    with raises(ValueError, "optimizer of unsharded parameters"):
        attached(make(), with_optimizer)
    with raises(ValueError, "the trainer has a model_init"):
        attached(make(), lambda trainer: setattr(trainer, "model_init", make))
    with raises(ValueError, "cp_size 2"):
        attached(make(), with_context)
    with raises(ValueError, "codes of torch.float8_e4m3fn, which FSDP2's mixed precision would cast to torch.bfloat16"):
        attached(make_packed("fp8"), bf16=True)
    attached(make_packed("fp8"))
    attached(make_packed("int4"), bf16=True)


@check
def trainer_hybrid_sharding(folder: Path) -> None:
    """Each half of four processes shards the model, by accelerate's ParallelismConfig. On a CPU accelerate's
    constructor refuses a ParallelismConfig, so this check sets the state that the constructor sets on GPUs."""
    parallel = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    one = make(base="nf4")
    with configured():
        given = hf.TrainingArguments(**options(folder))
        trainer = InOrder(make(base="nf4"), given, train_dataset=rows())
        state = trainer.accelerator.state
        state.parallelism_config, state.device_mesh = parallel, parallel.get_device_mesh("cpu")
        PeftExtCallback().attach(trainer)
        trainer.train()
        trainer.save_model(str(folder / "several"))
    assert {parameter.device_mesh.ndim for parameter in trainer.model.parameters()} == {2}
    assert_losses(losses_of(trainer), alone(one))
    assert_close(adapter(trainer.model), adapter(one))
    if dist.get_rank() == 0:
        one.save_pretrained(folder / "one")
        (folder / "several" / "training_args.bin").unlink()
        assert_same_files(folder / "one", folder / "several")


@check
def sft_trainer_fsdp2_takes_the_steps_of_one_process(folder: Path) -> None:
    """Tests TRL's SFTTrainer, which computes its loss from the head's weight, and the SFTTrainer of this package."""
    import trl
    from tokenizers import Tokenizer, models

    from peft_ext.integrations.trl import SFTTrainer

    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="</s>")
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    for kind, base in ((trl.SFTTrainer, "float32"), (trl.SFTTrainer, "nf4"), (SFTTrainer, "nf4")):
        one = make(base=base)
        with configured(), counted_calls() as calls:
            config = trl.SFTConfig(**options(folder, bf16=False))
            ordered = type("Ordered", (kind,), {"_get_train_sampler": InOrder._get_train_sampler})
            trainer = ordered(make(base=base), config, train_dataset=data, processing_class=tokenizer)
            PeftExtCallback().attach(trainer)
            heads: list[int] = []
            trainer.model.get_output_embeddings().register_forward_hook(lambda *_, heads=heads: heads.append(1))
            trainer.train()
        assert units(trainer.model) == UNITS and not heads and not calls["stock"]
        assert_all_fused(trainer.model)
        assert_losses(losses_of(trainer), alone(one))
        assert_close(adapter(trainer.model), adapter(one))


@check
def trainer_fsdp2_resumes_in_other_processes(folder: Path) -> None:
    """Two processes train six steps and save after the second, four go on to the fourth, and one to the sixth. With
    four processes, some hold no row of lora_A."""

    def run(path: str, steps: int, checkpoint: Optional[Path] = None) -> list[float]:
        more = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.003,
                "max_steps": steps}  # fmt: skip
        with configured():
            trainer = trainer_of(make(base="nf4", r=2), folder / path, **more)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return losses_of(trainer)

    record = folder / "losses.json"
    if not record.exists():
        dist.barrier()
        losses = run("two", 6)
        if dist.get_rank() == 0:
            record.write_text(json.dumps(losses))
    elif dist.get_world_size() == 4:
        assert_losses(run("four", 4, folder / "two" / "checkpoint-2"), json.loads(record.read_text())[:4])
    else:
        assert_losses(run("one", 6, folder / "four" / "checkpoint-4"), json.loads(record.read_text()))
