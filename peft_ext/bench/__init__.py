"""The timer that ``peft-ext bench`` and peft_ext's own benchmarks use, and the measurement of ``peft-ext bench``.

timer.py computes the errors of contenders, which are implementations of one operator, against float64, and times the
contenders in turn. layer.py compares one adapted layer of peft_ext with the layers of PEFT and bitsandbytes.
"""
