"""Blocks of transformers' models on fused operators: norms, MLPs, attentions, dropouts, and the loss."""
