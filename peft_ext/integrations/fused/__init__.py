"""PEFT's and bitsandbytes' layers on this package's ops.

reasons     why a call takes the stock path: what explain prints, and each forward asks
base        the classes that are swapped, and how they read the frozen weight
lora, dora, adalora, ia3, linear, linear4bit     the layers
merging     an adapter merged into an NF4 weight
"""
