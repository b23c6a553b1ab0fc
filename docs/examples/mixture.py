"""Trains LoRA on the experts of a mixture, over NF4 weights, in a plain PyTorch loop.

python docs/examples/mixture.py --max-steps 20
"""

from __future__ import annotations

import torch
from _inputs import batches, load, options_of, summary
from peft import LoraConfig

import peft_ext


def main() -> None:
    options = options_of(__file__)
    options.set_defaults(model="ibm-granite/granite-3.1-1b-a400m-instruct")
    options = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load(options, experts=8)
    experts = [name for name, _ in model.named_parameters() if name.endswith(("experts.gate_up_proj", ".down_proj"))]
    # Names of the experts' parameters within a decoder layer, such as "mlp.experts.gate_up_proj".
    parameters = sorted({".".join(name.split(".")[-3:]) for name in experts if ".experts." in name})
    peft_ext.quantize_nf4(model.to(device))
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], target_parameters=parameters,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft_ext.get_peft_model(model, config, experts_dropout=0.05)  # stock PEFT has no dropout on experts
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

    model.train()
    losses = []
    for batch in batches(tokenizer, options.max_steps):
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    print(peft_ext.explain(model))
    model.save_pretrained(options.output)  # writes files in PEFT's format
    print(summary(losses))


if __name__ == "__main__":
    main()
