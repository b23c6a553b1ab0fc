"""A fine-tuning run as a library. The command ``peft-ext finetune`` calls this library.

::

    from peft_ext.run import Options, finetune

    result = finetune(Options(model="my/model", data="my.jsonl", output="outputs/mine"))

A run reads the data, holds a part of the data out, quantizes the base where the options say so, trains an adapter with
transformers' Trainer, saves the adapter, and checks that the saved files give the trained adapter again. The modules of
peft_ext.run in reading order::

    options.py      options of a run              config.py      options in a YAML file
    prepare.py      checks before the weights     data.py        records, split, tokens
    train.py        the run                       evaluate.py    losses, answers, the last check
    checkpoints.py  output folder, lock, resume   record.py      run.json
    plan.py         a dry run                     report/        report.html, drawn from run.json
    errors.py       errors and signals            progress.py    log lines and bars
    launch.py       the process's launcher        ranks.py       what the processes exchange
    shard.py        a base sharded by FSDP2       runner.py      llama.cpp's adapter file
    shard_memory.py memory of a sharded run       demo_model.py  the default model
    token_mean.py   the loss of a step            causal_loss.py  a check of the model's loss
    tokenizer.py    the tokenizer of a run
"""

from .config import read_config, write_config
from .errors import Interrupted, RunError
from .evaluate import Check
from .options import Options
from .plan import Plan, Preview, dry_run
from .report import redraw, render
from .train import Result, finetune

__all__ = [
    "Check",
    "Interrupted",
    "Options",
    "Plan",
    "Preview",
    "Result",
    "RunError",
    "dry_run",
    "finetune",
    "read_config",
    "redraw",
    "render",
    "write_config",
]
