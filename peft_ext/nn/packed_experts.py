"""A mixture's experts whose weights are packed in the layout of a checkpoint's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..weights.packed import PackedWeight
from .experts import FrozenExperts, experts_class
from .nf4 import keeping_bits


class PackedExperts(FrozenExperts):
    """A mixture's experts with frozen packed weights: a mixin for the experts' class in transformers.

    For each dense weight, a parameter of the same name holds the codes of all experts, and buffers hold the weight's
    other tensors. The state dict has the file's names, for example ``gate_up_proj_blocks`` and ``gate_up_proj_scales``.
    A cast of the module to another float dtype does not change codes and scales. PEFT's ``target_parameters`` adds
    adapters to the experts' parameters, and :func:`peft_ext.accelerate` fuses these adapters.
    """

    packed_names: dict[str, tuple[Optional[str], ...]]  # Maps a parameter's name to the names of its weight's tensors.
    extra: tuple[str, ...]  # Names of buffers with tensors of the file that no weight needs.
    compute_dtype: torch.dtype
    note = ""  # Says which step of the checkpoint's own experts is skipped, like HoldsPacked.note.
    _templates: dict[str, PackedWeight]

    def frozen(self, name: str) -> PackedWeight:
        return self.with_codes(name, self._parameters[name])

    def frozen_shapes(self) -> dict[str, torch.Size]:
        return {name: weight.shape for name, weight in self.__dict__.get("_templates", {}).items()}

    def set_packed(self, name: str, weight: PackedWeight, names: Sequence[Optional[str]]) -> None:
        """Sets the parameter ``name`` to a stacked packed weight, without a copy. ``names`` holds the names of the
        weight's tensors in the state dict, in the order of the weight's ``parts``."""
        names = (*names, *(None,) * (len(weight.parts) - len(names)))
        self.__dict__.setdefault("packed_names", {})[name] = names
        self.__dict__.setdefault("_templates", {})[name] = weight.map(lambda part: part.to("meta"))
        self._parameters[name] = nn.Parameter(weight.parts[0].detach(), requires_grad=False)
        for other, part in zip(names[1:], weight.parts[1:], strict=True):
            if other is not None:
                self.register_buffer(other, part.detach())

    def places(self) -> dict[str, str]:
        """Returns a dict that maps the file's names of the weights' tensors and of the extra tensors to the names of
        the module's attributes."""
        held = [name for names in self.packed_names.values() for name in names if name is not None]
        return {name: self._aliases().get(name, name) for name in (*held, *self.extra)}

    def with_codes(self, name: str, codes: Tensor) -> PackedWeight:
        """Returns the weight of the parameter ``name`` with ``codes`` as its codes. The weight's other tensors are the
        module's buffers."""
        others = self.packed_names[name][1:]
        return self._templates[name].replaced(
            [codes, *(None if other is None else self._buffers[other] for other in others)]
        )

    def _aliases(self) -> dict[str, str]:
        """Returns a dict from the name of codes in the file to the name of the parameter, for parameters whose codes
        have another name in the file."""
        held = self.__dict__.get("packed_names", {})
        return {names[0]: name for name, names in held.items() if names[0] != name}

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(self._aliases().get(name, name))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self._aliases().get(name, name), value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = [*(self._parameters[name] for name in self.packed_names)]
        held += [self._buffers[name] for names in self.packed_names.values() for name in names[1:] if name is not None]
        held += [self._buffers[name] for name in self.extra]
        return super()._apply(keeping_bits(fn, held), recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self._aliases().items():
            destination[prefix + name] = destination.pop(prefix + parameter)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing: list, unexpected: list,
        errors: list,
    ) -> None:  # fmt: skip
        back = {prefix + parameter: prefix + name for name, parameter in self._aliases().items()}
        found = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        for parameter, name in back.items():
            if name in found:
                found[parameter] = found.pop(name)
        held = [name for names in self.packed_names.values() for name in names if name is not None]
        for name in (*held, *self.extra):
            key = prefix + self._aliases().get(name, name)
            own, came = getattr(self, name), found.get(key)
            if isinstance(came, Tensor) and (came.dtype is not own.dtype or came.shape != own.shape):
                errors.append(f"{prefix}{name} is {came.dtype} {tuple(came.shape)}, wanted {own.dtype} "
                              f"{tuple(own.shape)}")  # fmt: skip
                # In the state dict, the module's own tensor takes the place of the tensor that does not fit, because a
                # key without an entry would be reported as missing, too.
                found[key] = own.detach()
        known = len(missing)
        super()._load_from_state_dict(found, prefix, local_metadata, strict, missing, unexpected, errors)
        missing[known:] = [back.get(key, key) for key in missing[known:]]
        # load_state_dict(assign=True) may have replaced the parameter by one that requires a gradient.
        for name in self.packed_names:
            self._parameters[name].requires_grad_(False)

    def extra_repr(self) -> str:
        formats = sorted({weight.format.name for weight in self._templates.values()})
        return f"{super().extra_repr()}, format={', '.join(formats)}".removeprefix(", ")


def hold_packed(
    experts: Any,
    weights: Mapping[str, tuple[PackedWeight, Sequence[Optional[str]]]],
    dtype: torch.dtype,
    extra: Optional[Mapping[str, Tensor]] = None,
) -> None:
    """Turns dense experts into :class:`PackedExperts`, in place and without a copy.

    Args:
        experts: the experts' module of a model of the transformers library.
        weights: a dict that maps the name of a dense parameter to a tuple: a stacked weight ``(E, N, K)``, and the
            names of this weight's tensors in the state dict. In the state dict, the codes have the parameter's name if
            the file has no other name for the codes.
        dtype: dtype of the dense experts that the packed experts replace.
        extra: a dict that maps names in the state dict to tensors of the file that the weights' formats do not need.
    """
    for name, (weight, _) in weights.items():
        if not weight.stacked:
            raise ValueError(f"PackedExperts: {name} has shape {tuple(weight.shape)}, wanted a stack (E, N, K)")
        weight.check_kernel("PackedExperts")
    experts.__class__ = experts_class(PackedExperts, type(experts))
    experts.compute_dtype = dtype
    for name, (weight, names) in weights.items():
        experts.set_packed(name, weight, names)
    experts.extra = tuple(extra or ())
    for name, tensor in (extra or {}).items():
        experts.register_buffer(name, tensor.detach())
