"""A fine-tuning run: transformers' Trainer and PEFT, accelerated, measured and checked.

Before training, a run checks options and data, loads the model (quantized where the options say so), measures the
model's held-out loss, and lets the model answer prompts. To train, the run adds the adapter (a sharded run has added
the adapter before loading the weights), accelerates the model unless the run is stock, trains, and saves the adapter.
After training, the run measures the held-out loss and lets the model answer again. Finally, PEFT loads the saved
adapter into a fresh base, and the run compares the logits of this model with those of the trained model.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from ..files import save_adapter
from ..machine import memory_of
from ..methods import METHODS
from ..quantize import quantize_nf4, quantize_packed
from ..sources.gguf_file import gguf_path
from ..sources.json_file import raised_as
from ..sources.model import base_model, beside_text, loading_arguments, widen
from ..text import dtype_name
from ..weights.quantizers import PACKED_FORMATS
from . import checkpoints, evaluate
from .causal_loss import check_causal_loss
from .config import FILE as CONFIG_FILE
from .config import write_config
from .data import IGNORED, Order
from .errors import RunError, Stop, caught_signals, mendable_errors
from .evaluate import Check
from .launch import without_settings
from .options import Options
from .prepare import Run, adapter_config, facts_of, needs_bitsandbytes, prepare, pruning_step
from .progress import log, progress_callback, shows_bars, status
from .ranks import joined
from .record import Record, recording_callback
from .runner import about_runner, export_adapter
from .shard import sharded_model

_FSDP = {"version": 2, "reshard_after_forward": True, "state_dict_type": "SHARDED_STATE_DICT"}


@dataclass(frozen=True)
class Result:
    """The result of a run. ``run.json`` in the output folder has most of a Result's values, and more.

    Attributes:
        output: folder with the adapter, run.json and report.html.
        steps: number of trained steps, including the steps before a resume.
        losses: training loss of each step.
        perplexity_before, perplexity_after: perplexity on the held-out examples before and after training;
            ``perplexity_after`` is None where the run stopped early.
        tokens_per_s, median_step_s: speed of the training steps, without evaluation and saving; None where this process
            trained no step.
        peak_mib, peak_cuda_mib: peak memory in MiB until training ended, of the process and of PyTorch's tensors on a
            GPU; None where the memory was not measured.
        trainable_parameters: number of trainable parameters.
        adapter_bytes: size of the adapter's weight file; None where the run stopped early.
        fused_layers, layers: number of fused layers, and of all layers that :func:`peft_ext.explain` lists; both 0 in a
            stock run.
        can_merge: whether ``peft-ext merge`` and :func:`peft_ext.merge_to_dense` can merge the adapter.
        check: comparison of the trained model with the saved adapter on a fresh base; None where the run stopped early.
        stopped_by: number of the signal that ended training early, with a checkpoint; 0 where no signal did.
        seconds: a dict from the name of each phase of the run to the seconds that the phase took.
    """

    output: Path
    steps: int
    losses: list[float]
    perplexity_before: float
    perplexity_after: Optional[float]
    tokens_per_s: Optional[float]
    median_step_s: Optional[float]
    peak_mib: Optional[float]
    peak_cuda_mib: Optional[float]
    trainable_parameters: int
    adapter_bytes: Optional[int]
    fused_layers: int
    layers: int
    can_merge: bool
    check: Optional[Check]
    stopped_by: int
    seconds: dict[str, float]

    @property
    def finished(self) -> bool:
        """Whether the run trained all steps, saved the adapter, and made the last check of the saved adapter."""
        return self.check is not None


def finetune(options: Options) -> Result:
    """Trains an adapter, saves the adapter, checks the saved files, and returns the result.

    ::

        from peft_ext.run import Options, finetune

        result = finetune(Options(model="my/model", data="my.jsonl", output="outputs/mine", method="dora"))
        print(result.perplexity_before, result.perplexity_after)

    Signals, in the main thread only: SIGINT, SIGTERM and SIGHUP (unless SIGHUP was ignored, as under nohup) end
    training after the current step, with a checkpoint, and ``stopped_by`` is the number of the signal. A second SIGINT,
    SIGTERM or SIGHUP, or one of these signals outside of training, ends the run at once. If the run has several
    processes, a SIGTERM or SIGHUP in the 20 seconds after another signal is ignored, because a launcher may have passed
    the same signal on. SIGUSR1, which batch systems send ahead of a time limit, writes a checkpoint after the current
    step, and training continues.

    The progress is logged to the logger ``peft_ext.run``. ``finetune`` turns off, in this process, transformers'
    progress bars, and the warnings and the log messages below level ERROR of transformers, PEFT, accelerate and
    bitsandbytes.

    If a launcher has started several processes, all of them have to call ``finetune``, with equal options (paths and
    ``threads`` may differ). After an error, each process has to end, because the process group of the run is broken.

    Raises RunError for an error that the user can fix, such as a wrong option, a full disk or too little memory.
    Raises Interrupted, a KeyboardInterrupt, where a signal ends the run at once.
    """
    stop = Stop()

    def hint() -> str:
        return checkpoints.how_to_go_on(options.resolved())

    with (
        caught_signals(stop),
        joined(options.shard != "ddp") as ranks,
        ranks.reported(stop, hint),
        mendable_errors(options.output, hint),
    ):
        stop.speaks, stop.processes = ranks.speaks, ranks.world
        options = checkpoints.after_restart(options, ranks)
        run = ranks.together(lambda: prepare(options, stop, ranks))
        ranks.check_alike(facts_of(run))
        return train(run)


@without_settings()
def train(run: Run) -> Result:
    """Trains a prepared run; see :func:`finetune`."""
    _describe(run)
    from ..integrations.trainer import peak_memory_mib

    held = memory_of(torch.device("cpu"))[2] / 2**20
    with run.phase("load"):
        model = _sharded(run) if run.sharded else load_base(run)
        run.ranks.together(lambda: _check_loss(run, model))
    peak = peak_memory_mib()
    growths = run.ranks.gather(None if peak is None else round(peak - held, 1))
    # Only a sharded model has its adapter before the training.
    without_adapter = model.disable_adapter() if run.sharded else contextlib.nullcontext()
    with run.phase("evaluate before"), without_adapter:
        losses = evaluate.held_out_losses(run, model)
        samples = evaluate.sample_prompts(run)
        said = evaluate.answers(run, model, [sample["messages"] for sample in samples])
        samples = [{**sample, "before": text} for sample, text in zip(samples, said, strict=True)]
    before = evaluate.perplexity(losses)
    log.info(f"before: held-out perplexity {before:.3f}")

    record = Record(run, load_growths=growths)
    with checkpoints.own_output(run.options, run.checkpoint, run.ranks):
        record.curve = evaluate.curve_examples(run)
        record.history = checkpoints.trainer_history(run.checkpoint)
        resumed: list[int] = []  # the steps after which the run was resumed, by this call and by earlier calls
        if run.checkpoint is not None:
            earlier = checkpoints.read_record(run.options).get("resumed")
            resumed = [*(earlier if isinstance(earlier, list) else []), checkpoints.step_of(run.checkpoint)]
        first = evaluate.mean_loss([losses[i] for i in record.curve])
        record.results |= {
            "perplexity": {"before": before}, "samples": samples,
            "held_out": {"examples": len(record.curve), "first": [0, first]},
            "resumed": resumed,
        }  # fmt: skip
        if run.options.tokenizer is not None and run.ranks.speaks:  # chat and merge read the saved tokenizer
            with raised_as(RunError, f"{run.options.output}: the tokenizer can't be saved (", Exception, after=")"):
                saved = run.tokenizer.save_pretrained(run.options.output)
            record.results["tokenizer_files"] = sorted(Path(file).name for file in saved if Path(file).is_file())
        writes_config = run.ranks.speaks and checkpoints.may_write_config(run.options)
        record.write()  # a restarted process recognizes its run by run.json
        if writes_config:
            write_config(run.options.output / CONFIG_FILE, run.options)
        elif run.ranks.speaks:
            log.info(f"{run.options.output / CONFIG_FILE} is not as a run wrote it and stays; run.json has the options")
        try:
            return _train(run, record, model)
        except BaseException:  # also after a second Ctrl-C, run.json keeps the results so far
            with contextlib.suppress(Exception):
                record.write()
            raise


def _train(run: Run, record: Record, model: Any) -> Result:
    """Adds an adapter to the frozen base (unless the run is sharded, whose model has its adapter already), trains,
    saves and checks the adapter, and returns the result."""
    o, results = run.options, record.results
    with run.phase("adapt"):
        model = model if run.sharded else adapt(run, model)
    fused = results["fused"] = _fused_layers(run, model)
    record.write()
    log.info(f"training: {run.steps} steps, {fused['fused']} of {fused['layers']} layers fused")
    done = fit(run, record, model)
    if run.stop.signal and done < run.steps:
        record.write()
        instead = " instead of --overwrite" if o.overwrite else ""
        goes_on = f"; the same command with --resume{instead} continues" if run.method.can_resume else ""
        log.info(f"stopped after step {done}{goes_on}")
        record.log_report()
        return _result(record, done)
    # The adapter is saved before the evaluation, so that an error in the evaluation does not lose the adapter.
    with run.phase("save"):
        state = {}
        if run.sharded:
            from ..integrations.fsdp2 import adapter_state

            state = {"state_dict": adapter_state(model)}  # all ranks gather the adapter's shards
        if run.ranks.speaks:
            save_adapter(model, o.output, overwrite=True, **state)
            shutil.rmtree(o.output / checkpoints.PREVIOUS, ignore_errors=True)
            if run.checkpoint is not None and (export := checkpoints.old_export(o)) is not None:
                export.unlink()  # the file was exported from an adapter that this run has replaced
        size = (o.output / "adapter_model.safetensors").stat().st_size if run.ranks.speaks else 0
        results["adapter_bytes"] = run.ranks.gather(size)[0]
    if (meter := record.meter).tokens_per_s:
        log.info(f"speed: {meter.tokens_per_s:.0f} tokens/s in the steps, median step {meter.median_step_s:.2f} s")
    if meter.peak_mib:
        log.info(f"memory: peak {meter.peak_mib:.0f} MiB, the whole process until the end of training")

    with run.phase("evaluate after"):
        losses = evaluate.held_out_losses(run, model)
        said = evaluate.answers(run, model, [sample["messages"] for sample in results["samples"]])
        for sample, text in zip(results["samples"], said, strict=True):
            sample["after"] = text
    results["perplexity"]["after"] = evaluate.perplexity(losses)
    results["held_out"]["last"] = [done, evaluate.mean_loss([losses[i] for i in record.curve])]
    with run.phase("re-read"):
        check = None
        if run.sharded or run.ranks.speaks:
            check = evaluate.reread(run, model, lambda: _saved(run))
        check = run.ranks.gather(check)[0]
    asked = results["samples"][0]
    if (about := about_runner(run)) is not None:
        results["runner"] = about
    results |= {"finished": True, "check": asdict(check),
                "answers": {name: asked[name] for name in ("prompt", "before", "after")}}  # fmt: skip
    record.write()
    _log_end(run, record, check)
    if o.export is not None:
        run.ranks.together(lambda: export_adapter(run) if run.ranks.speaks else None)
        results["runner"] = about_runner(run, o.output / checkpoints.EXPORTED_FILE)
        record.write()
    return _result(record, done, check)


def _result(record: Record, done: int, check: Optional[Check] = None) -> Result:
    run, found = record.run, record.document()
    return Result(
        output=run.options.output, steps=done, losses=found["losses"],
        perplexity_before=found["perplexity"]["before"], perplexity_after=found["perplexity"].get("after"),
        tokens_per_s=found["tokens_per_s"], median_step_s=found["median_step_s"], peak_mib=found["peak_mib"],
        peak_cuda_mib=found["peak_cuda_mib"], trainable_parameters=run.trainable,
        adapter_bytes=found.get("adapter_bytes"), fused_layers=found["fused"]["fused"],
        layers=found["fused"]["layers"], can_merge=METHODS[run.options.method].can_merge, check=check,
        stopped_by=run.stop.signal if check is None else 0, seconds=dict(run.seconds),
    )  # fmt: skip


# --- the model --------------------------------------------------------------------------------------------------------


def load_base(run: Run) -> Any:
    """Returns the frozen base, quantized where the options say so, or packed as the files of the model are.

    If the base is NF4, a stock run and a run of DoRA get the NF4 weights in bitsandbytes' ``Linear4bit``. Dense weights
    (except those that transformers keeps in float32) are rounded to bfloat16 for every computation dtype, so that each
    machine trains on equal bases. Raises RunError where a weight can't be read or is missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    o = run.options
    refused = raised_as(RunError, f"--model {o.model}: ", OSError, ValueError, RuntimeError, SafetensorError)
    with refused, status("loading the model"):
        if (file := gguf_path(run.folder)) is not None:
            from ..gguf.load import load_gguf

            model, absent = load_gguf(file), []
        else:
            model, info = AutoModelForCausalLM.from_pretrained(
                run.folder, dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True, **loading_arguments(o.quant),
            )  # fmt: skip
            absent = sorted(info["missing_keys"])
    if absent:
        raise RunError(f"--model {o.model}: the files lack {absent[0]}, which would be random")
    model = model.to(run.device).eval().requires_grad_(False)
    model.config.use_cache = False  # training needs no KV cache; generation turns the cache on
    if getattr(model, "is_loaded_in_4bit", False):  # the weights in the files are bitsandbytes' NF4
        for module in model.modules():
            if "support_avx512bf16_for_cpu" in vars(module):  # in evaluation bitsandbytes would repack the weight
                module.support_avx512bf16_for_cpu = False
    else:
        with raised_as(RunError, f"--quant {o.quant}: ", ValueError):
            if o.quant == "nf4":
                quantize_nf4(model, blocksize=o.blocksize)
            elif o.quant in PACKED_FORMATS:
                quantize_packed(model, o.quant)
    if o.quant not in ("none", "checkpoint"):
        for tensor in (*model.parameters(), *model.buffers()):  # a tensor of a mapped file keeps the whole file mapped
            tensor.data = tensor.data.clone()
    if run.dtype != torch.bfloat16:
        widen(model)
    if needs_bitsandbytes(o):
        from ..integrations.bitsandbytes import to_linear4bit

        to_linear4bit(model, run.dtype)
    return model


def _check_loss(run: Run, model: Any) -> None:
    """Raises RunError where the loss of the model is not the mean cross-entropy of the next tokens."""
    with raised_as(RunError, f"--model {run.options.model}: ", RunError):
        check_causal_loss(model, run.examples.train)


def _sharded(run: Run) -> Any:
    """Returns the sharded model with its adapter. If the checkpoint has all steps of the run, the adapter has the
    checkpoint's values."""
    done = run.checkpoint if run.checkpoint and checkpoints.step_of(run.checkpoint) >= run.steps else None
    return sharded_model(run, lambda base: adapt(run, base), done)


def _saved(run: Run) -> Any:
    """Returns a fresh base with the saved adapter, as PEFT reads the adapter."""
    from peft import PeftConfig, PeftModel, get_peft_model

    from ..model import register_layers

    folder = str(run.options.output)
    config = PeftConfig.from_pretrained(folder)

    def adapted(base: Any) -> Any:
        register_layers(config, base)
        return get_peft_model(base, config)

    if run.sharded:
        return sharded_model(run, adapted, run.options.output)
    base = load_base(run)
    register_layers(config, base)
    return PeftModel.from_pretrained(base, folder, config=config, torch_device=str(run.device))


def adapt(run: Run, model: Any) -> Any:
    """Returns the model with a new adapter, which is initialized with the run's seed.

    The model is accelerated unless the run is stock.
    """
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import set_seed

    from ..model import freeze_ranknum, register_layers

    set_seed(run.options.seed)
    config = adapter_config(run, model)
    register_layers(config, model)
    model = get_peft_model(model, config)
    # PEFT draws other random numbers for adapters of bitsandbytes' layers than for adapters of other layers. A second
    # initialization makes the LoRA adapters of a run with --stock and of a run without --stock equal.
    set_seed(run.options.seed)
    for module in model.modules():
        if isinstance(module, LoraLayer) and run.options.method in ("lora", "rslora", "qlora"):
            module.reset_lora_parameters("default", True)
    if not run.options.stock:
        from ..integrations.peft import accelerate

        freeze_ranknum(model)
        on_experts = getattr(config, "target_parameters", None)
        accelerate(model, experts_dropout=run.options.dropout if on_experts else 0.0)
    return model


def _fused_layers(run: Run, model: Any) -> dict[str, Any]:
    """Returns a dict made of the rows of :func:`peft_ext.explain`: "layers" and "fused", the numbers of all and of
    fused layers; "reasons", why layers are not fused; "groups", a dict for each group of layers with equal kind and
    reason. In a stock run the numbers are 0, and there are no "groups"."""
    if run.options.stock:
        return {"layers": 0, "fused": 0, "reasons": []}
    from ..integrations.peft import alike, explain

    rows = explain(model).rows
    groups = [
        {"kind": kind, "fused": fused, "reason": reason, "layers": len(names), "first": names[0]}
        for (kind, fused, reason), names in alike(rows).items()
    ]
    reasons = sorted({group["reason"] for group in groups if not group["fused"]})
    return {"layers": len(rows), "fused": sum(row.fused for row in rows), "reasons": reasons, "groups": groups}


# --- training ---------------------------------------------------------------------------------------------------------


def fit(run: Run, record: Record, model: Any) -> int:
    """Trains the model and returns the number of trained steps, including the steps before a resume."""
    trainer = _trainer(run, record, model)
    if run.checkpoint is not None and (done := checkpoints.step_of(run.checkpoint)) >= run.steps:
        from peft.utils import load_peft_weights, set_peft_model_state_dict

        # The checkpoint has all steps of the run: Trainer.train would train one step more.
        if run.sharded:  # the adapter was loaded from the checkpoint with the model
            return done
        set_peft_model_state_dict(model, load_peft_weights(str(run.checkpoint), device=str(run.device)))
        return done
    # each process draws its own dropout masks; a checkpoint restores the random state of each process
    if run.ranks.world > 1:
        torch.manual_seed(run.options.seed + run.ranks.rank)
    try:
        run.stop.training = True
        with run.phase("train"):
            trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    except BaseException as error:
        if run.ranks.speaks:
            checkpoints.remove_unsealed(run.options)
        if run.checkpoint is not None and isinstance(error, ValueError) and "loaded state dict" in str(error):
            raise RunError(f"--resume: the optimizer's state in {run.checkpoint} does not fit this run: another "
                           "version of peft_ext, PEFT or transformers wrote the checkpoint; start the run anew with "
                           "--overwrite, or choose another --output") from error  # fmt: skip
        raise
    finally:
        run.stop.training = False
        if (inside := run.seconds.pop("evaluate in training", None)) is not None:
            run.seconds["train"] = round(run.seconds["train"] - inside, 2)
            run.seconds["evaluate in training"] = inside
    done = trainer.state.global_step
    record.peaks = run.ranks.gather(record.meter.peak_mib)
    del trainer
    gc.collect()
    return done


def _trainer(run: Run, record: Record, model: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, ProgressCallback, TrainingArguments

    from ..integrations.trainer import AdaLoraCallback, DiffPruningCallback, PeftExtCallback
    from .token_mean import TokenMeanTrainer

    class OrderedTrainer(TokenMeanTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            """Returns an :class:`.data.Order`: the order in which the run takes its examples.

            The accelerate library divides the batches of a step among the ranks: each rank gets every ``world``-th
            batch.
            """
            return Order(len(run.examples.train), run.steps * run.step_examples, o.seed)

        def get_train_dataloader(self) -> Any:
            # transformers before 5.4 takes the batch size of a checkpoint instead of the run's.
            self._train_batch_size = self.args.train_batch_size
            return super().get_train_dataloader()

    class GateTrainer(OrderedTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            """Makes an optimizer with a larger learning rate for Diff Pruning's gates than for other parameters."""
            if self.optimizer is None:
                kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = kind(self.model.parameter_groups(kwargs["lr"]), **kwargs)
            return self.optimizer

    o = run.options
    args = TrainingArguments(
        output_dir=str(checkpoints.checkpoints_folder(o)), max_steps=run.steps,
        per_device_train_batch_size=o.batch_size, gradient_accumulation_steps=o.grad_accum,
        learning_rate=o.learning_rate, lr_scheduler_type="cosine", warmup_steps=o.warmup, seed=o.seed,
        logging_steps=1, logging_nan_inf_filter=False, report_to="none",
        save_strategy="steps" if o.save_steps else "no", save_steps=o.save_steps or 500, save_total_limit=2,
        use_cpu=run.device.type == "cpu", dataloader_num_workers=0, dataloader_pin_memory=False,
        include_num_input_tokens_seen="non_padding", prediction_loss_only=True, remove_unused_columns=False,
        gradient_checkpointing=o.gradient_checkpointing, disable_tqdm=not shows_bars(),
        ddp_backend="gloo" if run.device.type == "cpu" and run.ranks.world > 1 else None,
        ddp_find_unused_parameters=_may_leave_unused(model),
        **({"fsdp": True, "fsdp_config": _FSDP} if run.sharded else {}),
        ddp_broadcast_buffers=False,  # buffers, such as scales and tables, are already equal in all processes
    )  # fmt: skip
    if run.ranks.world > 1 and not run.sharded:
        # DDP can't broadcast tensors of 8-bit floats, and need not, because each process has read or made equal ones.
        held = (*model.named_parameters(), *model.named_buffers())
        eight_bits = [name for name, t in held if t.is_floating_point() and t.element_size() == 1]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, eight_bits)
    args._n_gpu = min(args.n_gpu, 1)  # with more GPUs, Trainer would use nn.DataParallel and a larger batch
    # Padding on the left would lie between the virtual tokens of a prompt method and the text.
    padding = copy.copy(run.tokenizer)
    padding.padding_side = "right"
    collator = DataCollatorForSeq2Seq(padding, label_pad_token_id=IGNORED)
    record.meter = PeftExtCallback(accelerate=False)
    callbacks = [record.meter, recording_callback(record), checkpoints.saving_callback(run.stop, run.ranks)]
    if o.method == "adalora":
        callbacks.insert(0, AdaLoraCallback())
    if o.method == "diff-pruning":
        callbacks.insert(0, DiffPruningCallback(at=pruning_step(run)))
    if o.gradient_checkpointing:
        model.enable_input_require_grads()
    kind = GateTrainer if o.method == "diff-pruning" else OrderedTrainer
    trainer = kind(model, args, collator, run.examples.train, callbacks=callbacks)
    if run.sharded:
        from ..integrations.fsdp2 import prepare_fsdp2

        prepare_fsdp2(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    # progress_callback is added after the removal of ProgressCallback, which would remove a subclass too.
    trainer.add_callback(progress_callback(run.steps))
    return trainer


def _may_leave_unused(model: nn.Module) -> bool:
    """Returns whether a step may leave trainable parameters unused, so that DDP has to search for unused parameters.

    The experts of a mixture may get no token of a batch. A forward of text uses no vision tower, no audio tower, and no
    layer of cross attention to images (Llama 3.2 Vision). :func:`beside_text` does not find a tower that is a part of
    the text decoder (Phi-4-multimodal), and such a tower may have an adapter.
    """
    if any(isinstance(module, nn.ModuleList) and "experts" in name for name, module in model.named_modules()):
        return True
    base = base_model(model)
    if not (beside := tuple(f"{name}." for name in beside_text(base))):
        config = vars(base.config)
        return any(config.get(name) for name in ("vision_config", "audio_config", "cross_attention_layers"))
    return any(p.requires_grad and name.startswith(beside) for name, p in base.named_parameters())


# --- the log -----------------------------------------------------------------------------------------------------


def _describe(run: Run) -> None:
    o, examples = run.options, run.examples
    log.info(f"model: {o.model}, {run.weights}{', stock PEFT and bitsandbytes' if o.stock else ''}")
    if run.why_dtype:
        log.info(f"computes in {dtype_name(run.dtype)}: {run.why_dtype}")
    unit = f"blocks of {o.block_size} tokens" if run.corpus.kind == "text" else "examples"
    train, held_out = len(examples.train), len(examples.held_out)
    log.info(f"data: {run.corpus.where}, {train} {unit} to train on, {held_out} held out")
    if run.corpus.empty:
        column = "text" if run.corpus.kind == "text" else "completion"
        log.info(f"data: {run.corpus.empty} records with an empty {column} were left out")
    if examples.truncated:
        log.info(f"data: {examples.truncated} examples longer than --block-size {o.block_size} were cut")
    if examples.left_out:
        log.info(f"data: {examples.left_out} without a completion within --block-size {o.block_size} were left out")
    if examples.rest:
        log.info(f"data: {examples.rest} tokens at the end of the texts, which fill no block, were left out")
    log.info(f"method: {o.method}, {run.trainable:,} trainable parameters")
    if run.ranks.world == 1 and (gpus := torch.cuda.device_count()) > 1:
        log.info(f"one of {gpus} GPUs is used: torchrun --standalone --nproc-per-node {gpus} -m peft_ext uses all")
    if run.ranks.world > 1:
        log.info(f"processes: {run.ranks.described()}; a step has {run.step_examples} examples, "
                 f"{o.batch_size * o.grad_accum} of each process")  # fmt: skip


def _log_end(run: Run, record: Record, check: Check) -> None:
    perplexity, asked = record.results["perplexity"], record.results["samples"][0]
    log.info(f"held-out perplexity: {perplexity['before']:.3f} before, {perplexity['after']:.3f} after")
    before, after = (" ".join(asked[name].split()) for name in ("before", "after"))
    log.info(f"prompt: {asked['prompt']}\n  before: {before}\n  after:  {after}")
    log.info("time: " + ", ".join(f"{name} {spent:.1f} s" for name, spent in run.seconds.items()))
    log.info(f"saved: {run.options.output}")
    record.log_report()
    if check.accelerated_difference is not None:
        log.info(f"rounding: fused and stock path, both in {dtype_name(run.dtype)}, differ by "
                 f"{check.accelerated_difference:g} at most in a logit; the largest logit is "
                 f"{check.largest:.0f}")  # fmt: skip
    if not math.isfinite(check.largest):
        log.error("the trained model's logits are not finite: the run diverged, and the adapter is useless; a "
                  "smaller --lr, or a longer --warmup, may help")  # fmt: skip
    elif check.ok:
        log.info(f"checked: stock PEFT re-reads the adapter, max |logit difference| = {check.max_difference:g}")
    else:
        log.error(f"stock PEFT re-reads the adapter, max |logit difference| = {check.max_difference:g}, more than "
                  f"rounding ({check.bound:g})")  # fmt: skip
