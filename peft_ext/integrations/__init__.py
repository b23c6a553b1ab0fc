"""What meets Hugging Face: PEFT layers, bitsandbytes' weights, transformers' Trainer."""
