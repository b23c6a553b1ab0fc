"""Loads a model for FSDP2, so that no process ever holds the whole model.

    from peft_ext.sharded import adapter_values, meta_base, shard_and_load

    base = meta_base(folder, config, dtype=torch.bfloat16, quant="nf4")   # a model on the meta device, files checked
    with adapter_values(device):
        model = peft.get_peft_model(base.model, peft_config)              # the adapter has values, the base has none
    peft_ext.accelerate(model)
    shard_and_load(model, base, mesh)                                     # fully_shard, then reads the files

A process reads the rows of a dense weight that its own shard has. An NF4 weight is read and quantized whole by one
process of each node, because the scales of a weight are quantized together. The process then sends codes and scales to
the other processes of its node, and each process keeps its shard of the codes. The processes of a node take turns.
"""

from .adapter import adapter_values
from .base import MetaBase, meta_base
from .load import shard_and_load

__all__ = ["MetaBase", "adapter_values", "meta_base", "shard_and_load"]
