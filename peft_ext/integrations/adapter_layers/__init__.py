"""Layers of PEFT, bitsandbytes and PyTorch that run on the operators of peft_ext.

``reasons`` has the functions that return why a call takes the stock path. The forwards of the fused layers and
``explain`` call the functions of ``reasons``.

``known`` is the fast path for common calls that equal a call which the checks in ``reasons`` accepted before.

``base`` has the base class of the fused layers, the tables of fused classes, and functions that read the frozen weight.

``foreign`` reads the packed weight of quantized layers of other packages.

``lora``, ``dora``, ``adalora``, ``ia3``, ``linear``, ``linear4bit`` and ``embedding`` have the fused layers.

``experts`` and ``dora_experts`` have LoRA and DoRA on the experts of a mixture.

``siblings`` computes layers together that get the same input tensor.

``recompute`` makes the backward compute tensors again that autograd would otherwise save.

``merging`` merges an adapter into a packed weight.

``packed_codes`` tells which methods of PEFT would use the codes of a packed layer as if the codes were the weight.

``few_tokens`` calls a layer's kernel directly, in calls of few tokens without a gradient.

``tensor_parallel`` has LoRA over layers that transformers splits between processes.
"""
