"""Trains LoRA in a loop with Hugging Face accelerate, with two batches in each optimizer step.

python docs/examples/accelerate_loop.py --max-steps 20    or    accelerate launch docs/examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from _inputs import batches, load, options_of, summary
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

import peft_ext  # peft_ext, line 1 of 3


def main() -> None:
    options = options_of(__file__).parse_args()
    model, tokenizer = load(options)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    peft_ext.accelerate(model)  # peft_ext, line 2 of 3: comes before prepare, because prepare may wrap the model
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    data = batches(tokenizer, options.max_steps * 2 * accelerator.num_processes)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    model.train()
    losses: list[float] = []
    total = 0.0
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
        if accelerator.sync_gradients:
            losses.append(total / 2)
            total = 0.0

    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        print(peft_ext.explain(model))  # peft_ext, line 3 of 3: prints which layers were fused, and why others were not
        model.save_pretrained(options.output)
        print(summary(losses))


if __name__ == "__main__":
    main()
