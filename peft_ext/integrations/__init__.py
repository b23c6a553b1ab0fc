"""Integrations of peft_ext with PEFT, bitsandbytes, transformers, TRL and FSDP2."""
