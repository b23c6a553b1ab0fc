"""Modules over a frozen packed weight: a linear layer and an embedding, with the tensors and names of a checkpoint's
file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .. import ops
from ..weights.packed import Format, PackedWeight
from .nf4 import is_zero3_shard, keeping_bits

# Names of attributes of a packed layer that return the tensor of codes, as does the attribute with the tensor's name in
# the file. PEFT reads the device of a layer's `weight`. For DoRA, PEFT reads the dense weight of a layer that has a
# `W_q` from the layer's `dequantize`.
_CODES = ("weight", "W_q")


class HoldsPacked(nn.Module):
    """Base class of the modules over one packed weight.

    The first tensor of the weight, which holds the codes, is a frozen parameter; the weight's other tensors are
    buffers. Functions that cast all parameters of a model, such as PEFT's ``prepare_model_for_kbit_training``,
    therefore leave the scales unchanged. ``module.weight`` and ``module.W_q`` return the codes tensor, whatever the
    file calls the codes.

    Attributes:
        names: the names of the weight's tensors in the file and in the state dict, in the order of ``format.parts``;
            None for a tensor that the weight does not have. A module's attribute has the tensor's name, with "_" in
            place of each dot.
        extra: names of tensors of the file that the format does not decode, such as ``weight_shape``.
        compute_dtype: dtype of the dense layer that the packed layer replaces. PEFT takes ``compute_dtype`` for the
            dtype of the base layer.
        note: text that :func:`peft_ext.explain` adds for the layer: which step of the checkpoint's own layer this layer
            skips, such as the rounding of x to 8 bits, or that a Float8Linear rounds x; "" without such a step.
    """

    names: tuple[Optional[str], ...]
    extra: tuple[str, ...]
    compute_dtype: torch.dtype
    note = ""
    _template: PackedWeight

    def _hold(
        self, weight: PackedWeight, names: Sequence[Optional[str]], extra: Mapping[str, Tensor], dtype: Any
    ) -> None:
        kind = type(self).__name__
        if not isinstance(weight, PackedWeight):
            raise TypeError(f"{kind}: weight is {type(weight).__name__}, wanted a PackedWeight")
        if len(weight.shape) != 2:
            raise ValueError(f"{kind}: weight has shape {tuple(weight.shape)}, wanted (N, K)")
        weight.check_kernel(kind)
        self.describe(weight, names, extra)
        self.compute_dtype = dtype or weight.dtype
        for index, (name, part) in enumerate(zip(self.names, weight.parts, strict=True)):
            if name is not None and index == 0:
                self.register_parameter(_attribute(name), nn.Parameter(part.detach(), requires_grad=False))
            elif name is not None:
                self.register_buffer(_attribute(name), part.detach())
        for name, tensor in extra.items():
            self.register_buffer(_attribute(name), tensor.detach())

    def describe(self, weight: PackedWeight, names: Sequence[Optional[str]], extra: Iterable[str]) -> None:
        """Stores the format, group and option of ``weight``, the names of the weight's tensors, and the names of extra
        tensors.

        The weight's tensors and the extra tensors must be, or become, attributes of the module under these names.
        """
        names = (*names, *(None,) * (len(weight.parts) - len(names)))
        has = [part is not None for part in weight.parts]
        if len(names) != len(has) or [name is not None for name in names] != has:
            raise ValueError(f"{type(self).__name__}: names is {names}, wanted one name for each of "
                             f"{tuple(weight.tensors())}")  # fmt: skip
        self.names, self.extra = names, tuple(extra)
        self._template = weight.map(lambda part: part.to("meta"))
        self.__dict__.pop("_packed", None)

    def tensor(self, name: str) -> Tensor:
        """Returns the tensor that the file calls ``name``."""
        return getattr(self, _attribute(name))

    def hold_parts(self, parts: Sequence[Optional[Tensor]]) -> None:
        """Makes ``parts`` the tensors of the weight, without a copy.

        ``hold_parts`` makes a new parameter of the codes, because a tied layer may hold the module's old parameter.
        """
        for index, (name, part) in enumerate(zip(self.names, parts, strict=True)):
            if name is not None and index == 0:
                self._parameters[_attribute(name)] = nn.Parameter(part, requires_grad=False)
            elif name is not None:
                self.tensor(name).data = part
        self.__dict__.pop("_packed", None)

    def places(self) -> dict[str, str]:
        """Returns a dict that maps the file's names of the weight's tensors and of the extra tensors to the names of
        the module's attributes."""
        return {name: _attribute(name) for name in (*self.names, *self.extra) if name is not None}

    def with_codes(self, codes: Tensor) -> PackedWeight:
        """Returns the weight whose codes are ``codes``, and whose other tensors are those of the module's weight."""
        return self._template.replaced([codes, *self._parts()[1:]])

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__
        if name in _CODES and name not in held.get("_parameters", ()) and "names" in held:
            name = _attribute(self.names[0])
        return super().__getattr__(name)

    @property
    def format(self) -> Format:
        """The format of the weight, which is known also while ZeRO-3 has partitioned the codes."""
        return self._template.format

    def _parts(self) -> list[Optional[Tensor]]:
        return [None if name is None else self.tensor(name) for name in self.names]

    @property
    def packed(self) -> PackedWeight:
        """The module's weight, which shares the module's tensors. The property returns one PackedWeight object until a
        tensor of the module is replaced, but a new object for each read under torch.compile, on the meta device, and if
        ZeRO-3 or a tensor subclass holds the codes.

        Raises: RuntimeError if the codes require a gradient while autograd records, because codes can't get a gradient,
        or if ZeRO-3 has partitioned the codes and not gathered them.
        """
        parts = self._parts()
        if is_zero3_shard(parts[0]):
            raise RuntimeError(
                f"{type(self).__name__}: {self.names[0]} is {tuple(parts[0].shape)}, partitioned by ZeRO-3, wanted all "
                f"codes of {tuple(self._template.shape)}. Call the model, or use deepspeed.zero.GatheredParameters"
            )
        if parts[0].requires_grad and torch.is_grad_enabled():
            kind, format = type(self).__name__, self.format.name
            raise RuntimeError(
                f"{kind}: the codes of a packed weight ({format}) require grad, wanted a frozen weight: leave the "
                "layer out of modules_to_save, or call peft_ext.dequantize_packed(model) first"
            )
        if torch.compiler.is_compiling() or parts[0].is_meta or type(parts[0].data) is not Tensor:
            return self._template.replaced(parts)
        # A cached PackedWeight would keep the codes in memory that ZeRO-3 gathers and frees.
        if hasattr(parts[0], "ds_id"):
            return self._template.replaced(parts)
        key = [(id(part), part.data_ptr()) for part in parts if part is not None]
        known = self.__dict__.get("_packed")
        if known is None or known[0] != key:
            known = self.__dict__["_packed"] = (key, self._template.replaced(parts))
        return known[1]

    def dequantize(self, dtype: Optional[torch.dtype] = None) -> Tensor:
        """Returns the dense weight, rounded once to ``dtype`` (default: ``compute_dtype``)."""
        return self.packed.dequantize(self.compute_dtype if dtype is None else dtype)

    def reset_parameters(self) -> None:
        """Does nothing, because the weight comes from a file."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.__dict__.pop("_packed", None)
        held = [*self._parts(), *map(self.tensor, self.extra)]
        return super()._apply(keeping_bits(fn, held), recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    # --- the file's names in the state dict ---------------------------------------------------------------------------

    def _dotted(self) -> dict[str, str]:
        """Returns a dict that maps each tensor name that has a dot to the name of the module's attribute."""
        return {name: _attribute(name) for name in (*self.names, *self.extra) if name is not None and "." in name}

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, attribute in self._dotted().items():
            destination[prefix + name] = destination.pop(prefix + attribute)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing: list, unexpected: list,
        errors: list,
    ) -> None:  # fmt: skip
        dotted = self._dotted()
        found = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        for name, attribute in dotted.items():
            if prefix + name in found:
                found[prefix + attribute] = found.pop(prefix + name)
        for name in (*self.names, *self.extra):
            came = None if name is None else found.get(prefix + _attribute(name))
            if came is None:
                continue
            own = self.tensor(name)
            if not isinstance(came, Tensor) or came.dtype is not own.dtype or came.shape != own.shape:
                what = f"{came.dtype} {tuple(came.shape)}" if isinstance(came, Tensor) else type(came).__name__
                errors.append(f"{prefix}{name} is {what}, wanted {own.dtype} {tuple(own.shape)}")
                # In the state dict, the layer's own tensor takes the place of the tensor that does not fit, because a
                # key without an entry would be reported as missing, too.
                found[prefix + _attribute(name)] = own.detach()
        known = len(missing)
        super()._load_from_state_dict(found, prefix, local_metadata, strict, missing, unexpected, errors)
        back = {prefix + attribute: prefix + name for name, attribute in dotted.items()}
        missing[known:] = [back.get(key, key) for key in missing[known:]]
        # load_state_dict(assign=True) may have replaced the parameter by one that requires a gradient.
        for parameter in self._parameters.values():
            if parameter is not None and parameter is not self._parameters.get("bias"):
                parameter.requires_grad_(False)


def _attribute(name: str) -> str:
    return name.replace(".", "_")


class PackedLinear(HoldsPacked, nn.Linear):
    """``Y = X Wᵀ + b`` with W frozen and packed, in the layout of a checkpoint's file.

    The layer replaces ``nn.Linear``, and PEFT adapts the layer like an ``nn.Linear``. The state dict has the names and
    the bytes of the tensors in the file. A cast of the module to another float dtype casts the bias only.

    To get a PackedLinear, call :meth:`from_packed`, or load a packed checkpoint with :class:`peft_ext.PackedConfig`.
    """

    @classmethod
    def from_packed(
        cls,
        weight: PackedWeight,
        names: Sequence[Optional[str]],
        bias: Optional[Tensor] = None,
        *,
        extra: Optional[Mapping[str, Tensor]] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> PackedLinear:
        """Returns a layer whose weight is ``weight``, without a copy.

        Args:
            weight: the packed weight, of shape ``(N, K)``.
            names: the file's names of ``weight.parts``, in their order, for example
                ``("weight_packed", "weight_scale")``. The name of a part that is None is None; if the last names are
                None, ``names`` may end before these names.
            bias: ``[N]``; the layer shares a bias that is an nn.Parameter.
            extra: a dict that maps names in the file to the tensors of the layer that the weight's format does not
                need. The layer's state dict contains the tensors of ``extra`` too.
            dtype: dtype of the dense layer that the packed layer replaces; default: ``weight.dtype``.

        Raises: TypeError or ValueError if ``weight`` is no packed weight of two dimensions, if no kernel decodes the
        format of ``weight``, or if ``names`` does not fit.
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._hold(weight, names, extra or {}, dtype)
        module.out_features, module.in_features = weight.shape
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        module.register_parameter("bias", bias)
        return module

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ops.frozen_linear(x, self.packed, bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"


class PackedEmbedding(HoldsPacked, nn.Embedding):
    """An embedding ``[V, N]`` whose table is frozen and packed, in the layout of a checkpoint's file.

    On a CPU, the kernel decodes only the rows that a call looks up. The decoded values are rounded once, to
    ``compute_dtype``, the dtype of the result; the product with a ``scale`` other than 1 is rounded again.

    Attributes:
        scale: factor of the result, such as the square root of the width in Gemma.
    """

    scale: float = 1.0

    @classmethod
    def from_packed(
        cls,
        weight: PackedWeight,
        names: Sequence[Optional[str]],
        padding_idx: Optional[int] = None,
        *,
        extra: Optional[Mapping[str, Tensor]] = None,
        dtype: Optional[torch.dtype] = None,
        scale: float = 1.0,
    ) -> PackedEmbedding:
        """Returns an embedding whose table is ``weight`` ``(V, N)``, without a copy; see PackedLinear.from_packed.

        ``scale``: factor of the result.
        """
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._hold(weight, names, extra or {}, dtype)
        module.num_embeddings, module.embedding_dim = weight.shape
        module.padding_idx, module.max_norm, module.norm_type = padding_idx, None, 2.0
        module.scale_grad_by_freq = module.sparse = False
        module.scale = scale
        return module

    @property
    def embed_scale(self) -> Optional[Tensor]:
        """The factor ``scale`` of the looked-up rows as a tensor of no dimensions; None if the factor is 1. PEFT
        multiplies an adapter's output by the ``embed_scale`` of the base layer."""
        return None if self.scale == 1 else torch.tensor(self.scale, dtype=self.compute_dtype)

    @property
    def table(self) -> PackedWeight:
        """The module's weight with the dtype ``compute_dtype``, to which a looked-up row is rounded once."""
        weight = self.packed
        if weight.dtype is self.compute_dtype:
            return weight
        known = self.__dict__.get("_table")
        if known is None or known[0] is not weight or torch.compiler.is_compiling():
            known = weight, PackedWeight(weight.format, weight.parts, weight.shape, self.compute_dtype,
                                         group=weight.group, option=weight.option)  # fmt: skip
            if not torch.compiler.is_compiling():
                self.__dict__["_table"] = known
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_table"}

    def forward(self, input: Tensor) -> Tensor:
        weight = self.table
        # lora_embedding gets an adapter of zeros, so that its result is the decoded rows. All elements of lora_A and
        # lora_B are one zero in memory.
        zero, (entries, width) = torch.zeros(1, 1, device=weight.device), weight.shape
        lora_A, lora_B = zero.expand(1, entries), zero.expand(width, 1)
        rows = ops.lora_embedding(input, weight, lora_A, lora_B)
        return rows if self.scale == 1 else rows * self.embed_scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"


class ScaledEmbedding(nn.Embedding):
    """The dense equivalent of a :class:`PackedEmbedding` with a scale.

    Attributes:
        scale: the factor by which the looked-up rows are multiplied.
    """

    scale: float = 1.0

    @property
    def embed_scale(self) -> Tensor:
        return torch.tensor(self.scale, dtype=self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale
