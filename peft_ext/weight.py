"""Names of :mod:`peft_ext.weights.nf4`, which can also be imported from ``peft_ext.weight``."""

from .weights.nf4 import (
    BLOCKSIZES,
    FLOATS,
    NESTED_BLOCKSIZE,
    QUANT_STATE,
    NestedAbsmax,
    NF4Weight,
    is_nf4_table,
    read_quant_state,
)

__all__ = [
    "BLOCKSIZES",
    "FLOATS",
    "NESTED_BLOCKSIZE",
    "QUANT_STATE",
    "NF4Weight",
    "NestedAbsmax",
    "is_nf4_table",
    "read_quant_state",
]
