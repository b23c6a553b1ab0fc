"""A fine-tuning run as a library; ``peft-ext finetune`` is a thin face of it.

::

    from peft_ext.run import Options, finetune

    result = finetune(Options(model="my/model", data="my.jsonl", output="outputs/mine"))

A run reads the data, holds a part of it out, quantizes the base, trains an adapter with transformers' Trainer, saves
it, and lets stock PEFT read it again. In reading order::

    options.py      what can be asked for         config.py      the same as a YAML file
    prepare.py      all before the weights        data.py        records, split, tokens
    train.py        the run                       evaluate.py    losses, answers, the last check
    checkpoints.py  the folder, lock and resume   record.py      run.json
    plan.py         a dry run                     report/        report.html, drawn from run.json
    errors.py       what ends a run               progress.py    what it tells as it goes
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
