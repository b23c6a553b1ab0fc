"""Diff Pruning learns a sparse difference to the pretrained parameters. PEFT saves the difference, not the parameters.

    θ = θ₀ + (z_g·z)∘w                                  z, w: shaped like θ₀;  z_g: one gate for the whole tensor
    z = clamp(s·(r − l) + l, 0, 1)                      l = −1.5, r = 1.5
    s = σ(log u − log(1 − u) + α),  u ~ U(1e-4, 1 − 1e-4)
    loss + λ·Σ σ(α − log(−l/r))                         the sum is over the gates z and z_g of every tensor

Pruning keeps a given fraction of the entries of the difference z_g·z∘w: the entries with the largest magnitude.
Training continues with the kept entries; all other entries of the difference stay zero.

Source: Diff Pruning, arXiv 2012.07463, and the code of its authors. The penalty is the sum of σ(α − log(−l/r)) over all
gates, as in the authors' code; the paper's penalty is a sum of products σ(α − …)·σ(α_g − …). The gates are the hard
concrete gates of arXiv 1712.01312.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .._imports import required
from .layer import ReplacingLayer, ReplacingTuner, tree
from .register import peft_type, register
from .targets import Plan, TargetConfig, own_units, plan

with required("peft", "peft_ext.tuners"):
    from peft import PeftConfig

__all__ = ["DenseDiff", "DiffPruningConfig", "DiffPruningLayer", "DiffPruningModel", "SparseDiff"]

U_MIN = 1e-4

_PEFT = "base_model.model."
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.diff_pruning_tensors\.(.+)\.values")


@dataclass
class DiffPruningConfig(TargetConfig):
    """Diff Pruning: learns a difference to the parameters of the targets.

    The difference becomes sparse by :meth:`peft_ext.tuners.DiffPruningModel.prune`.

    Args:
        structured: whether each tensor has one more gate z_g, which opens or closes the difference of the whole tensor.
        sparsity_penalty: λ, the weight of the expected number of open gates in the loss.
        alpha_init: initial value of the parameter α of every gate.
        stretch_low, stretch_high: l < 0 and r > 1; a gate is stretched to the interval [l, r] before it is clamped to
            [0, 1].
        kept: number of entries that pruning kept, by full name of the tensor ("model.layers.0.mlp.up_proj.weight").
            Pruning sets ``kept``, and loading allocates as many entries as ``kept`` says.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: see
            :class:`~peft_ext.tuners.targets.TargetConfig`. By default the parameters of every module are targets,
            except the own parameters of a module with a list of layers below it. A classification head belongs in
            modules_to_save, where task_type="SEQ_CLS" puts the head.

    Raises: TypeError or ValueError if a field has a value of a wrong type, or a value that is not allowed.
    """

    structured: bool = field(default=True, metadata={"help": "One more gate for each tensor."})
    sparsity_penalty: float = field(default=1.25e-7, metadata={"help": "The weight of the penalty on open gates."})
    alpha_init: float = field(default=5.0, metadata={"help": "alpha of every gate at the start."})
    stretch_low: float = field(default=-1.5, metadata={"help": "l: what a gate of 0 is stretched to."})
    stretch_high: float = field(default=1.5, metadata={"help": "r: what a gate of 1 is stretched to."})
    kept: Optional[dict[str, int]] = field(
        default=None, metadata={"help": "How many entries of each tensor pruning kept; set by pruning."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("DIFF_PRUNING")
        if not self.sparsity_penalty >= 0:
            self._fail("sparsity_penalty", self.sparsity_penalty, "0 or more")
        if not self.stretch_low < 0:
            self._fail("stretch_low", self.stretch_low, "less than 0")
        if not self.stretch_high > 1:
            self._fail("stretch_high", self.stretch_high, "more than 1")


class DenseDiff(nn.Module):
    """The difference ``(z_g·z)∘w`` of one tensor before pruning, with the gates z of its elements and the gate z_g of
    the whole tensor.

    ``w`` and ``alpha`` have the tensor's shape. ``group``, the α of z_g, is 0-d, or None if ``structured`` is
    False. w starts as 0, so that the difference starts as 0.
    """

    def __init__(self, tensor: Tensor, config: DiffPruningConfig) -> None:
        super().__init__()
        self.stretch = (config.stretch_low, config.stretch_high)
        like = tensor.detach()
        self.w = nn.Parameter(torch.zeros_like(like))
        self.alpha = nn.Parameter(torch.full_like(like, config.alpha_init))
        self.group = nn.Parameter(like.new_full((), config.alpha_init)) if config.structured else None

    def gate(self, alpha: Tensor, sample: bool) -> Tensor:
        """Returns the gate z for ``alpha``, in float32 or wider. If ``sample`` is False, u is ½ instead of a random
        number, so that s is σ(α)."""
        low, high = self.stretch
        alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
        if sample:
            u = torch.empty_like(alpha, requires_grad=False).uniform_(U_MIN, 1 - U_MIN)
            alpha = u.log() - (1 - u).log() + alpha
        return (torch.sigmoid(alpha) * (high - low) + low).clamp(0, 1)

    def difference(self, sample: bool) -> Tensor:
        """Returns the difference ``(z_g·z)∘w`` in float32 or wider."""
        z = self.gate(self.alpha, sample)
        if self.group is not None:
            z = self.gate(self.group, sample) * z
        return z * self.w

    def alphas(self) -> list[nn.Parameter]:
        """Returns the parameters α of all gates of this tensor."""
        return [self.alpha] if self.group is None else [self.alpha, self.group]

    def open_gates(self) -> Tensor:
        """Returns ``Σ σ(α − log(−l/r))``, the expected number of gates above 0; 0-d, float32 or wider."""
        low, high = self.stretch
        wide = torch.promote_types(self.alpha.dtype, torch.float32)
        return sum(torch.sigmoid(alpha.to(wide) - math.log(-low / high)).sum() for alpha in self.alphas())

    def parameters_of(self, tensor: Tensor, sample: bool) -> Tensor:
        """Returns the changed tensor, θ = θ₀ + difference with θ₀ in ``tensor``. The sum θ₀ + difference is computed in
        float32 or wider and rounded once to θ₀'s dtype."""
        return (tensor + self.difference(sample)).to(tensor.dtype)


class SparseDiff(nn.Module):
    """The entries of one tensor's difference that pruning kept.

    ``indices`` are ascending indices into the flat tensor: int32 ``[kept]``, or int64 for a tensor of 2³¹ elements or
    more. ``values`` holds the kept entries of the difference, which are trained: floating-point ``[kept]``.
    """

    def __init__(self, indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.values = nn.Parameter(values)

    @classmethod
    def allocate(cls, tensor: Tensor, kept: int) -> SparseDiff:
        """Returns a SparseDiff with ``kept`` entries of value 0, to be filled from a state dict."""
        indices = torch.arange(kept, dtype=_index_dtype(tensor), device=tensor.device)
        return cls(indices, torch.zeros(kept, dtype=tensor.dtype, device=tensor.device))

    def parameters_of(self, tensor: Tensor, sample: bool) -> Tensor:
        """Returns the changed tensor, θ = θ₀ + difference with θ₀ in ``tensor``. An entry of θ that pruning did not
        keep has the bits of θ₀."""
        flat, index = tensor.detach().reshape(-1), self.indices.long()
        wide = torch.promote_types(torch.promote_types(flat.dtype, self.values.dtype), torch.float32)
        moved = (flat[index].to(wide) + self.values.to(wide)).to(flat.dtype)
        return flat.index_put((index,), moved).view_as(tensor)


def _index_dtype(tensor: Tensor) -> torch.dtype:
    return torch.int32 if tensor.numel() < 2**31 else torch.int64


class DiffPruningLayer(ReplacingLayer):
    """Runs ``base_layer`` with the active adapter's difference added to the layer's parameters.

    In training each forward draws the gates' random numbers u from torch's default generator, so that a recomputation
    under activation checkpointing draws the same u. If modules share a tensor, each module draws its own u. In eval
    mode, for merging and for pruning, u is ½: z = clamp(σ(α)·(r − l) + l, 0, 1). The keys in the state dict are
    ``diff_pruning_tensors.<name in the module>`` followed by ``w``, ``alpha`` and ``group``, or after pruning by
    ``indices`` and ``values``.
    """

    adapter_layer_names = ("diff_pruning_tensors",)

    def own(self, adapter: str, training: bool, x: Optional[Tensor] = None) -> dict[str, Tensor]:
        return {name: diff.parameters_of(self.base_tensor(name), training) for name, diff in self.diffs(adapter)}

    def diffs(self, adapter: str) -> Iterator[tuple[str, Union[DenseDiff, SparseDiff]]]:
        """Yields the name in the base module and the difference of each tensor that ``adapter`` owns in this layer."""
        for name, module in self.adapters[adapter].named_modules():
            if isinstance(module, (DenseDiff, SparseDiff)):
                yield name, module


class DiffPruningModel(ReplacingTuner):
    """A model with a learned difference to its parameters, see :class:`peft_ext.DiffPruningConfig`.

    ``peft.get_peft_model`` makes the model; the methods of DiffPruningModel can also be called on the PeftModel. In
    training the penalty is added to the ``loss`` in the model's output, and so reaches transformers' Trainer. If
    Trainer passes the number of labels in an optimizer step of several batches, each batch adds the penalty in
    proportion to its labels. If the loss is computed outside of the model, as under label smoothing, add
    :meth:`penalty` to that loss. Until pruning, w and α each have the size of the tensor that they change; gradients
    and optimizer state of w and α need memory too. The gates need a larger learning rate than w, see
    :meth:`parameter_groups`.

    Raises: ValueError if no parameter is a target, if ``kept`` names a tensor that is no target, if a target is
    quantized or a shard, or if a shared tensor belongs both to a target and to a module that is not a target.
    """

    prefix = "diff_pruning_"
    tuner_layer_cls = DiffPruningLayer

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        # The hook that adds the penalty to the loss is on the base model, because every call of the PeftModel reaches
        # the base model. (A PeftModel without a task type does not call the tuner's forward.)
        self._penalty_hook = self.model.register_forward_hook(self._add_penalty, with_kwargs=True)

    def make_plan(self, config: DiffPruningConfig, model: nn.Module) -> Plan:
        units = own_units(model, config)
        if not units:
            raise ValueError(
                f"DiffPruningConfig: no parameters among the targets in {type(model).__name__} with "
                f"target_modules={config.target_modules}, layers_to_transform={config.layers_to_transform}"
            )
        made = plan(model, config, units)
        owned = {f"{unit}.{name}" for unit, names in made.units.items() for name in names}
        if unknown := sorted(set(config.kept or ()) - owned):
            raise ValueError(f"DiffPruningConfig: kept names {unknown[0]}, which is no tensor among the targets")
        return made

    def make(self, layer: DiffPruningLayer, key: str, names: list[str], config: DiffPruningConfig) -> nn.Module:
        return _allocate(layer, key, names, config)

    # --- the penalty --------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """Returns the penalty ``λ·Σ σ(α − log(−l/r))`` over the gates of the adapter in use, 0-d. The penalty is 0 if
        the adapter is pruned, merged or disabled."""
        total = torch.zeros((), device=next(self.model.parameters()).device)
        for _, layer in self.layers():
            if (adapter := layer.running()) is not None:
                weight = self.peft_config[adapter].sparsity_penalty
                for _, diff in layer.diffs(adapter):
                    if isinstance(diff, DenseDiff):
                        total = total + weight * diff.open_gates().to(total.device)
        return total

    def _add_penalty(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not module.training or not torch.is_grad_enabled():
            return output
        # With return_dict=False the output is a tuple whose first item is the loss, if the output has a loss.
        first = isinstance(output, tuple) and not hasattr(output, "loss")
        if isinstance(output, Mapping):
            loss = output.get("loss")
        else:
            loss = output[0] if first and output else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or (first and loss.dim() > 0):
            return output
        penalty = self.penalty()
        if not penalty.requires_grad:
            return output
        loss = loss + (penalty * _share(module, kwargs)).to(loss.device)
        if first:
            return (loss, *output[1:])
        if isinstance(output, Mapping):
            output["loss"] = loss
        else:
            output.loss = loss
        return output

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        self._penalty_hook.remove()  # removed last, because the adapter stays in use if the merge raises an error
        return unloaded

    # --- optimizing and pruning ---------------------------------------------------------------------------------------

    def parameter_groups(self, lr: float, gate_lr: float = 0.1, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Returns two parameter groups for a torch optimizer: the gates' α, and all other trained parameters.

        The group of α has the learning rate ``gate_lr`` and no weight decay. A gate closes if its α falls from the
        initial value (by default 5) to below 0. At a usual learning rate Adam needs some hundred thousand steps to
        close a gate; the authors use the rate 0.1 for α.
        """
        gates = {id(alpha) for _, diff in self._diffs() if isinstance(diff, DenseDiff) for alpha in diff.alphas()}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in trained if id(p) not in gates], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) in gates], "lr": gate_lr, "weight_decay": 0.0},
        ]

    def _diffs(self, adapter: Optional[str] = None) -> Iterator[tuple[str, Union[DenseDiff, SparseDiff]]]:
        """Yields the full name and the difference of each tensor of ``adapter``, or of all adapters if ``adapter`` is
        None."""
        for key, layer in self.layers():
            for held in layer.adapters if adapter is None else layer.held([adapter]):
                for name, diff in layer.diffs(held):
                    yield f"{key}.{name}", diff

    @torch.no_grad()
    def prune(
        self,
        target: float = 0.005,
        adapter_name: Optional[str] = None,
        optimizer: Optional[torch.optim.Optimizer] = None,
    ) -> dict[str, int]:
        """Keeps the entries of the difference ``z_g·z∘w`` with the largest magnitude over all tensors, and trains only
        these entries.

        Args:
            target: fraction of the adapter's entries to keep. Entries of the difference that are 0 are not kept.
            adapter_name: name of the adapter; default the active adapter.
            optimizer: an optimizer that trains the adapter. In the optimizer's groups the kept values replace w, and
                the gates are removed, as is the optimizer state of w and of the gates. The optimizer's other
                parameters and its learning rates stay. Without ``optimizer``, make a new optimizer after pruning,
                because w and the gates are no longer parameters.

        Returns: the number of kept entries, by full name of the tensor, as in the field ``kept`` of the configuration.

        Raises: ValueError if target is not in (0, 1] or keeps less than one entry; if the adapter does not exist, is
        pruned already or is merged; if every entry is 0 (nothing was trained); or if the optimizer does not train the
        adapter's parameters.
        """
        adapter = self._one(adapter_name)
        if not 0 < target <= 1:
            raise ValueError(f"prune: target is {target}, wanted a fraction in (0, 1]")
        if self.peft_config[adapter].kept is not None:
            raise ValueError(f"prune: the adapter {adapter!r} is pruned already")
        if merged := [key for key, layer in self.layers() if adapter in layer.merged_adapters]:
            raise ValueError(f"prune: the adapter {adapter!r} is merged into {merged[0]}, unmerge it first")
        dense = dict(self._diffs(adapter))
        limit = int(target * sum(diff.w.numel() for diff in dense.values()))
        if limit < 1:
            raise ValueError(f"prune: target is {target}, which keeps no entry of the adapter, wanted a larger target")
        if optimizer is not None:
            _check_trains(optimizer, dense)
        chosen = _largest(dense, limit)
        if not chosen:
            raise ValueError(f"prune: the adapter {adapter!r} is 0 everywhere, train it first")

        sparse: dict[str, SparseDiff] = {}
        for name, (indices, values) in chosen.items():
            w = dense[name].w
            sparse[name] = SparseDiff(indices.to(_index_dtype(w)), values.to(w.dtype)).requires_grad_(w.requires_grad)
        self._put(adapter, sparse)
        if optimizer is not None:
            _exchange(optimizer, {diff: sparse.get(name) for name, diff in dense.items()})
        kept = {name: diff.values.numel() for name, diff in sparse.items()}
        # The configuration is replaced, not changed, so that the user's own configuration object still describes an
        # adapter before pruning.
        self.peft_config[adapter] = dataclasses.replace(self.peft_config[adapter], kept=kept)
        return dict(kept)

    def _put(self, adapter: str, diffs: dict[str, nn.Module]) -> None:
        for key, layer in self.layers():
            if adapter in layer.adapters:
                here = {
                    name.removeprefix(f"{key}."): diff for name, diff in diffs.items() if name.startswith(f"{key}.")
                }
                layer.adapters[adapter] = tree(here)

    def _one(self, adapter_name: Optional[str]) -> str:
        names = self.active_adapters if adapter_name is None else [adapter_name]
        if len(names) != 1 or names[0] not in self.peft_config:
            raise ValueError(f"prune: adapter_name is {adapter_name!r}, wanted one of {list(self.peft_config)}")
        return names[0]

    # --- the state dict -----------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # The checkpoint may hold the adapter from before or from after pruning. The adapter in the model becomes pruned
        # or not pruned, like the adapter in the checkpoint.
        kept = _kept_in(state_dict)
        if kept != config.kept:
            config = model.peft_config[adapter_name] = dataclasses.replace(config, kept=kept)
            layers = [layer for layer in model.modules() if isinstance(layer, DiffPruningLayer)]
            old = [layer.adapters[adapter_name] for layer in layers if adapter_name in layer.adapters]
            held = [parameter for tensors in old for parameter in tensors.parameters()]
            trained = any(parameter.requires_grad for parameter in held)
            # The adapter's new tensors get the dtype of its old tensors if all old tensors have the same dtype.
            dtypes = {parameter.dtype for parameter in held}
            for key, layer in model.named_modules():
                if isinstance(layer, DiffPruningLayer) and adapter_name in layer.adapters:
                    new = _allocate(layer, key.removeprefix(_PEFT), layer.names[adapter_name], config)
                    new = new.to(*dtypes) if len(dtypes) == 1 else new
                    layer.adapters[adapter_name] = new.requires_grad_(trained)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _allocate(layer: DiffPruningLayer, key: str, names: list[str], config: DiffPruningConfig) -> nn.Module:
    if config.kept is None:
        return tree({name: DenseDiff(layer.base_tensor(name), config) for name in names})
    kept = {name: config.kept.get(f"{key}.{name}", 0) for name in names}
    return tree({name: SparseDiff.allocate(layer.base_tensor(name), n) for name, n in kept.items() if n})


def _kept_in(state_dict: dict[str, Tensor]) -> Optional[dict[str, int]]:
    """Returns ``DiffPruningConfig.kept`` of the adapter in the checkpoint ``state_dict``; None if the adapter is not
    pruned."""
    found = ((_KEY.fullmatch(key), tensor) for key, tensor in state_dict.items())
    return {f"{key[1]}.{key[2]}": tensor.numel() for key, tensor in found if key is not None} or None


def _largest(dense: dict[str, DenseDiff], limit: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the entries of largest magnitude of all tensors, at most ``limit`` and no zeros, as a dict from a
    tensor's name to the sorted indices and the values of its entries."""
    device = next(iter(dense.values())).w.device
    largest, places = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.long, device=device)
    starts, start = {}, 0
    for name, diff in dense.items():
        magnitudes = diff.difference(sample=False).abs().flatten()
        found, indices = magnitudes.topk(min(limit, magnitudes.numel()))
        largest, places = torch.cat([largest, found.to(device)]), torch.cat([places, indices.to(device) + start])
        if largest.numel() > limit:
            largest, best = largest.topk(limit)
            places = places[best]
        starts[name], start = start, start + magnitudes.numel()
    places = places[largest > 0].sort().values
    chosen = {}
    for name, diff in dense.items():
        indices = places[(places >= starts[name]) & (places < starts[name] + diff.w.numel())] - starts[name]
        if indices.numel():
            indices = indices.to(diff.w.device)
            chosen[name] = (indices, diff.difference(sample=False).flatten()[indices])
    return chosen


def _check_trains(optimizer: torch.optim.Optimizer, dense: dict[str, DenseDiff]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, diff in dense.items():
        if id(diff.w) not in held:
            raise ValueError(f"prune: the optimizer does not train {name}, wanted an optimizer of the adapter")


def _exchange(optimizer: torch.optim.Optimizer, diffs: dict[DenseDiff, Optional[SparseDiff]]) -> None:
    """In ``optimizer``, replaces each w by its kept values, or removes w if nothing is kept, and removes the α of the
    gates."""
    heirs: dict[nn.Parameter, Optional[nn.Parameter]] = {}
    for dense, sparse in diffs.items():
        heirs[dense.w] = None if sparse is None else sparse.values
        heirs.update(dict.fromkeys(dense.alphas()))
    for group in optimizer.param_groups:
        group["params"] = [heirs.get(p, p) for p in group["params"] if heirs.get(p, p) is not None]
    for parameter in heirs:
        optimizer.state.pop(parameter, None)


def _share(module: nn.Module, kwargs: dict[str, Any]) -> Union[Tensor, float]:
    """Returns the batch's share of the labels of an optimizer step, or 1 if Trainer passes no number of labels."""
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    decoder = not getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    if decoder and "CausalLM" in str(getattr(module, "loss_type", "")):
        labels = labels[..., 1:]  # Trainer does not count a row's first label, which a causal LM does not predict
    counted = kwargs.get("shift_labels")
    counted = labels if counted is None else counted
    return counted.ne(-100).sum() / torch.as_tensor(total, device=counted.device).reshape(-1)[0]


register("diff_pruning", DiffPruningConfig, DiffPruningModel)
