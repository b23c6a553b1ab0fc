"""Tests ``peft-ext finetune --shard``: a base that FSDP2 shards gives the results of one process."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import packed_checkpoints
from launched import LOSS, WEIGHT, Run, by_hand, differences, errors_of, options_of, port, record_of, saved, torchrun

from peft_ext.cli.main import main
from peft_ext.run import Options, Plan, dry_run
from peft_ext.run.plan import preview
from peft_ext.run.prepare import adapter_config, meta_base

pytestmark = [
    pytest.mark.cpu_only("gloo's processes train on the CPU"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"),
    pytest.mark.skipif(sys.platform != "linux", reason="the tests look into /proc"),
]


SHARDED = ("--shard", "fsdp2")


def assert_the_plan_is(measured: dict, plan: Plan, shards: int) -> None:
    """Tests the computed bytes of a process against those that process 0 measured after a step."""
    run = plan.run
    base, given = meta_base(run), {"quant": run.options.quant, "blocksize": 64, "batch_size": 2, "sequence_length": 32}
    found = preview(base, adapter_config(run, base), dtype=run.dtype, device=run.device, shards=shards, **given).sharded
    assert {name: getattr(found, name) for name in measured} == measured


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
def test_a_sharded_run_is_a_run_of_one_process(method, tiny, folder, alone):
    quant = {"qlora": ("--method", "qlora", "--quant", "nf4"), "dora": ("--method", "dora")}.get(method, ())
    one, output = alone, folder / f"sharded-{method}"
    if quant:
        one = folder / f"alone-{method}"
        assert main(options_of(tiny, one, 4, *quant)) == 0
    run = Run([*torchrun(2), *options_of(tiny, output, 2, *quant, *SHARDED)], folder / f"sharded-{method}.log")
    assert run.end() == 0, run.out
    losses, weights = differences(one, output)
    assert losses <= LOSS and weights <= WEIGHT
    first, second = record_of(one), record_of(output)
    for name in ("before", "after"):
        assert second["perplexity"][name] == pytest.approx(first["perplexity"][name], rel=1e-5)
        assert [sample[name] for sample in second["samples"]] == [sample[name] for sample in first["samples"]]
    assert second["fused"]["fused"] == second["fused"]["layers"] == 14 and second["check"]["ok"]
    # With qlora, each process has all scales of the NF4 weights.
    assert second["memory"]["frozen"] < 0.6 * first["memory"]["frozen"] or method == "qlora"
    assert len(second["processes"]["load_growth_mib"]) == 2
    given = {"quant": "nf4" if method == "qlora" else "none", "method": method, "rank": 4, "dtype": "fp32"}
    planned = Options(model=tiny / "model", data=tiny / "pairs.jsonl", output=folder / "no", block_size=64,
                      shard="fsdp2", **given)  # fmt: skip
    assert_the_plan_is(second["memory"], dry_run(planned), 2)
    if quant:
        return
    for processes in (4, 1):  # four processes, then one, resume the checkpoint of two processes
        again = folder / f"sharded-{processes}"
        (again / "checkpoints").mkdir(parents=True)
        shutil.copytree(output / "checkpoints/checkpoint-4", again / "checkpoints/checkpoint-4")
        shutil.copy(output / "run.json", again / "run.json")
        options = [*options_of(tiny, again, 4 // processes, *SHARDED), "--resume"]
        launcher = [sys.executable, "-m", "peft_ext"] if processes == 1 else torchrun(processes)
        run = Run([*launcher, *options], folder / f"sharded-{processes}.log")
        assert run.end() == 0, run.out
        losses, weights = differences(output, again)
        assert losses <= LOSS and weights <= WEIGHT


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp8", "checkpoint"])
def test_packed_weights_are_sharded(weights, tiny, folder):
    """Tests weights that the run packs while it reads them, and those of a packed checkpoint, with a resume."""
    one, two, again = (folder / f"{name}-{weights}" for name in ("one", "two", "again"))
    more = ["--quant", weights]
    if weights == "checkpoint":
        model = packed_checkpoints.write(folder / "packed", "fp8", vocab_size=258, max_position_embeddings=256)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny / "model" / name, model / name)
        more += ["--model", str(model)]
    assert main(options_of(tiny, one, 4, *more)) == 0
    run = Run([*torchrun(2), *options_of(tiny, two, 2, *more, *SHARDED)], folder / f"two-{weights}.log")
    assert run.end() == 0, run.out
    losses, weight = differences(one, two)
    assert losses <= LOSS and weight <= WEIGHT
    first, second = record_of(one), record_of(two)
    assert second["fused"]["fused"] == second["fused"]["layers"] == 14 and second["check"]["ok"]
    assert second["memory"]["frozen"] < 0.75 * first["memory"]["frozen"]  # each process has all scales
    for name in ("before", "after"):
        assert second["perplexity"][name] == pytest.approx(first["perplexity"][name], rel=1e-5)
    (again / "checkpoints").mkdir(parents=True)  # one process resumes the checkpoint of two processes
    shutil.copytree(two / "checkpoints/checkpoint-4", again / "checkpoints/checkpoint-4")
    shutil.copy(two / "run.json", again / "run.json")
    options = [*options_of(tiny, again, 4, *more, *SHARDED), "--resume"]
    run = Run([sys.executable, "-m", "peft_ext", *options], folder / f"again-{weights}.log")
    assert run.end() == 0, run.out
    losses, weight = differences(two, again)
    assert losses <= LOSS and weight <= WEIGHT


@pytest.mark.slow
def test_accumulation_and_checkpointing_of_a_sharded_run(tiny, folder, alone):
    output = folder / "accumulated"
    more = ("--grad-accum", "2", "--gradient-checkpointing", *SHARDED)
    run = Run([*torchrun(2), *options_of(tiny, output, 1, *more)], folder / "accumulated.log")
    assert run.end() == 0, run.out
    assert "a step has 4 examples, 2 of each process" in run.out
    losses, weights = differences(alone, output)
    assert losses <= LOSS and weights <= WEIGHT
    assert record_of(output)["check"]["ok"] and record_of(output)["step_examples"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["none", "nf4"])
def test_a_sharded_run_in_bfloat16_is_a_run_of_ddp(weights, tiny, folder):
    """Both engines compute in bfloat16 and add the float32 gradients of two processes. The norm of the gradients, which
    clips them, is a sum over shards in another order."""
    outputs = [folder / f"{engine}-{weights}" for engine in ("ddp", "fsdp2")]
    for output, engine in zip(outputs, ("ddp", "fsdp2"), strict=True):
        more = ("--dtype", "bf16", "--quant", weights, "--dropout", "0.1", "--shard", engine)
        run = Run([*torchrun(2), *options_of(tiny, output, 2, *more)], folder / f"{output.name}.log")
        assert run.end() == 0, run.out
    ddp, fsdp2 = map(record_of, outputs)
    assert ddp["losses"][:2] == fsdp2["losses"][:2]  # before the first change of the adapter
    assert fsdp2["losses"] == pytest.approx(ddp["losses"], rel=2**-10)
    assert fsdp2["perplexity"]["before"] == pytest.approx(ddp["perplexity"]["before"], rel=2**-10)
    assert fsdp2["perplexity"]["after"] == pytest.approx(ddp["perplexity"]["after"], rel=2**-8)
    assert fsdp2["check"]["ok"]
    assert fsdp2["losses"][-1] < fsdp2["losses"][0] - 0.3


# Before each step, each process writes down the adapter and the losses of one input, with and without dropout.
DRAWS = """
import hashlib, json, sys
from pathlib import Path
import torch
from transformers import Trainer
from peft_ext.cli.main import main

step, folder, seen = Trainer.training_step, Path(sys.argv.pop(1)), []
def recording(self, model, *args, **kwargs):
    ids, state, digest, losses = torch.arange(2, 34)[None], torch.get_rng_state(), hashlib.sha256(), {}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                digest.update(whole.numpy().tobytes())
        for train in (False, True):
            losses[str(train)] = model.train(train)(input_ids=ids, labels=ids).loss.item()
    torch.set_rng_state(state)
    seen.append({"adapter": digest.hexdigest(), **losses})
    (folder / f"{self.args.process_index}.json").write_text(json.dumps(seen))
    return step(self, model, *args, **kwargs)
Trainer.training_step = recording
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_processes_draw_other_masks_over_equal_adapters(engine, tiny, tmp_path):
    (tmp_path / "draws.py").write_text(DRAWS)
    options = options_of(tiny, tmp_path / "out", 2, "--dropout", "0.5", "--shard", engine)
    run = Run([*torchrun(2)[:-2], tmp_path / "draws.py", tmp_path, *options], tmp_path / "log")
    assert run.end() == 0, run.out
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    # The first learning rate is 0, so that the first step does not change the adapter.
    assert len(first) == len(second) == 8 == len({step["adapter"] for step in first}) + 1
    for one, two in zip(first, second, strict=True):
        assert one["adapter"] == two["adapter"] and one["False"] == two["False"]
    same = [one["True"] == two["True"] for one, two in zip(first, second, strict=True)]
    assert same == [True] * 2 + [False] * 6  # before the first two steps B is 0, so dropout has no effect


def in_hub(cache: Path, model: Path, **changed) -> Path:
    """Copies a model into the cache of a hub as the repository acme/tiny, and returns the cache's folder."""
    snapshot = cache / "models--acme--tiny/snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    config = json.loads((model / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | changed))
    (cache / "models--acme--tiny/refs").mkdir()
    (cache / "models--acme--tiny/refs/main").write_text("0" * 40)
    return cache


@pytest.mark.slow
def test_a_model_of_the_hub_is_sharded(tiny, folder, alone, tmp_path):
    cache = in_hub(tmp_path / "hub", tiny / "model")
    options = options_of(tiny, tmp_path / "out", 4, "--model", "acme/tiny", *SHARDED)
    run = Run([sys.executable, "-m", "peft_ext", *options], tmp_path / "log", HF_HUB_CACHE=str(cache))
    assert run.end() == 0, run.out
    losses, weights = differences(alone, tmp_path / "out")
    assert losses <= LOSS and weights <= WEIGHT
    saved = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "acme/tiny" == record_of(tmp_path / "out")["options"]["model"]


@pytest.mark.slow
def test_files_of_the_hub_are_compared_where_they_are_sharded(tiny, tmp_path):
    for rank, changed in enumerate(({}, {"rms_norm_eps": 1e-3})):
        in_hub(tmp_path / f"hub{rank}", tiny / "model", **changed)

    def arguments(rank):
        return options_of(tiny, tmp_path / "out", 2, "--model", "acme/tiny", *SHARDED)

    runs = by_hand(2, arguments, tmp_path, port(), HF_HUB_CACHE=str(tmp_path / "hub{rank}"))
    none, said = errors_of(runs)
    assert none == [] and len(said) == 1 and re.match("rank 1: config.json of --model, .* on rank 0 it is", said[0])


@pytest.mark.slow
def test_hybrid_sharding_on_two_machines_with_a_killed_rank(tiny, folder, alone, tmp_path):
    """Two agents of torchrun stand for two machines, between which the shards are replicated."""
    at = ["--nnodes", "2", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port()}",
          "--rdzv-id", "job"]  # fmt: skip
    command = [*torchrun(2, *at), *options_of(tiny, tmp_path / "out", 1, "--shard", "hsdp", "--save-steps", "2")]
    runs = [Run(command, tmp_path / f"{agent}.log") for agent in range(2)]
    try:
        runs[0].wait_for(saved(tmp_path / "out", 2))
        # Either agent may have the last two ranks.
        runs[0].wait_for(lambda: next(filter(None, (run.of_rank(3) for run in runs)), None)).kill()
        assert [run.end() for run in runs] == [0, 0], runs[0].out + runs[1].out
    finally:
        for run in runs:
            run.kill()
    said = runs[0].out + runs[1].out
    assert said.count("restart: the run in") >= 1, said
    losses, weights = differences(alone, tmp_path / "out")
    assert losses <= LOSS and weights <= WEIGHT


@pytest.mark.slow
def test_a_folder_of_bitsandbytes_is_not_sharded(tiny, tmp_path):
    """The error comes before the data is read."""
    model = shutil.copytree(tiny / "model", tmp_path / "bnb")
    config = json.loads((model / "config.json").read_text())
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    more = ("--model", str(model), "--quant", "nf4", "--data", str(tmp_path / "none.jsonl"), *SHARDED)
    run = Run([sys.executable, "-m", "peft_ext", *options_of(tiny, tmp_path / "out", 4, *more)], tmp_path / "log")
    assert run.end() == 2, run.out
    (said,) = errors_of([run])
    assert len(said) == 1, run.out
    assert said[0].startswith(f"--shard fsdp2: the files of --model {model} are bitsandbytes' NF4, wanted dense")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--shard", "fsdp2", "--method", "adalora"), "--shard fsdp2 with --method adalora: wanted one of lora"),
        (("--shard", "fsdp2", "--stock", "--quant", "nf4"), "--shard fsdp2 with --stock and NF4"),
        (("--shard", "hsdp"), "--shard hsdp: 1 processes on 1 machines, wanted several machines"),
        (("--shard", "zero3"), "--shard zero3: wanted one of ddp, fsdp2, hsdp"),
        (
            ("--shard", "fsdp2", "--model", "acme/none"),
            "--model is acme/none: there is no such folder, and the hub gives none (",
        ),
    ],
)
def test_what_can_not_be_sharded_is_refused(more, message, tiny, tmp_path):
    run = Run([sys.executable, "-m", "peft_ext", *options_of(tiny, tmp_path / "out", 4, *more)], tmp_path / "log")
    assert run.end() == 2, run.out
    (said,) = errors_of([run])
    assert len(said) == 1 and said[0].startswith(message), run.out
