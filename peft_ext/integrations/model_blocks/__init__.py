"""Blocks of transformers' models on fused operators: norms, MLPs, attentions, decoder layers, dropouts and losses."""
