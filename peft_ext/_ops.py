"""The namespace of peft_ext's operators in ``torch.ops``.

A copy of the package under another name, such as the repository that ``tools/hub.py`` writes, needs a namespace of its
own, because one process may load both copies.
"""

NAMESPACE = "peft_ext"
