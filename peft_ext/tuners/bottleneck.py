"""Bottleneck adapters: a small network behind, or beside, chosen sublayers, as a method of PEFT.

    after:     Y = h + s · Up(act(Down(h))),  h = base(x)          parallel:  Y = base(x) + s · Up(act(Down(x)))

Sources: Houlsby et al. (arXiv 1902.00751): after attention and after the feed-forward; Pfeiffer et al. (arXiv
2005.00247): after the latter alone; parallel: He et al. (arXiv 2110.04366).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..integrations._peft_base import kernel_reason
from ..nn import BottleneckAdapter
from ..reference.bottleneck import ACTIVATIONS
from ._register import peft_type, register, without_adapter_name

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]

_PLACEMENTS = ("houlsby", "pfeiffer", "parallel")

# By model type, expressions for the full names of: attention's output, the feed-forward's output, the feed-forward.
_GATED = (r"self_attn\.o_proj", r"mlp\.down_proj", "mlp")
_BERT = (r"attention\.output\.dense", r"layer\.\d+\.output\.dense", None)
_DEFAULTS: dict[str, tuple[str, str, Optional[str]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"), _GATED),
    **dict.fromkeys(("bert", "roberta"), _BERT),
    "phi": (r"self_attn\.dense", r"mlp\.fc2", "mlp"),
    "gpt2": (r"attn\.c_proj", r"mlp\.c_proj", "mlp"),
    "opt": (r"self_attn\.out_proj", "fc2", None),
    "whisper": (r"(self|encoder)_attn\.out_proj", "fc2", None),
    "t5": (r"(SelfAttention|EncDecAttention)\.o", r"DenseReluDense\.wo", "DenseReluDense"),
}


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters.

    Args:
        placement: "houlsby": after attention and after the feed-forward; "pfeiffer": after the feed-forward alone;
            "parallel": beside the feed-forward.
        bottleneck_dim: M; default: the width of what is adapted over ``reduction_factor``.
        activation: "gelu", "gelu_tanh", "relu" or "silu". scale: s. adapter_bias: whether both projections have one.
        init_weights: "normal", "bert" or "mam", see :class:`peft_ext.nn.BottleneckAdapter`.
        target_modules: names or a regular expression of the modules whose outputs are adapted ("parallel": that are
            run beside), as PEFT reads them; default: by placement and model type.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: see PEFT's ``LoraConfig``.

    Raises: ValueError for an unknown placement, activation or a size below 1.
    """

    placement: str = field(default="houlsby", metadata={"help": "One of houlsby, pfeiffer, parallel."})
    bottleneck_dim: Optional[int] = field(default=None, metadata={"help": "The width of the bottleneck."})
    reduction_factor: float = field(default=16.0, metadata={"help": "The width adapted over the bottleneck's."})
    activation: str = field(default="gelu", metadata={"help": "One of gelu, gelu_tanh, relu, silu."})
    scale: float = field(default=1.0, metadata={"help": "What the adapter's output is multiplied by."})
    adapter_bias: bool = field(default=True, metadata={"help": "Whether both projections have a bias."})
    init_weights: str = field(default="normal", metadata={"help": "One of normal, bert, mam."})
    target_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Names or a regular expression of the modules that are adapted."}
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Names or a regular expression of what is left alone."}
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Modules that are trained and saved whole, such as a classification head."}
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "The index or indices of the layers that are adapted."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "The name of what layers_to_transform indexes."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("BOTTLENECK")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        for name, wanted in (("placement", _PLACEMENTS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in wanted:
                raise ValueError(f"BottleneckConfig: {name} is {getattr(self, name)!r}, wanted one of {wanted}")
        if self.bottleneck_dim is not None and self.bottleneck_dim < 1:
            raise ValueError(f"BottleneckConfig: bottleneck_dim is {self.bottleneck_dim}, wanted at least 1")
        BottleneckAdapter(1, 1, init=self.init_weights, device="meta")  # its own error for an unknown one

    def to_dict(self) -> dict[str, Any]:
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """``base_layer``, whose output goes through the active adapters in turn, or has the parallel ones added to it.

    In the state dict: ``bottleneck_adapters.{down,up}.{weight,bias}``. A base layer that returns a tuple has its first
    item adapted. An adapter is not linear: it can't be merged.
    """

    adapter_layer_names = ("bottleneck_adapters",)
    other_param_names = ("bottleneck_parallel",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_adapters = nn.ModuleDict()
        self.bottleneck_parallel: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = []

    def update_layer(self, adapter_name: str, features: int, config: BottleneckConfig) -> None:
        weight = next(self.get_base_layer().parameters())
        self.bottleneck_adapters[adapter_name] = BottleneckAdapter(
            features, config.bottleneck_dim, reduction_factor=config.reduction_factor, activation=config.activation,
            scale=config.scale, bias=config.adapter_bias, init=config.init_weights, device=weight.device,
        ).to(weight.dtype if weight.is_floating_point() else None)  # fmt: skip
        self.bottleneck_parallel[adapter_name] = config.placement == "parallel"
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return found
        y = found[0] if isinstance(found, tuple) else found
        for name in self.active_adapters:
            if name in self.bottleneck_adapters:
                adapter = self.bottleneck_adapters[name]
                y = adapter(x.to(y.dtype), y) if self.bottleneck_parallel[name] else adapter(y)
        return (y, *found[1:]) if isinstance(found, tuple) else y

    def _stock_reason(self) -> Optional[str]:
        """Why the adapters' next call takes PyTorch's code, see :func:`peft_ext.explain`; None: it is fused."""
        if self._disable_adapters:
            return "adapters are disabled"
        held = [self.bottleneck_adapters[name] for name in self.active_adapters if name in self.bottleneck_adapters]
        if not held:
            return "no active adapter on this layer"
        return kernel_reason("bottleneck_adapter", held[0].down.weight.device.type)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        raise ValueError(_UNMERGEABLE)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
        return getattr(self.base_layer, name)


_UNMERGEABLE = "a bottleneck adapter is not linear and can't be merged into the base layer; unload() takes it off"


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters, see :class:`BottleneckConfig`; ``peft.get_peft_model`` makes it.

    Raises: ValueError where the placement has no default for the model type, or no width is known for a target.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: Any) -> BottleneckConfig:
        if peft_config.target_modules is not None:
            return peft_config
        kind, placement = model_config.get("model_type"), peft_config.placement
        attention, output, block = _DEFAULTS.get(kind, (None, None, None))
        chosen = {"houlsby": (attention, output), "pfeiffer": (output,), "parallel": (block,)}[placement]
        if None in chosen:
            raise ValueError(
                f"BottleneckConfig: placement {placement!r} has no default for model type {kind!r}; give target_modules"
            )
        peft_config.target_modules = rf"(?:.*\.)?(?:{'|'.join(chosen)})"
        return peft_config

    def _check_merge_allowed(self) -> None:
        raise ValueError(_UNMERGEABLE)

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        raise ValueError(_UNMERGEABLE)

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str,
    ) -> None:  # fmt: skip
        features = self._features(target, current_key, peft_config)
        if not isinstance(target, BottleneckLayer):
            target = BottleneckLayer(target)
            setattr(parent, target_name, target)
        target.update_layer(adapter_name, features, peft_config)
        if adapter_name not in self.active_adapters:
            target.bottleneck_adapters[adapter_name].requires_grad_(False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own asks for a weight, which a whole feed-forward has not

    def _features(self, target: nn.Module, key: str, config: BottleneckConfig) -> int:
        """The width that the adapter reads and writes."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if hasattr(base, "out_features"):
            return base.out_features
        if hasattr(base, "nf"):  # GPT-2's Conv1D
            return base.nf
        model_config = self.get_model_config(self.model)
        for name in ("hidden_size", "n_embd", "d_model"):
            if isinstance(model_config.get(name), int):
                return model_config[name]
        raise ValueError(f"BottleneckConfig: {key} is a {type(base).__name__} of unknown width; target a linear layer")

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        stripped = without_adapter_name(cls.prefix, key, adapter_name)
        return stripped if stripped != key else super()._remove_adapter_name_from_key(key, adapter_name)


register("bottleneck", BottleneckConfig, BottleneckModel)
