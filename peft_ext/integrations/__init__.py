"""Integrations of peft_ext with PEFT, bitsandbytes, transformers and TRL."""
