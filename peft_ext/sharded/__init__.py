"""Loads a model for FSDP2, so that no process ever holds the whole model.

    from peft_ext.sharded import adapter_values, meta_base, shard_and_load

    base = meta_base(folder, config, dtype=torch.bfloat16, quant="nf4")   # a model on the meta device, files checked
    with adapter_values(device):
        model = peft.get_peft_model(base.model, peft_config)              # the adapter has values, the base has none
    peft_ext.accelerate(model)
    shard_and_load(model, base, mesh)                                     # fully_shard, then reads the files

Each process reads the rows of a dense weight that belong to the process's own shard. One process of each node reads a
weight whole and sends the finished tensors to the other processes of the node in three cases: the weight becomes NF4,
because the scales of one weight are quantized together; an adapter of DoRA needs the norm of the weight; or
transformers makes several weights of one tensor in the files. The processes of a node take turns. A process keeps the
process's own shard of each tensor that arrives. Buffers, such as the scales of NF4, are whole in each process.

The adapter is whole in each process until ``shard_and_load`` shards the adapter. ``shard_and_load`` reads the weights
of the base after it has sharded the model.
"""

from .adapter import adapter_values
from .base import MetaBase, meta_base
from .load import shard_and_load

__all__ = ["MetaBase", "adapter_values", "meta_base", "shard_and_load"]
