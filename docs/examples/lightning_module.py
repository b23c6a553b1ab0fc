"""Trains LoRA with PyTorch Lightning.

python docs/examples/lightning_module.py --max-steps 20

The name of this file is not lightning.py, because Python would import this file instead of the package lightning.
"""

from __future__ import annotations

import lightning
import torch
from _inputs import batches, load, options_of, summary
from peft import LoraConfig, get_peft_model

import peft_ext  # peft_ext, line 1 of 3


class Adapted(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def main() -> None:
    options = options_of(__file__).parse_args()
    model, tokenizer = load(options)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    peft_ext.accelerate(model)  # peft_ext, line 2 of 3
    model.train()  # transformers loads models in eval mode, in which no dropout acts, and Lightning keeps the mode
    module = Adapted(model)
    trainer = lightning.Trainer(
        max_steps=options.max_steps, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, batches(tokenizer, options.max_steps))
    print(peft_ext.explain(model))  # peft_ext, line 3 of 3: prints which layers were fused, and why others were not
    model.save_pretrained(options.output)
    print(summary(module.losses))


if __name__ == "__main__":
    main()
