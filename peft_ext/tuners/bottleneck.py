"""Bottleneck adapters as a method of PEFT: a small network after, or parallel to, chosen sublayers.

    after:     Y = h + s · Up(act(Down(h))),  h = base(x)          parallel:  Y = base(x) + s · Up(act(Down(x)))
    around:    Y = base(z),  z = x + s · Up(act(Down(base(x))))    base: a LayerNorm after a residual sum x

Sources: Houlsby and others (arXiv 1902.00751) place adapters after attention and after the feed-forward. Pfeiffer and
others (arXiv 2005.00247) place an adapter after the residual sum of the feed-forward, as ``SeqBnConfig`` of
AdapterHub's ``adapters`` does. He and others (arXiv 2110.04366) run the adapter parallel to the feed-forward.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from torch import Tensor, nn

from .._imports import required
from ..integrations.adapter_layers.base import DTYPES
from ..integrations.adapter_layers.reasons import kernel_reason
from ..nn import BottleneckAdapter
from ..text import dtype_name as short
from .register import peft_type, register
from .targets import FLOATS, TargetConfig, containers, expand_all_linear, in_layers
from .tuner import Tuner, Wrapper

with required("peft", "peft_ext.tuners"):
    from peft.tuners.tuners_utils import BaseTunerLayer
with required("transformers", "peft_ext.tuners"):
    from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]

_PLACEMENTS = ("houlsby", "pfeiffer", "after_ffn", "parallel")


class _Places(NamedTuple):
    """Regular expressions for the full names of the modules on which a placement puts adapters.

    The fields are the expressions for attention's output layer, for the feed-forward's output layer, for the
    feed-forward (``feed_forward``), and for the module with Pfeiffer's adapter (``summed``). Pfeiffer's place is the
    LayerNorm after the feed-forward's residual sum or, if the block returns that sum, the block; in Phi, it is the
    feed-forward's output layer.
    """

    attention: str
    output: str
    feed_forward: Optional[str]
    summed: Optional[str]


_GATED = _Places(r"self_attn\.o_proj", r"mlp\.down_proj", "mlp", r"layers\.\d+")
# Models such as Gemma 2 put a norm between the feed-forward's output and the residual sum, so placement "pfeiffer" is
# not defined for these models.
_NORMED = _GATED._replace(summed=None)
_BERT = _Places(r"attention\.output\.dense", r"layer\.\d+\.output\.dense", None, r"layer\.\d+\.output\.LayerNorm")
_OPT = _Places(r"self_attn\.out_proj", "fc2", None, r"layers\.\d+")
_DEFAULTS: dict[str, _Places] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), _GATED),
    **dict.fromkeys(("gemma2", "gemma3_text"), _NORMED),
    **dict.fromkeys(("bert", "roberta"), _BERT),
    # Phi adds attention and feed-forward to the residual in one sum: the feed-forward has no residual sum of its own.
    "phi": _Places(r"self_attn\.dense", r"mlp\.fc2", "mlp", r"mlp\.fc2"),
    "gpt2": _Places(r"attn\.c_proj", r"mlp\.c_proj", "mlp", r"h\.\d+"),
    "opt": _OPT,
    "whisper": _OPT._replace(attention=r"(self|encoder)_attn\.out_proj"),
    "t5": _Places(
        r"(SelfAttention|EncDecAttention)\.o", r"DenseReluDense\.wo", "DenseReluDense",
        r"(encoder\.block\.\d+\.layer\.1|decoder\.block\.\d+\.layer\.2)",
    ),
}  # fmt: skip


def _places(model_config: dict[str, Any]) -> Optional[_Places]:
    kind = model_config.get("model_type")
    if kind == "opt" and not model_config.get("do_layer_norm_before", True):
        return _OPT._replace(summed=r"layers\.\d+\.final_layer_norm")
    return _DEFAULTS.get(kind)


@dataclass
class BottleneckConfig(TargetConfig):
    """Configuration of bottleneck adapters.

    Args:
        placement: where the adapters are in each layer of the model. "houlsby": one adapter after attention and one
            after the feed-forward, both before the residual sum. "pfeiffer": after the residual sum v of the
            feed-forward, v + s · Up(act(Down(v))), or in models with a LayerNorm after that sum (BERT) LayerNorm(v + s
            · Up(act(Down(LayerNorm(v))))). "after_ffn": after the feed-forward, before the residual sum. "parallel":
            parallel to the feed-forward.
        bottleneck_dim: the width of the bottleneck; default: the adapted module's width / ``reduction_factor``, rounded
            down, but at least 1.
        activation: the activation act between Down and Up: "gelu", "gelu_tanh", "relu" or "silu".
        scale: s, the factor by which the output of Up is multiplied.
        adapter_bias: whether the projections Down and Up have biases.
        init_weights: how the adapter's weights are initialized: "normal", "bert" or "mam", see
            :class:`peft_ext.nn.BottleneckAdapter`.
        target_modules: names or a regular expression, with PEFT's meaning, of the modules whose outputs are adapted
            (for "parallel", of the modules to which adapters run parallel). If a container of modules is named, the
            container's own output is adapted. With "pfeiffer" a targeted LayerNorm runs before and after its adapter.
            The default of target_modules depends on placement and model type.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: see
            :class:`~peft_ext.tuners.targets.TargetConfig`.

    Raises: TypeError or ValueError if a field has a value of a wrong type, or a value that is not allowed.
    """

    placement: str = field(default="houlsby", metadata={"help": "One of houlsby, pfeiffer, after_ffn, parallel."})
    bottleneck_dim: Optional[int] = field(default=None, metadata={"help": "The width of the bottleneck."})
    reduction_factor: float = field(default=16.0, metadata={"help": "The width adapted over the bottleneck's."})
    activation: str = field(default="gelu", metadata={"help": "One of gelu, gelu_tanh, relu, silu."})
    scale: float = field(default=1.0, metadata={"help": "What the adapter's output is multiplied by."})
    adapter_bias: bool = field(default=True, metadata={"help": "Whether both projections have a bias."})
    init_weights: str = field(default="normal", metadata={"help": "One of normal, bert, mam."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("BOTTLENECK")
        if self.placement not in _PLACEMENTS:
            self._fail("placement", self.placement, f"one of {_PLACEMENTS}")
        if self.bottleneck_dim is not None and self.bottleneck_dim < 1:
            self._fail("bottleneck_dim", self.bottleneck_dim, "at least 1")
        self.adapter(1, "meta")  # BottleneckAdapter raises errors for wrong values of fields

    def adapter(self, features: int, device: Any) -> BottleneckAdapter:
        """Returns a new bottleneck adapter whose input and output both have ``features`` features."""
        return BottleneckAdapter(
            features, self.bottleneck_dim, reduction_factor=self.reduction_factor, activation=self.activation,
            scale=self.scale, bias=self.adapter_bias, init=self.init_weights, device=device,
        )  # fmt: skip


class BottleneckLayer(Wrapper):
    """Applies the active adapters, in turn, to the output of ``base_layer``, and adds the outputs of parallel adapters.
    Under "pfeiffer", an adapter of a LayerNorm changes the LayerNorm's input, as the module's docstring shows for
    "around".

    In an adapter's file the keys of an adapter's tensors are ``bottleneck_adapters.{down,up}.{weight,bias}`` after the
    layer's name. If the base layer returns a tuple, the first item is adapted. A bottleneck adapter is not linear, and
    so can't be merged.
    """

    adapter_layer_names = ("bottleneck_adapters",)
    other_param_names = ("bottleneck_place",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_adapters = nn.ModuleDict()
        self.bottleneck_place: dict[str, str] = {}  # maps an adapter's name to "after", "parallel" or "around"
        self.merged_adapters: list[str] = []
        self._active_adapter = []
        # If base_layer is a whole block, transformers records the block's output by a forward hook, and checkpoints the
        # call of the block. The adapters of a block therefore run in a forward hook, before all other hooks of the
        # block: then both the recorded output and the checkpointed call contain the adapters.
        self._hook = None
        # torch.compile can't trace code that reads the handle of a hook, so the forward reads _adapts_by_hook instead.
        self._adapts_by_hook = isinstance(base_layer, GradientCheckpointingLayer)
        if self._adapts_by_hook:
            self._hook = base_layer.register_forward_hook(self._adapt_block, prepend=True, with_kwargs=True)

    def update_layer(self, adapter_name: str, features: int, config: BottleneckConfig) -> None:
        base = self.get_base_layer()
        weight = next(base.parameters())
        adapter = config.adapter(features, weight.device)
        self.bottleneck_adapters[adapter_name] = adapter.to(weight.dtype if weight.dtype in FLOATS else None)
        around = config.placement == "pfeiffer" and isinstance(base, nn.LayerNorm)
        self.bottleneck_place[adapter_name] = (
            "parallel" if config.placement == "parallel" else "around" if around else "after"
        )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def active(self) -> list[str]:
        """Returns the names of the active adapters that this layer holds."""
        return [name for name in self.active_adapters if name in self.bottleneck_adapters]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._adapts_by_hook or self._disable_adapters:
            return self.base_layer(*args, **kwargs)
        around = [name for name in self.active() if self.bottleneck_place[name] == "around"]
        if around:
            args, kwargs = (self._before_norm(around, *args, **kwargs),), {}
        return self._adapted(args, kwargs, self.base_layer(*args, **kwargs))

    def _before_norm(self, names: list[str], x: Tensor) -> Tensor:
        """Returns the new input of ``base_layer``, a LayerNorm: ``x + s · Up(act(Down(base(x))))``, for each adapter in
        turn."""
        for name in names:
            x = self.bottleneck_adapters[name](self.base_layer(x).to(x.dtype), x)
        return x

    def _adapted(self, args: tuple, kwargs: dict[str, Any], found: Any) -> Any:
        """Returns ``found``, the output of ``base_layer`` for the arguments, with the active "after" and "parallel"
        adapters applied."""
        y = found[0] if isinstance(found, tuple) else found
        for name in self.active():
            adapter, place = self.bottleneck_adapters[name], self.bottleneck_place[name]
            if place == "parallel":
                x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                y = adapter(x.to(y.dtype), y)
            elif place == "after":
                y = adapter(y)
        return (y, *found[1:]) if isinstance(found, tuple) else y

    def _adapt_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], found: Any) -> Any:
        return found if self._disable_adapters else self._adapted(args, kwargs, found)

    def remove_hook(self) -> None:
        """Removes the adapters' hook from ``base_layer``, so that ``base_layer`` can be used without this wrapper."""
        if self._hook is not None:
            self._hook.remove()

    def stock_reason(self) -> Optional[str]:
        """Returns why the adapters' next call runs plain PyTorch (:func:`peft_ext.explain` reports this reason), or
        None if the adapters' next call is fused."""
        if self._disable_adapters:
            return "adapters are disabled"
        weights = [self.bottleneck_adapters[name].down.weight for name in self.active()]
        if not weights:
            return "no active adapter on this layer"
        for weight in weights:
            if weight.dtype not in DTYPES:
                return f"its adapter is {short(weight.dtype)}, wanted float32, bfloat16 or float16"
        return kernel_reason("bottleneck_adapter", weights[0].device.type)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        raise ValueError(_UNMERGEABLE)

    def unmerge(self) -> None:
        """Does nothing, because a bottleneck adapter is never merged."""


# Fields of a transformers config that hold the number of features that a sublayer returns.
_WIDTHS = ("hidden_size", "n_embd", "d_model")

_UNMERGEABLE = "a bottleneck adapter is not linear and can't be merged into the base layer; unload() removes it"


class BottleneckModel(Tuner):
    """A model with bottleneck adapters, made by ``peft.get_peft_model``; see :class:`peft_ext.BottleneckConfig`.

    Raises: ValueError if the placement has no default for the model type, if a target has no parameters or an unknown
    width, if a target is in another target or in or around a module that an earlier adapter adapts, if a target of
    "parallel" has different numbers of input and output features, or if adapters are to be merged.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: Any) -> BottleneckConfig:
        if peft_config.target_modules is not None:
            return peft_config
        kind, placement = model_config.get("model_type"), peft_config.placement
        places = _places(model_config)
        if places is _NORMED and placement == "pfeiffer":
            raise ValueError(
                f"BottleneckConfig: placement 'pfeiffer' is not defined for model type {kind!r}, which has a norm "
                "between the feed-forward and its residual sum; use placement 'after_ffn', or give target_modules"
            )
        chosen: tuple[Optional[str], ...] = (None,)
        if places is not None:
            chosen = {
                "houlsby": (places.attention, places.output), "pfeiffer": (places.summed,),
                "after_ffn": (places.output,), "parallel": (places.feed_forward,),
            }[placement]  # fmt: skip
        if None in chosen:
            raise ValueError(
                f"BottleneckConfig: placement {placement!r} has no default for model type {kind!r}; give target_modules"
            )
        peft_config.target_modules = rf"(?:.*\.)?(?:{'|'.join(chosen)})"
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        # The names of an adapter's tensors, and unload(), work only if no adapted layer is inside of another one.
        names = {
            name.replace(".base_layer", "") for name, _ in model.named_modules() if ".bottleneck_adapters" not in name
        }
        adapted = {name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
        chosen = expand_all_linear(model, peft_config.target_modules, peft_config)
        config = dataclasses.replace(peft_config, target_modules=chosen)
        targets = {name for name in names if name and self._check_target_module_exists(config, name)}
        for inner in sorted(targets | adapted):
            outer = next((name for name in containers(inner) if name != inner and name in targets | adapted), None)
            if outer is not None and targets & {inner, outer}:
                raise ValueError(
                    f"BottleneckConfig: {inner} is in {outer}, wanted no adapter within another adapter's module; give "
                    "target_modules"
                )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, BottleneckLayer):
            child.remove_hook()
        super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        raise ValueError(_UNMERGEABLE)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        found = super()._check_target_module_exists(peft_config, key)
        return found and in_layers(peft_config, key)  # for a regex, PEFT's own check ignores layers_to_transform

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

    def _features(self, target: nn.Module, key: str, config: BottleneckConfig) -> int:
        """Returns the number of the target's output features, which is the width of the adapter's input and output."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if next(base.parameters(), None) is None:
            raise ValueError(f"BottleneckConfig: {key} is a {type(base).__name__} without parameters; target another")
        # Conv1D (GPT-2) has nf and no out_features.
        width = getattr(base, "out_features", None) or getattr(base, "nf", None)
        if width is None and isinstance(base, nn.LayerNorm) and len(base.normalized_shape) == 1:
            width = base.normalized_shape[0]
        if width is None:
            model_config = self.get_model_config(self.model)
            width = next((model_config[name] for name in _WIDTHS if isinstance(model_config.get(name), int)), None)
        if width is None:
            raise ValueError(
                f"BottleneckConfig: {key} is a {type(base).__name__} of unknown width, wanted a linear layer"
            )
        if config.placement == "parallel" and getattr(base, "in_features", width) != width:
            raise ValueError(
                f"BottleneckConfig: {key} takes {base.in_features} features and gives {width}, wanted equal numbers "
                "for placement 'parallel'"
            )
        return width


register("bottleneck", BottleneckConfig, BottleneckModel)
