"""``peft_ext.verify``: compares the accelerated model with the stock model, and both with a model in a wider dtype.

compare  the public function ``verify``, the result ``Verification``, and the three models
twins    copies of a model's modules that share the model's weights: stock, accelerated, and in the wider dtype
steps    one training step, each block alone, and the limit of each error
"""

from .compare import Compared, Verification, verify

__all__ = ["Compared", "Verification", "verify"]
