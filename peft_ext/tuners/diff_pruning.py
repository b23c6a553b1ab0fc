"""Diff Pruning: a sparse difference to the pretrained parameters is learned, and the difference alone is saved.

    θ = θ₀ + (z_g·z)∘w                                  z, w: like θ₀;  z_g: one gate of the whole tensor
    z = clamp(s·(r − l) + l, 0, 1)                      l = −1.5, r = 1.5
    s = σ(log u − log(1 − u) + α),  u ~ U(1e-4, 1 − 1e-4)
    loss + λ·Σ σ(α − log(−l/r))                         over the gates of every tensor, z_g's too

Then the largest entries of z_g·z∘w are kept, so many as asked for, and go on being trained; the rest is zero for good.

Source: Diff Pruning, arXiv 2012.07463, and its authors' code, from which the sum in the penalty is (the paper has
σ(α − …)·σ(α_g − …)); the gates are the hard concrete ones of arXiv 1712.01312.
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
    """Diff Pruning: learn a difference to the parameters of the targets, sparse after
    :meth:`peft_ext.tuners.DiffPruningModel.prune`.

    Args:
        structured: one more gate for each tensor, which opens and closes it as a whole.
        sparsity_penalty: λ, the weight of the expected number of open gates in the loss.
        alpha_init: α of every gate at the start.
        stretch_low, stretch_high: l < 0 and r > 1, what a gate is stretched to before it is clamped.
        kept: by tensor ("model.layers.0.mlp.up_proj.weight"), how many entries pruning kept. Set by pruning; loading
            allocates them from it.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: see
            :class:`~peft_ext.tuners.targets.TargetConfig`. The default is every parameter; a classification head is in
            modules_to_save (task_type="SEQ_CLS" puts it there).

    Raises: TypeError or ValueError where a field is not of these forms.
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
    """``(z_g·z)∘w`` of one tensor, before it is pruned.

    ``w`` and ``alpha`` are like the tensor, ``group`` is 0-d, or absent where gates are not structured. At first w is 0
    and the difference with it.
    """

    def __init__(self, tensor: Tensor, config: DiffPruningConfig) -> None:
        super().__init__()
        self.stretch = (config.stretch_low, config.stretch_high)
        like = tensor.detach()
        self.w = nn.Parameter(torch.zeros_like(like))
        self.alpha = nn.Parameter(torch.full_like(like, config.alpha_init))
        self.group = nn.Parameter(like.new_full((), config.alpha_init)) if config.structured else None

    def gate(self, alpha: Tensor, sample: bool) -> Tensor:
        """z of ``alpha``, in float32 or more; not sampled it is that of u = ½, whose logarithms cancel: s = σ(α)."""
        low, high = self.stretch
        alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
        if sample:
            u = torch.empty_like(alpha, requires_grad=False).uniform_(U_MIN, 1 - U_MIN)
            alpha = u.log() - (1 - u).log() + alpha
        return (torch.sigmoid(alpha) * (high - low) + low).clamp(0, 1)

    def difference(self, sample: bool) -> Tensor:
        """Returns ``(z_g·z)∘w``, in float32 or more."""
        z = self.gate(self.alpha, sample)
        if self.group is not None:
            z = self.gate(self.group, sample) * z
        return z * self.w

    def alphas(self) -> list[nn.Parameter]:
        """Returns α of the gates."""
        return [self.alpha] if self.group is None else [self.alpha, self.group]

    def open_gates(self) -> Tensor:
        """Σ σ(α − log(−l/r)): the expected number of gates above 0. 0-d, float32 or more."""
        low, high = self.stretch
        wide = torch.promote_types(self.alpha.dtype, torch.float32)
        return sum(torch.sigmoid(alpha.to(wide) - math.log(-low / high)).sum() for alpha in self.alphas())

    def parameters_of(self, tensor: Tensor, sample: bool) -> Tensor:
        """θ, summed in float32 or more and rounded to θ₀'s dtype once."""
        return (tensor + self.difference(sample)).to(tensor.dtype)


class SparseDiff(nn.Module):
    """The entries of one tensor's difference that pruning kept.

    ``indices``: int32 ``[kept]``, ascending, into the flat tensor (int64 where that has 2³¹ elements or more);
    ``values``: float ``[kept]``, trained.
    """

    def __init__(self, indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.values = nn.Parameter(values)

    @classmethod
    def allocate(cls, tensor: Tensor, kept: int) -> SparseDiff:
        """Returns room for ``kept`` entries of ``tensor``, all 0."""
        indices = torch.arange(kept, dtype=_index_dtype(tensor), device=tensor.device)
        return cls(indices, torch.zeros(kept, dtype=tensor.dtype, device=tensor.device))

    def parameters_of(self, tensor: Tensor, sample: bool) -> Tensor:
        """θ: the entries that are not kept have θ₀'s bits."""
        flat, index = tensor.detach().reshape(-1), self.indices.long()
        wide = torch.promote_types(torch.promote_types(flat.dtype, self.values.dtype), torch.float32)
        moved = (flat[index].to(wide) + self.values.to(wide)).to(flat.dtype)
        return flat.index_put((index,), moved).view_as(tensor)


def _index_dtype(tensor: Tensor) -> torch.dtype:
    return torch.int32 if tensor.numel() < 2**31 else torch.int64


class DiffPruningLayer(ReplacingLayer):
    """``base_layer`` with the active adapter's difference added to its parameters.

    While training each forward draws its u from torch's default generator, so that recomputation under checkpointing
    draws it again; a tensor that modules share is drawn once in each. In eval mode, and for merging and pruning, u is
    ½: z = clamp(σ(α)·(r − l) + l, 0, 1). In the state dict: ``diff_pruning_tensors.<name in the module>``, and below
    it ``w``, ``alpha`` and ``group``, or ``indices`` and ``values`` once pruned.
    """

    adapter_layer_names = ("diff_pruning_tensors",)

    def own(self, adapter: str, training: bool, x: Optional[Tensor] = None) -> dict[str, Tensor]:
        return {name: diff.parameters_of(self.base_tensor(name), training) for name, diff in self.diffs(adapter)}

    def diffs(self, adapter: str) -> Iterator[tuple[str, Union[DenseDiff, SparseDiff]]]:
        """Yields name in the base module, and difference, of the tensors that ``adapter`` owns here."""
        for name, module in self.adapters[adapter].named_modules():
            if isinstance(module, (DenseDiff, SparseDiff)):
                yield name, module


class DiffPruningModel(ReplacingTuner):
    """A model with a learned difference to its parameters, see :class:`peft_ext.DiffPruningConfig`.

    ``peft.get_peft_model`` makes it; its methods are reached through the PeftModel too. While the model trains, the
    penalty is added to the ``loss`` of what it returns, and so reaches transformers' Trainer; where Trainer says how
    many labels a step of several batches has, each batch adds its share. It is not added where the loss is computed
    outside of the model, as under label smoothing: add :meth:`penalty` there. Until it is pruned w and α are each as
    large as what they belong to, with gradients and optimizer state on top. The gates want a larger learning rate:
    :meth:`parameter_groups`.

    Raises: ValueError where a target is quantized, or where a shared tensor is a target in one place alone.
    """

    prefix = "diff_pruning_"
    tuner_layer_cls = DiffPruningLayer

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        # On the base model, which is what every way in ends up calling: a PeftModel without a task passes this by.
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
        """``λ·Σ σ(α − log(−l/r))`` over the gates of the adapter in effect, 0-d; 0 where it is pruned or disabled."""
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
        # Of return_dict=False: the loss comes first, if there is one.
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
        self._penalty_hook.remove()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    # --- optimizing and pruning ---------------------------------------------------------------------------------------

    def parameter_groups(self, lr: float, gate_lr: float = 0.1, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """For a torch optimizer: all that is trained, and the gates' α apart, undecayed.

        α starts at 5 and has to fall below 0 for a gate to close, which takes an Adam at a usual learning rate some
        hundred thousand steps; the authors' own rate for α is 0.1.
        """
        gates = {id(alpha) for _, diff in self._diffs() if isinstance(diff, DenseDiff) for alpha in diff.alphas()}
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in trained if id(p) not in gates], "lr": lr, "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) in gates], "lr": gate_lr, "weight_decay": 0.0},
        ]

    def _diffs(self, adapter: Optional[str] = None) -> Iterator[tuple[str, Union[DenseDiff, SparseDiff]]]:
        """Yields full name of the tensor and difference, of one adapter or of all."""
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
        """Keep the entries of ``z_g·z∘w`` of the largest magnitude, over all tensors, and train them alone from now on.

        Args:
            target: the fraction of entries to keep, of all that the adapter targets; fewer where fewer are not 0.
            adapter_name: the active adapter by default.
            optimizer: one that trains the adapter; in its groups the kept values take w's place, gates leave, and the
                state of both is dropped. Without it a new optimizer is needed: w and the gates are no parameters any
                more. Its other parameters, and its learning rates, stay as they are.

        Returns: the new configuration's ``kept``, by full name of the tensor how many entries are kept.

        Raises: ValueError where target is not in (0, 1] or too small for one entry, where there is no such adapter,
        where it is pruned already or merged, where every entry is 0 (nothing was trained), or where the optimizer has
        none of the adapter's parameters.
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
            raise ValueError(f"prune: target is {target}, which leaves none of the adapter's entries")
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
        # A copy: the user's own configuration still describes a new adapter.
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
        # A checkpoint may be from before the pruning of this adapter, or after it: what is read decides what is held.
        kept = _kept_in(state_dict)
        if kept != config.kept:
            config = model.peft_config[adapter_name] = dataclasses.replace(config, kept=kept)
            layers = [layer for layer in model.modules() if isinstance(layer, DiffPruningLayer)]
            old = [layer.adapters[adapter_name] for layer in layers if adapter_name in layer.adapters]
            held = [parameter for tensors in old for parameter in tensors.parameters()]
            trained = any(parameter.requires_grad for parameter in held)
            dtypes = {parameter.dtype for parameter in held}  # float32 over a base in less: what is read keeps its bits
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
    """Returns ``DiffPruningConfig.kept`` of the adapter whose checkpoint this is; None where it is not pruned."""
    found = ((_KEY.fullmatch(key), tensor) for key, tensor in state_dict.items())
    return {f"{key[1]}.{key[2]}": tensor.numel() for key, tensor in found if key is not None} or None


def _largest(dense: dict[str, DenseDiff], limit: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns flat indices, ascending, and values of the ``limit`` largest magnitudes of all tensors, without zeros."""
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
            raise ValueError(f"prune: the optimizer does not train {name}, so it can't go on with what is kept of it")


def _exchange(optimizer: torch.optim.Optimizer, diffs: dict[DenseDiff, Optional[SparseDiff]]) -> None:
    """What is kept takes w's place in its group, or nothing does; gates leave."""
    heirs: dict[nn.Parameter, Optional[nn.Parameter]] = {}
    for dense, sparse in diffs.items():
        heirs[dense.w] = None if sparse is None else sparse.values
        heirs.update(dict.fromkeys(dense.alphas()))
    for group in optimizer.param_groups:
        group["params"] = [heirs.get(p, p) for p in group["params"] if heirs.get(p, p) is not None]
    for parameter in heirs:
        optimizer.state.pop(parameter, None)


def _share(module: nn.Module, kwargs: dict[str, Any]) -> Union[Tensor, float]:
    """Returns the part of an optimizer step's labels in this batch, where Trainer says how many there are; else 1."""
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    decoder = not getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    if decoder and "CausalLM" in str(getattr(module, "loss_type", "")):
        labels = labels[..., 1:]  # as Trainer counts them: the first one is never predicted
    counted = kwargs.get("shift_labels")
    counted = labels if counted is None else counted
    return counted.ne(-100).sum() / torch.as_tensor(total, device=counted.device).reshape(-1)[0]


register("diff_pruning", DiffPruningConfig, DiffPruningModel)
