"""Runs one training step over fake tensors and notes when each storage is made and freed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (  # noqa: PLC2701  PyTorch has no public names for fake tensors
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701  PyTorch has no public name for this class
from torch.utils._pytree import tree_iter, tree_map_only  # noqa: PLC2701  PyTorch has no public pytree functions

from ..integrations.adapter_layers.reasons import accepting
from ..nn import NF4Linear
from ..nn.experts import FrozenExperts
from ..nn.packed import HoldsPacked
from ..ops.library import NAMESPACE
from ..sources.model import base_model, output_head
from .optimizers import OPTIMIZERS
from .profile import KINDS, Profile
from .stand_ins import Dequantized, fake, replace_tensors
from .workspace import LOSS, workspace_bytes

_GROUPED_MM = torch.ops.aten._grouped_mm.default

# Errors that a forward raises under FakeTensorMode if the forward depends on the values of tensors.
VALUES_WANTED = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass
class _Storage:
    """Bytes and kind of a storage, and the times on the trace's clock at which the storage was made and freed."""

    size: int
    kind: str
    born: int
    died: Optional[int] = None


class _Storages(TorchDispatchMode):
    """Notes every storage that an operator returns, and when the storage is freed."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.clock = 0
        self.kind = "temporary"
        self.all: list[_Storage] = []
        self._of: weakref.WeakKeyDictionary[Any, _Storage] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = (_grouped_mm if func is _GROUPED_MM else func)(*args, **(kwargs or {}))
        self.clock += 1
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self.note(t)
        if func.namespace == NAMESPACE:
            kind = "logits" if func is LOSS else "temporary"
            workspace = self.add(workspace_bytes(func, args, self.device), kind)
            workspace.died = self.mark()
        return out

    def add(self, size: int, kind: str) -> _Storage:
        self.all.append(_Storage(size, kind, self.clock))
        return self.all[-1]

    def note(self, t: Tensor, kind: Optional[str] = None) -> _Storage:
        """Returns the record of the storage of ``t``; sets the record's kind if ``kind`` is given."""
        storage = t.untyped_storage()
        found = self._of.get(storage)
        if found is None:
            found = self._of[storage] = self.add(storage.nbytes(), self.kind)
            weakref.finalize(storage, self._end, found)
        found.kind = kind or found.kind
        return found

    def _end(self, storage: _Storage) -> None:
        storage.died = self.mark()

    def mark(self) -> int:
        """Advances the clock by one tick and returns the new time."""
        self.clock += 1
        return self.clock


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Optional[Tensor] = None, bias: Any = None, out_dtype: Optional[torch.dtype] = None
) -> Tensor:
    """Returns an uninitialized tensor of the shape and dtype of the result of ``aten._grouped_mm``, whose own fake
    kernel accepts bfloat16 only.

    [T, K] [E, K, N] -> [T, N]; [M, T] [T, N] -> [E, M, N], the weight's gradient; [E, M, K] [K, T] -> [M, T];
    [E, M, K] [E, K, N] -> [E, M, N]. ``offs`` [E] has the end of each group along T.
    """
    shape = [a.shape[-2], b.shape[-1]]
    if a.dim() == b.dim():
        shape.insert(0, a.shape[0] if offs is None else offs.shape[0])
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


def _timeline(storages: list[_Storage], end: int) -> Iterator[tuple[int, dict[str, int], int]]:
    """Yields a tuple each time a storage is made: the moment, a dict that maps each kind of memory to its bytes alive,
    and the sum of these bytes."""
    events = [(s.born, True, s) for s in storages]
    events += [(end if s.died is None else s.died, False, s) for s in storages]
    alive, total = dict.fromkeys(KINDS, 0), 0
    # Of the events at one moment, frees sort before allocations.
    for at, made, s in sorted(events, key=lambda event: event[:2]):
        alive[s.kind] += s.size if made else -s.size
        total += s.size if made else -s.size
        if made:
            yield at, alive, total


class Step:
    """One training step over fake tensors."""

    def __init__(self, model: nn.Module, optimizer: Optional[str], device: str) -> None:
        self.model, self.device = model, device
        self.optimizer = OPTIMIZERS["sgd" if optimizer is None else optimizer]
        self.storages = _Storages(device)
        self.forward_end = 0
        self.begins: list[tuple[int, str]] = []

    def run(
        self, inputs: Optional[Mapping[str, Any]], batch_size: Any, sequence_length: Any, padding: bool, autocast: Any
    ) -> None:
        # Tensors of the model that are neither parameters nor buffers, such as the token ids of PEFT's prompts, are not
        # replaced by fake tensors.
        with FakeTensorMode(allow_non_fake_inputs=True), _not_packed(), accepting(FakeTensor):
            replace_tensors(self.model, fake)
            if inputs is None:
                inputs = _inputs(self.model, batch_size, sequence_length, padding)
            inputs = tree_map_only(Tensor, fake, dict(inputs))
            with self.storages:
                self._note_resident()
                tree_map_only(Tensor, lambda t: self.storages.note(t, "activations"), inputs)
                self._forward_backward(inputs, autocast)
                trained = [p for p in self.model.parameters() if p.grad is not None]
                self.storages.add(self.optimizer.temporary(trained, self.device), "temporary")

    def _note_resident(self) -> None:
        adapters = self._adapters()
        for module in self.model.modules():
            quantized = isinstance(module, (NF4Linear, HoldsPacked, FrozenExperts, Dequantized))
            for name, t in (*module._parameters.items(), *module._buffers.items()):
                if t is not None:
                    state = quantized and name in module._buffers and name not in ("packed", "CB")
                    kind = "quantization" if state else "adapters" if id(t) in adapters else "weights"
                    self.storages.note(t, kind)
        allocates = hasattr(getattr(self.model, "base_model", None), "rankallocator")
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        for p in self.model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._note_gradient)
                scores = [p.numel() * p.element_size()] * (3 * allocates)
                for size in (*self.optimizer.state_bytes(p, id(p) in embeddings), *scores):
                    self.storages.add(size, "optimizer")

    def _adapters(self) -> set[int]:
        """Returns the ids of the trainable parameters and of the parameters of all adapters, active or not.

        Returns no ids if all parameters of the model are trainable.
        """
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        if len(trained) == sum(1 for _ in self.model.parameters()):
            return set()
        for module in self.model.modules():
            # An entry of PEFT's adapter_layer_names may be a dotted path, which getattr cannot follow.
            for name in getattr(type(module), "adapter_layer_names", ()):
                trained |= {id(p) for p in operator.attrgetter(name)(module).parameters()}
        return trained

    def _note_gradient(self, p: Tensor) -> None:
        if p.grad is not None:
            self.storages.note(p.grad, "gradients")

    def _forward_backward(self, inputs: Mapping[str, Any], autocast: Optional[torch.dtype]) -> None:
        storages = self.storages

        def enter_head(_module: nn.Module, args: tuple[Any, ...]) -> None:
            storages.kind = "logits"
            if args and args[0].requires_grad:
                args[0].register_hook(leave_head)

        def leave_head(_grad: Tensor) -> None:
            storages.kind = "temporary"

        head = output_head(self.model)
        if head is not None:
            head.register_forward_pre_hook(enter_head)
        for stack, layers in enumerate(_stacks(self.model)):
            for index, layer in enumerate(layers):
                layer.register_forward_pre_hook(functools.partial(self._enter_layer, stack, index), with_kwargs=True)
        self._begin("forward")
        storages.kind = "activations"
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = _loss(self.model(**inputs))
        if not loss.requires_grad:
            merged = any(getattr(module, "merged", False) for module in self.model.modules())
            why = "its adapter is merged, unmerge it first" if merged else "its loss depends on none that requires one"
            raise ValueError(f"estimate_memory: no gradient reaches a parameter of {type(self.model).__name__}: {why}")
        storages.note(loss, "logits")
        self.forward_end = storages.mark()
        self._begin("backward")
        if storages.kind == "activations":
            storages.kind = "temporary"
        loss.backward()
        storages.kind = "temporary"
        self._begin("optimizer")

    def _begin(self, phase: str) -> None:
        self.begins.append((self.storages.mark(), phase))

    def _enter_layer(self, stack: int, index: int, _module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Marks the phases of the backward: the backward of a layer ends when the gradient of the layer's input is
        computed."""
        x = args[0] if args else kwargs.get("hidden_states")
        if len(self.begins) == 1 and isinstance(x, Tensor) and x.requires_grad:
            before = "before" if index == 0 else "first" if index == 1 else "between"
            x.register_hook(lambda _grad: self._begin(f"{before} {stack}"))

    def profile(self) -> Profile:
        storages, end = self.storages.all, self.storages.mark()
        for s in storages:  # storage made and freed within the forward is temporary
            if s.kind == "activations" and s.died is not None and s.died <= self.forward_end:
                s.kind = "temporary"
        begins = [*self.begins, (end + 1, "")]
        current, peaks, most, totals = 0, {}, {}, {}
        for at, alive, total in _timeline(storages, end):
            while at >= begins[current + 1][0]:
                current += 1
            phase = begins[current][1]
            largest = most.setdefault(phase, dict.fromkeys(KINDS, 0))
            for kind, size in alive.items():
                if size > largest[kind]:
                    largest[kind] = size
            if total > totals.get(phase, -1):
                totals[phase], peaks[phase] = total, dict(alive)
        parameters = list(self.model.parameters())
        # A packed weight may store several elements in a byte, so the sizes of its layer give the number of elements.
        count = sum(p.numel() for p in parameters)
        for m in self.model.modules():
            if isinstance(m, HoldsPacked):
                count += m.packed.shape.numel() - m.weight.numel()
            elif isinstance(m, (NF4Linear, Dequantized)):
                count += m.out_features * m.in_features - (m.weight.numel() if isinstance(m, NF4Linear) else 0)
            elif isinstance(m, FrozenExperts):
                count += sum(shape.numel() - m._parameters[name].numel() for name, shape in m.frozen_shapes().items())
        return Profile(peaks, most, count, sum(p.numel() for p in parameters if p.requires_grad))


@contextlib.contextmanager
def _not_packed() -> Iterator[None]:
    """Makes transformers treat fake batches as batches without packed sequences, because the values of fake
    ``position_ids`` can't be read."""
    masks = sys.modules.get("transformers.masking_utils")
    find = getattr(masks, "find_packed_sequence_indices", None)
    if find is None:
        yield
        return

    @functools.wraps(find)
    def found(position_ids: Tensor) -> Optional[Tensor]:
        return None if isinstance(position_ids, FakeTensor) else find(position_ids)

    masks.find_packed_sequence_indices = found
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = find


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """Returns the outermost ModuleLists of the model that have at least two layers, all of one class.

    A ModuleList within a layer, such as a list of experts, is not returned.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in found) or not isinstance(module, nn.ModuleList):
            continue
        if len(module) > 1 and len({type(layer) for layer in module}) == 1:
            found[name] = module
    return list(found.values())


def _loss(out: Any) -> Tensor:
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if loss is None:
        loss = next(t for t in tree_iter(out) if isinstance(t, Tensor)).sum()
    return loss


def _inputs(model: nn.Module, batch_size: int, sequence_length: int, padding: bool) -> dict[str, Any]:
    """Returns arguments of the model's forward: token ids, with ``padding`` a mask, labels that fit the model's head
    (or the decoder's token ids if the forward takes no labels), and ``use_cache=False`` if the forward takes it.

    Sets ``pad_token_id`` and ``decoder_start_token_id`` in the model's config to 0 if the forward needs a missing one.
    """
    base = base_model(model)
    accepted = inspect.signature(base.forward).parameters
    if "input_ids" not in accepted:
        raise ValueError(f"estimate_memory: {type(base).__name__} takes no input_ids, wanted inputs")

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64)

    tokens = (batch_size, sequence_length)
    inputs: dict[str, Any] = {"input_ids": numbers(*tokens)}
    if padding:
        inputs["attention_mask"] = numbers(*tokens)
    if "start_positions" in accepted:
        inputs |= {"start_positions": numbers(batch_size), "end_positions": numbers(batch_size)}
    elif "labels" in accepted:
        inputs["labels"] = numbers(*tokens)
        if "SequenceClassification" in type(base).__name__:
            labels = numbers(batch_size)
            inputs["labels"] = labels.float() if base.config.num_labels == 1 else labels
            # The trace accepts any pad_token_id. The caller's config does not change, because base.config is a copy.
            if base.config.pad_token_id is None:
                base.config.pad_token_id = 0
    elif "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = numbers(*tokens)
    if "decoder_input_ids" in accepted and getattr(base.config, "decoder_start_token_id", None) is None:
        base.config.decoder_start_token_id = 0
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs
