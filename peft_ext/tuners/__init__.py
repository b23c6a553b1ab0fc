"""Fine-tuning methods that PEFT lacks. Importing this package registers the methods with PEFT.

    bottleneck adapters    small networks after or parallel to sublayers    tuners.bottleneck
    BitFit                 only biases are trained                          tuners.bitfit
    partial fine-tuning    only chosen layers or modules are trained        tuners.partial
    Diff Pruning           a sparse difference to the weights is learned    tuners.diff_pruning

After the import of ``peft_ext.tuners``, PEFT's functions accept the new configurations: ``peft.get_peft_model(model,
BitFitConfig(...))``, ``save_pretrained``, ``PeftModel.from_pretrained`` and so on. A process that loads an adapter of
one of these four methods with PEFT's functions must import ``peft_ext.tuners`` first; :func:`peft_ext.load_adapter`
imports ``peft_ext.tuners`` itself. :func:`from_adapterhub` and :func:`to_adapterhub` convert AdapterHub's bottleneck
adapters.
"""

from .adapterhub import config_from_adapterhub, from_adapterhub, to_adapterhub
from .bitfit import BitFitConfig, BitFitModel
from .bottleneck import BottleneckConfig, BottleneckModel
from .diff_pruning import DiffPruningConfig, DiffPruningModel
from .partial import PartialConfig, PartialModel

__all__ = [
    "BitFitConfig",
    "BitFitModel",
    "BottleneckConfig",
    "BottleneckModel",
    "DiffPruningConfig",
    "DiffPruningModel",
    "PartialConfig",
    "PartialModel",
    "config_from_adapterhub",
    "from_adapterhub",
    "to_adapterhub",
]
