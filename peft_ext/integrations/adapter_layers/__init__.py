"""Layers of PEFT, bitsandbytes and PyTorch that run on the operators of peft_ext.

reasons     functions that return why a call takes the stock path; the forwards and explain call these functions
known       the fast path for common calls that equal a call which the checks in reasons accepted before
base        the base class of the fused layers, the tables of fused classes, and reading of the frozen weight
foreign     quantized layers of other packages whose packed weight the operators read
lora, dora, adalora, ia3, linear, linear4bit, embedding     the fused layers
experts, dora_experts   LoRA and DoRA on the experts of a mixture
siblings    layers that get the same input tensor and are computed together
recompute   tensors that the backward computes again instead of saving them
merging     merging of an adapter into a packed weight
few_tokens  calls of few tokens without a gradient, which call a layer's kernel directly
tensor_parallel   LoRA over layers that transformers splits between processes
"""
