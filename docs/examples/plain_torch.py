"""Trains LoRA in a plain PyTorch loop.

python docs/examples/plain_torch.py --max-steps 20
"""

from __future__ import annotations

import torch
from _inputs import batches, load, options_of, summary
from peft import LoraConfig, get_peft_model

import peft_ext  # peft_ext, line 1 of 3


def main() -> None:
    options = options_of(__file__).parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(options)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model.to(device), config)
    peft_ext.accelerate(model)  # peft_ext, line 2 of 3
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

    model.train()
    losses = []
    for batch in batches(tokenizer, options.max_steps):
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    print(peft_ext.explain(model))  # peft_ext, line 3 of 3: prints which layers were fused, and why others were not
    model.save_pretrained(options.output)
    print(summary(losses))


if __name__ == "__main__":
    main()
