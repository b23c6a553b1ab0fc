"""TRL's trainers, with the labels' log probabilities computed by :func:`peft_ext.ops.linear_cross_entropy`.

::

    from peft_ext.integrations.trl import SFTTrainer   # in place of: from trl import SFTTrainer

    class Mine(LinearLoss, trl.SFTTrainer): ...        # for a trainer of your own

TRL's trainers replace the model's forward. Called with ``fused_lm_head=True``, TRL's forward runs the layers below the
head and returns a ``FusedCausalLMOutput``: the log probability of each label, and the entropy and other values that the
trainer logs. TRL's trainers compute their losses and metrics from the ``FusedCausalLMOutput``. :class:`LinearLoss`
replaces TRL's forward by a forward that computes the same output from the same hidden states and the same weight. In
the forward that replaces TRL's forward, ``linear_cross_entropy`` computes the log probability of each label. The
entropy and the other values that the trainer logs are computed for a chunk of tokens at a time, without gradients. On a
CPU, TRL's own forward keeps several float32 tensors of 4,096 tokens by 32,768 vocabulary entries.

As with TRL's own forward, the trainer calls the wrapper around the model, so DDP sees an ordinary call.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._imports import required, version
from ..ops.checks import autocast_dtype
from ..weights.packed import PackedWeight
from .adapter_layers.base import FOUR_BIT, LINEAR, PACKED, class_name, weight_of
from .adapter_layers.reasons import WIDENED, kernel_reason, weight_reason

with required("trl", "peft_ext.integrations.trl"):
    import trl
    from accelerate.utils import DistributedType
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

__all__ = ["DPOTrainer", "GRPOTrainer", "KTOTrainer", "LinearLoss", "RLOOTrainer", "SFTTrainer"]

# Maps a device type to the bytes that the float32 logits of one chunk of tokens take. The computation of the metrics
# holds up to four tensors of this size at a time.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}

# Maps a trainer to the values of `loss_type` with which LinearLoss is known to give TRL's own losses, gradients and
# metrics. None stands for a trainer that has no `loss_type`.
_LOSSES: dict[type, set[Optional[str]]] = {
    trl.SFTTrainer: {"nll", "dft"},
    trl.DPOTrainer: {
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    },
    trl.KTOTrainer: {"kto", "apo_zero_unpaired"},
    trl.GRPOTrainer: {"grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo"},
    trl.RLOOTrainer: {None},
}  # fmt: skip
_OPTIONS: dict[str, tuple] = {
    "activation_offloading": (False,),
    "cast_lm_head_to_fp32": (False,),
    "entropy_coef": (0.0,),
    "fp16": (False,),
    "fp16_full_eval": (False,),
    "label_smoothing_factor": (0.0,),
    "sync_ref_model": (False,),
    "top_entropy_quantile": (1.0,),
    "torch_compile": (False,),
    "use_adaptive_entropy": (False,),
    "use_liger_kernel": (False,),
    "use_vllm": (False,),
}
_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# Digests of the source text of TRL's `add_fused_lm_head`, `FusedCausalLMOutput` and `ChunkedLogProbFunction` together.
# The digest is that of TRL 1.16.
_FORMS = {"6607065f623766e1"}


# --- what is known ----------------------------------------------------------------------------------------------------


@functools.cache
def _form() -> str:
    text = "".join(map(inspect.getsource, (add_fused_lm_head, FusedCausalLMOutput, ChunkedLogProbFunction)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _trainer_reason(trainer: Any) -> Optional[str]:
    """Returns why LinearLoss is not known to give TRL's own losses and metrics with this trainer and its options; else
    None."""
    if _form() not in _FORMS:
        return f"the head of {version('trl')} is none of the known forms"
    kind = next((kind for kind in _LOSSES if isinstance(trainer, kind)), None)
    if kind is None:
        return f"the trainer is none of {', '.join(kind.__name__ for kind in _LOSSES)}"
    args, accelerator = trainer.args, trainer.accelerator
    losses = getattr(args, "loss_type", None)
    if unknown := [loss for loss in (losses if isinstance(losses, list) else [losses]) if loss not in _LOSSES[kind]]:
        return f"loss_type is {unknown[0]}"
    for name, known in _OPTIONS.items():
        if (value := getattr(args, name, known[0])) not in known:
            return f"{name} is {value!r}"
    if accelerator.distributed_type not in _DISTRIBUTED or accelerator.parallelism_config is not None:
        return f"the processes share the model ({accelerator.distributed_type.value})"
    if getattr(trainer, "ref_model", None) is not None:
        return "ref_model is a model of its own"
    if callable(trainer.compute_loss_func):
        return "compute_loss_func is given"
    return "router_aux_loss_coef adds the router's loss" if trainer.aux_loss_enabled else None


def _model_reason(model: nn.Module) -> Optional[str]:
    """Returns why the forward that TRL gave the model can't be replaced; None if it can."""
    function = getattr(model.forward, "__func__", None)
    if getattr(function, "__code__", None) not in add_fused_lm_head.__code__.co_consts:
        return "the model's forward is not the one that TRL gives it"
    if model.config.get_text_config() is not model.config:
        return "the model takes more than text"
    return _head_reason(model)


def _head_reason(model: nn.Module) -> Optional[str]:
    """Returns why linear_cross_entropy can't compute the loss from the model's head; None if it can. Each forward with
    a fused head calls ``_head_reason`` anew, because the head may have changed since the last forward."""
    head = model.get_output_embeddings()
    if type(head) not in (*PACKED, *LINEAR, *FOUR_BIT):
        return f"the head is a {class_name(type(head))}, wanted a Linear, NF4Linear, PackedLinear or Linear4bit"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "the head is trained"
    if reason := weight_reason(head):
        return f"of the head, {reason}"
    weight = head.weight
    if weight.device.type not in CHUNK_BYTES:
        return f"the head is on {weight.device}"
    if torch.float16 in (weight.dtype, autocast_dtype(weight)):
        return "the head computes in float16"
    return kernel_reason("linear_cross_entropy", weight.device.type)


# --- the forward ------------------------------------------------------------------------------------------------------


def _linear(forward: types.MethodType) -> Callable[..., Any]:
    """Returns a function to replace ``forward``, which TRL's ``add_fused_lm_head`` made. The returned function has the
    temperature, the logit scale and the soft cap of ``forward``."""
    function = forward.__func__
    given = inspect.getclosurevars(function).nonlocals
    # From logits z, with the scale a, the soft cap c and the temperature T, TRL computes c tanh(a z / c) / T. The
    # operator computes the same value with the scale a / T and the cap c / T: (c / T) tanh((a / T) z / (c / T)).
    temperature, softcap = given["temperature"], given["final_logit_softcapping"]
    scale, softcap = given["logit_scale"] / temperature, None if softcap is None else softcap / temperature

    # functools.wraps keeps the signature of the model's forward, because generate reads the signature.
    @functools.wraps(function)
    def linear(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Optional[Tensor] = None,
        shift_labels: Optional[Tensor] = None, num_items_in_batch: Union[Tensor, int, None] = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        rest = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not fused_lm_head:
            return function(self, *args, **rest, **kwargs)
        reason = _head_reason(self) if shift_labels is None else "shift_labels is given"
        if kwargs.get("output_router_logits") or getattr(self.config, "output_router_logits", False):
            reason = "output_router_logits is set"
        if reason is not None:
            warnings.warn(f"LinearLoss: this call of the head is TRL's own: {reason}", stacklevel=2)
            return function(self, *args, fused_lm_head=True, **rest, **kwargs)
        kwargs["use_cache"] = False
        hidden = getattr(self, given["backbone_attr"])(*args, **kwargs).last_hidden_state[:, :-1]
        head = self.get_output_embeddings()
        return _output(hidden, head, labels[:, 1:], num_items_in_batch, scale, softcap, given["outputs"])

    return linear


def _output(
    hidden: Tensor, head: nn.Module, labels: Tensor, items: Union[Tensor, int, None], scale: float,
    softcap: Optional[float], wanted: tuple[str, ...],
) -> FusedCausalLMOutput:  # fmt: skip
    """Returns a FusedCausalLMOutput with the values that TRL's forward computes. The values of tokens with the label
    -100 are not computed and are 0."""
    weight, bias = weight_of(head), head._parameters["bias"]
    hidden, labels = (value.to(head._parameters["weight"].device) for value in (hidden, labels))
    mask, dtype = labels != -100, autocast_dtype(hidden) or hidden.dtype
    x, targets = hidden[mask].to(dtype), labels[mask]
    weight = weight if isinstance(weight, PackedWeight) else weight.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    loss = ops.linear_cross_entropy(x, weight, targets, bias, logit_scale=scale, softcap=softcap, reduction="none")
    with torch.no_grad():
        metrics = _metrics(x, weight, bias, targets, scale, softcap, wanted)

    def spread(value: Tensor) -> Tensor:
        return value.new_zeros(mask.shape).masked_scatter(mask, value)

    found = {name: spread(value) for name, value in metrics.items()}
    log_probs = spread(-loss)
    if "entropy" in found:
        found["entropy"] = _NoGradient.apply(found["entropy"], log_probs)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if items is None else items)
    return FusedCausalLMOutput(loss=loss, log_probs=log_probs, label_mask=mask, **found)


def _metrics(
    x: Tensor, weight: Union[Tensor, PackedWeight], bias: Optional[Tensor], targets: Tensor, scale: float,
    softcap: Optional[float], wanted: tuple[str, ...],
) -> dict[str, Tensor]:  # fmt: skip
    """Returns the metrics named in ``wanted`` for each row of x, computed from the row's float32 logits z and
    p = exp(z - max z)."""
    names = [name for name in ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1") if name in wanted]
    found = {n: x.new_empty(len(x), dtype=torch.bool if n == "is_top1" else torch.float32) for n in names}
    rows = max(1, CHUNK_BYTES[x.device.type] // (4 * weight.shape[0]))
    own_product = isinstance(weight, PackedWeight) or (x.device.type == "cpu" and x.dtype in WIDENED)
    for begin in range(0, len(x) if names else 0, rows):
        part = slice(begin, begin + rows)
        z = (ops.frozen_linear if own_product else F.linear)(x[part], weight, bias).float()
        z = z.mul_(scale) if scale != 1.0 else z
        z = z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)
        if "mean_logits" in found:
            found["mean_logits"][part] = z.mean(-1)
        top, first = z.max(-1, keepdim=True)
        p = (z - top).exp_()
        total = p.sum(-1)
        if "is_top1" in found:
            found["is_top1"][part] = first.squeeze(-1) == targets[part]
        if "log_sum_sq_probs" in found:
            found["log_sum_sq_probs"][part] = p.square().sum(-1).log_() - 2 * total.log()
        if "entropy" in found:
            found["entropy"][part] = top.squeeze(-1) + total.log() - p.mul_(z).sum(-1) / total
    return found


class _NoGradient(torch.autograd.Function):
    """Autograd function: the forward returns the entropy unchanged, and the backward of a loss that contains the
    entropy raises RuntimeError."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, log_probs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor]) -> tuple[None, None]:
        if grad is not None:
            raise RuntimeError(
                "LinearLoss: the entropy has no gradient; a loss that contains it needs TRL's own trainer"
            )
        return None, None


# --- trainers ---------------------------------------------------------------------------------------------------------


class LinearLoss:
    """Mixin for one of TRL's trainers: log probabilities come from :func:`peft_ext.ops.linear_cross_entropy`.

    The trainer logs the same metrics as TRL's own trainer. The entropy has no gradient: the backward of a loss that
    contains the entropy raises RuntimeError.

    ``loss_reason`` is the reason why TRL's own code computes the loss; None if linear_cross_entropy computes the loss.
    If TRL's own code computes the loss, a warning states the reason when the trainer is made. TRL's code computes the
    loss for example if the head is trained or computes in float16, if processes share the model (FSDP, DeepSpeed), or
    if an option is not known to give TRL's numbers.
    """

    loss_reason: Optional[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.loss_reason = _trainer_reason(self) or _model_reason(model)
        if self.loss_reason is None:
            model.forward = types.MethodType(_linear(model.forward), model)
        else:
            warnings.warn(f"{type(self).__name__}: the loss is TRL's own: {self.loss_reason}", stacklevel=2)


class SFTTrainer(LinearLoss, trl.SFTTrainer):
    """``trl.SFTTrainer`` with :class:`LinearLoss`."""


class DPOTrainer(LinearLoss, trl.DPOTrainer):
    """``trl.DPOTrainer`` with :class:`LinearLoss`."""


class KTOTrainer(LinearLoss, trl.KTOTrainer):
    """``trl.KTOTrainer`` with :class:`LinearLoss`."""


class GRPOTrainer(LinearLoss, trl.GRPOTrainer):
    """``trl.GRPOTrainer`` with :class:`LinearLoss`."""


class RLOOTrainer(LinearLoss, trl.RLOOTrainer):
    """``trl.RLOOTrainer`` with :class:`LinearLoss`."""
