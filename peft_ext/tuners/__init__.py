"""Methods that PEFT lacks, as methods of PEFT: importing this package registers them.

    bottleneck adapters    small networks behind or beside sublayers  tuners.bottleneck
    BitFit                 biases alone are trained                  tuners.bitfit
    partial fine-tuning    chosen layers or modules are trained      tuners.partial
    Diff Pruning           a sparse difference is learned            tuners.diff_pruning

From then on ``peft.get_peft_model(model, BitFitConfig(...))``, ``save_pretrained``, ``PeftModel.from_pretrained`` and
all else that PEFT does with an adapter works. A process that loads such an adapter must have imported this package
before; :func:`peft_ext.load_adapter` does so. :func:`from_adapterhub` and :func:`to_adapterhub` read and write
AdapterHub's bottleneck adapters.
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
