"""Blocks of transformers' models, computed by fused operators: norms, MLPs, attentions, decoder layers, dropouts and
losses."""
