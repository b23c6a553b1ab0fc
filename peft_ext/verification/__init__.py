"""A user's own model and batch, accelerated against stock, and both against a wider dtype: ``peft_ext.verify``.

compare  the public function, its result, and the three models
twins    copies over a model's own weights, stock, accelerated and in the wider dtype
steps    one training step, each block alone, and the rule of what is as good as stock
"""

from .compare import Compared, Verification, verify

__all__ = ["Compared", "Verification", "verify"]
