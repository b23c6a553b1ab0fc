"""``peft_ext.verify``: compares the accelerated model with the stock model, and both with a model in a wider dtype.

compare  the public function ``verify`` and its result ``Verification``
twins    the three copies of the model: stock and accelerated, which share its weights, and one in the wider dtype
steps    one training step, each block alone, and the limit of each error
"""

from .compare import Compared, Verification, verify

__all__ = ["Compared", "Verification", "verify"]
