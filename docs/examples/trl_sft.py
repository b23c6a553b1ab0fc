"""Trains LoRA with TRL's SFTTrainer on prompts and completions. Only the tokens of completions count in the loss.

python docs/examples/trl_sft.py --max-steps 20
"""

from __future__ import annotations

import torch
from _inputs import figures, load, options_of, questions, summary
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from peft_ext.integrations.transformers import PeftExtCallback  # peft_ext, line 1 of 4
from peft_ext.integrations.trl import SFTTrainer  # peft_ext, line 2 of 4: TRL's class with a loss that stores no logits


def main() -> None:
    options = options_of(__file__).parse_args()
    model, tokenizer = load(options)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in questions(64)]
    trainer = SFTTrainer(
        model,
        SFTConfig(
            str(options.output), max_steps=options.max_steps, per_device_train_batch_size=4, max_length=128,
            learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none",
            use_cpu=not torch.cuda.is_available(),  # on a CPU, TRL's bfloat16 autocast needs use_cpu=True
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"),
    )  # fmt: skip
    meter = PeftExtCallback().attach(trainer)  # peft_ext, line 3 of 4
    metrics = trainer.train().metrics
    print(meter.explanation)  # peft_ext, line 4 of 4: prints which layers were fused, and why others were not
    trainer.save_model()
    print(figures(metrics))
    print(summary([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))


if __name__ == "__main__":
    main()
