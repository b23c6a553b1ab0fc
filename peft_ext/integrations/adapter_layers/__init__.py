"""PEFT's and bitsandbytes' layers on this package's operators.

reasons     why a call takes the stock path: what explain prints, and each forward asks
known       common calls whose like the reasons have accepted, and which do not ask them again
base        the classes that are swapped, and how they read the frozen weight
lora, dora, adalora, ia3, linear, linear4bit, embedding     the layers
experts     LoRA and DoRA on the experts of a mixture
siblings    layers of one input, computed together
merging     an adapter merged into an NF4 weight
"""
