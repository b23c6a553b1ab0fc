"""A run whose base is sharded by FSDP2 (``--shard fsdp2`` and ``--shard hsdp``).

In a sharded run of several processes, no process holds the whole model. The adapter is added before the weights are
read, because FSDP2 shards a decoder layer with its adapter. The Trainer gets the sharded model, and the accelerate
library saves checkpoints by torch.distributed.checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from ..sources.json_file import raised_as
from ..sources.model import SourceError
from ..weights.quantizers import PACKED_FORMATS
from .errors import RunError
from .prepare import Run
from .progress import status


def sharded_model(run: Run, adapt: Callable[[Any], Any], saved: Optional[Path] = None) -> Any:
    """Returns the model with an adapter, sharded by FSDP2.

    Args:
        adapt: adds the adapter to a model on the meta device, and returns the model.
        saved: folder of a saved adapter, whose values the new adapter gets; None: the adapter keeps the values that
            ``adapt`` gives.

    Raises RunError where a weight can't be read.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import register_fsdp_forward_method

    from ..sharded import adapter_values, meta_base, shard_and_load

    o, ranks = run.options, run.ranks
    shape, names = (ranks.world,), ("shard",)
    if o.shard == "hsdp":
        shape, names = (ranks.nodes, ranks.world // ranks.nodes), ("replicate", "shard")
    with raised_as(RunError, f"--model {o.model}: ", SourceError, OSError), status("loading the model"):
        quant = o.quant if o.quant in ("nf4", *PACKED_FORMATS) else "none"
        base = meta_base(run.folder, run.config, dtype=run.dtype, quant=quant, blocksize=o.blocksize)
        base.model.config.use_cache = False
        if run.is_from_hub:  # PEFT writes the name of the base, not a path in the hub's cache, into the adapter's files
            base.model.name_or_path = base.model.config.name_or_path = o.model
        with adapter_values(run.device):
            model = adapt(base.model)
            if saved is not None:
                _read_adapter(model, saved, run.device)
            ranks.wait()  # in the code after this line, no rank may fail alone
        mesh = init_device_mesh(run.device.type, shape, mesh_dim_names=names)
        shard_and_load(model, base, mesh, node=ranks.node)
    # FSDP2's root unit, which has the embedding and the head, is the PeftModel. The PeftModel's method ``generate``
    # calls the wrapped model, not the PeftModel, so FSDP2 has to gather the root unit before ``generate`` too.
    register_fsdp_forward_method(model, "generate")
    return model


def _read_adapter(model: Any, folder: Path, device: torch.device) -> None:
    """Gives the adapter of ``model`` the values of the saved adapter in ``folder``. DoRA's magnitudes, which are on the
    meta device, first get memory."""
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    for layer in model.modules():
        for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
            values = torch.empty_like(magnitude.weight, device=device)
            magnitude.weight = nn.Parameter(values, magnitude.weight.requires_grad)
    state = load_peft_weights(str(folder), device=str(device))
    if missing := sorted(get_peft_model_state_dict(model, save_embedding_layers=False).keys() - state.keys()):
        raise RunError(f"{folder}: the adapter's files lack {missing[0]}")
    set_peft_model_state_dict(model, state)
