"""Loads a model for FSDP2. If there are several processes, no process ever holds the whole model.

    from peft_ext.sharded import adapter_values, meta_base, shard_and_load

    base = meta_base(folder, config, dtype=torch.bfloat16, quant="nf4")   # a model on the meta device, files checked
    with adapter_values(device):
        model = peft.get_peft_model(base.model, peft_config)              # the adapter has values, the base has none
    peft_ext.accelerate(model)
    shard_and_load(model, base, mesh)                                     # fully_shard, then reads the files

Each process reads the rows of a dense weight that belong to the process's own shard. In three cases, one process of
each node reads the whole weight and sends the finished tensors to the other processes of the node: the weight is
quantized to NF4 or another format; a DoRA adapter needs the norm of the weight; or transformers' conversion of the
files' tensors does not work row by row. The processes of a node take turns in reading. A process keeps its own shard of
each tensor that it receives. Buffers, such as the scales of NF4, are whole in each process.

Each process holds the whole adapter until ``shard_and_load`` shards the adapter. ``shard_and_load`` shards the model
first, and then reads the weights of the base.
"""

from .adapter import adapter_values
from .base import MetaBase, meta_base
from .load import shard_and_load

__all__ = ["MetaBase", "adapter_values", "meta_base", "shard_and_load"]
