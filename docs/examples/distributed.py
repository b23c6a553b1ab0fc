"""Trains LoRA in several processes with PyTorch's DDP or FSDP2.

torchrun --nproc-per-node 2 docs/examples/distributed.py --strategy fsdp2 --max-steps 20
"""

from __future__ import annotations

import inspect
import os
from itertools import islice

import torch
import torch.distributed as dist
from _inputs import batches, load, options_of, summary
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peft_ext  # peft_ext, line 1 of 3


def join() -> torch.device:
    """Joins the process group of torchrun, or creates a group of one process. Returns the device for training."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if backend == "gloo":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def wrap(model: PeftModel, strategy: str) -> nn.Module:
    """Returns the wrapped model that the training loop calls. FSDP2 shards the decoder layers in place."""
    if strategy == "ddp":
        # The model's buffers belong to the frozen base and do not change, so DDP need not send them in each step.
        parameters = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # PyTorch < 2.13
        return DistributedDataParallel(model, **{name: False})
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def main() -> None:
    parser = options_of(__file__)
    parser.add_argument(
        "--strategy",
        choices=["ddp", "fsdp2"],
        default="ddp",
        help="ddp: each process holds a whole copy; fsdp2: the model is sharded",
    )
    options = parser.parse_args()
    device = join()
    rank, processes = dist.get_rank(), dist.get_world_size()
    model, tokenizer = load(options)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).to(device)
    peft_ext.accelerate(model)  # peft_ext, line 2 of 3: comes before the model is wrapped
    model.train()
    trained = wrap(model, options.strategy)
    optimizer = torch.optim.AdamW((p for p in trained.parameters() if p.requires_grad), lr=1e-3)

    torch.manual_seed(rank)  # from this line on, each process draws its own dropout masks
    losses: list[float] = []
    for batch in islice(batches(tokenizer, options.max_steps * processes), rank, None, processes):
        loss = trained(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / processes)

    # get_model_state_dict gathers the shards of the adapter alone. Every process has to call it.
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    adapter = get_model_state_dict(model, options=gather)
    if rank == 0:
        print(peft_ext.explain(model))  # peft_ext, line 3 of 3: prints which layers were fused, and why others were not
        model.save_pretrained(options.output, state_dict=adapter)
        print(summary(losses))
    dist.barrier()  # a process that ends while gloo's threads still hold its last tensors can abort (pytorch #179291)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
