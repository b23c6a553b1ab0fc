"""Trains LoRA with transformers' Trainer, with evaluations, sample answers and checkpoints.

The script writes logs for TensorBoard if TensorBoard is installed.

python docs/examples/trainer.py --max-steps 20            trains; tensorboard --logdir outputs/trainer shows the logs
python docs/examples/trainer.py --max-steps 40 --resume   continues the run from the last checkpoint
python docs/examples/trainer.py --packed                  puts the texts of a batch into one row without padding
"""

from __future__ import annotations

import importlib.util
from typing import Any

from _inputs import blocks, figures, load, options_of, summary
from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peft_ext.integrations.transformers import PeftExtCallback  # peft_ext, line 1 of 3


class Answer(TrainerCallback):
    """Prints the model's continuation of a prompt after each evaluation."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model, tokenizer = kwargs["model"], kwargs["processing_class"]
        inputs = tokenizer(self.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        out = model.eval().generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"step {state.global_step}: {self.prompt!r} -> {text!r}")


def main() -> None:
    parser = options_of(__file__)
    parser.add_argument(
        "--save-steps", type=int, default=10, help="steps between two checkpoints and between two evaluations"
    )
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute activations again in the backward to save memory"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output")
    parser.add_argument("--packed", action="store_true", help="put the texts of a batch into one row, without padding")
    options = parser.parse_args()

    model, tokenizer = load(options)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    data = blocks(tokenizer, 72)
    collator = DataCollatorWithPadding(tokenizer)
    if options.packed:  # position_ids tell attention and the loss where each text begins
        data = [{"input_ids": row["input_ids"][: 16 + 7 * i % 48]} for i, row in enumerate(data)]
        collator = DataCollatorWithFlattening()
    tensorboard = importlib.util.find_spec("tensorboard") is not None
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.output), max_steps=options.max_steps, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1,
            save_steps=options.save_steps, eval_strategy="steps", eval_steps=options.save_steps,
            gradient_checkpointing=options.gradient_checkpointing, report_to="tensorboard" if tensorboard else "none",
        ),
        collator,
        train_dataset=data[8:],
        eval_dataset=data[:8],
        processing_class=tokenizer,
        callbacks=[Answer("The if statement is")],
    )  # fmt: skip
    meter = PeftExtCallback().attach(trainer)  # peft_ext, line 2 of 3
    metrics = trainer.train(resume_from_checkpoint=options.resume or None).metrics
    print(meter.explanation)  # peft_ext, line 3 of 3: prints which layers were fused, and why others were not
    trainer.save_model()
    print(figures(metrics))
    print(summary([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))


if __name__ == "__main__":
    main()
