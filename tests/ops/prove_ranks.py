"""Runs one of two processes of test_prove_ranks.py: on rank 1 the proof of the family ia3 fails.

    python prove_ranks.py SCENARIO FOLDER RANK

Writes FOLDER/RANK.json. Scenarios: "accelerated before the group" and "accelerated in the group" (``accelerate`` runs
before or after the process group exists, and the trainer's callback after both), "own loop" (``peft_ext.agree`` in
place of the callback), "alone" (rank 1 alone calls ``accelerate``, and then rank 0 alone begins to train).
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

what, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
os.environ.pop("PEFT_EXT_REQUIRE", None)
os.environ |= {"XDG_CACHE_HOME": str(folder / f"cache{rank}"), "PEFT_EXT_PROVE": "1"}

import torch  # noqa: E402  the environment comes first
import torch.distributed as dist  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext.integrations.transformers import PeftExtCallback  # noqa: E402
from peft_ext.ops import prove  # noqa: E402

native = prove.native_op
if rank == 1:
    prove.native_op = lambda key, name: (lambda x, s: 2 * x * s) if name == "ia3_scale" else native(key, name)


def start() -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)


def made() -> torch.nn.Module:
    from peft import IA3Config, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(48, 80), torch.nn.Linear(80, 48))
    model = get_peft_model(base, IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def trained(model: torch.nn.Module) -> list[Any]:
    """Returns the bits of an output and of the gradients."""
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    y = model(x)
    y.square().sum().backward()
    values = [y, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
    return [value.detach().view(torch.int32).tolist() for value in values]


found: dict[str, Any] = {}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    if what != "accelerated before the group":
        start()
    if what != "alone" or rank == 1:
        model = peft_ext.accelerate(made())
    if what == "alone":
        dist.barrier()
        prove.PEERS_SECONDS = 3
        try:
            if rank == 0:
                prove.agree(lambda: None)
        except RuntimeError as error:
            found["error"] = str(error)
    else:
        if what == "accelerated before the group":
            start()
        if what == "own loop":
            peft_ext.agree(model)
        else:
            PeftExtCallback().on_train_begin(SimpleNamespace(device=torch.device("cpu")), None, None, model=model)
        found["bits"] = trained(model)
        found["fused"] = [row.fused for row in peft_ext.explain(model).rows]
    dist.barrier()
found["warned"] = "\n".join(str(warning.message) for warning in said)
found["dropped"] = [name for key, name in prove.DROPPED if key == "CPU"]
(folder / f"{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
