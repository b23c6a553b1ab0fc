"""``peft_ext.verify``: compares the accelerated model with the stock model, and both models with the stock model in a
wider dtype.

compare.py has the public function ``verify`` and its result ``Verification``. twins.py makes three copies of the model:
the stock and the accelerated copy share the model's weights, and the third copy is in the wider dtype. steps.py runs
one training step or each block alone, and computes the limit of each error. proof.py tests whether a formula gives the
same results as the code of a block's class; ``register_form`` and ``python -m peft_ext.verification`` run this test.
"""

from .compare import Compared, Verification, verify

__all__ = ["Compared", "Verification", "verify"]
