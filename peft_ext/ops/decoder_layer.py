"""A decoder layer for few tokens on a CPU, without a gradient, in one operator.

    q, k, v = projections(norm₁(x))      the rotated k, and v, are written behind the keys and values of the cache
    h = x + post₁(o(attention(rotated q, all keys, all values)))
    y = h + post₂(down(act(gate(norm₂(h))) ∘ up(norm₂(h))))

norm₁ and norm₂ are norms, or leave their input as it is; so are post₁ and post₂. In some layers, q and k are normed
before they are rotated: each head by itself, or all heads of a token together. The norms are RMSNorms, and each of the
seven linear layers is computed as a layer of :func:`lora_linears`. The operator has no public function: the fused
decoder layers of :mod:`peft_ext.integrations` call the operator, with checked arguments.

x: ``[B, T, K]`` with T from 1 to 8. keys, values: ``[B, H, capacity, D]``, of which ``past`` tokens are filled. mask:
bool ``[B, 1, T, past + T]``, or None; without a mask each query sees all keys. tensors: the weights of those norms that
the layer has, in the order norm₁, norm₂, post₁, post₂, norm of q, norm of k (the length of the weight of a norm of q or
k is the number of adjacent values that are normed together); then the tensors of the layers q, k, v, o, gate, up and
down, see :mod:`.layer_lists`. sizes: the number of the activation, whether the norms round before they multiply by the
weight, the sum of 1 if the layer has norm₁ and norm₂, of 2 if it has post₁ and post₂ and of 4 if q and k have norms,
and the list ``sizes`` of the seven layers. numbers: eps of each norm, the offset of the weights of the norms, the scale
of attention, and the list ``numbers`` of the seven layers. plan: 0, or a number under which the kernel keeps the lists
tensors, sizes and numbers. A later call of the kernel with the same ``plan`` passes empty lists, whose conversion takes
no time. The reference ignores ``plan`` and needs the full lists in each call.
"""

from __future__ import annotations

import torch

from .layer_lists import NUMBERS
from .library import NAMESPACE, define, proof

__all__: list[str] = []

_LAYERS = 7
_ops = getattr(torch.ops, NAMESPACE)
_SIZES = 4
_PAIRS = (("norm1", "norm2"), ("post1", "post2"), ("q", "k"))  # the norms, which a layer has in pairs


def _reference(x, cos, sin, mask, keys, values, past, tensors, sizes, numbers, _plan):
    activation, rounds, pairs, *sizes = sizes
    names = [name for i, pair in enumerate(_PAIRS) if pairs >> i & 1 for name in pair]
    weights, held = dict(zip(names, tensors, strict=False)), tensors[len(names) :]
    eps, (offset, scale, *numbers) = dict(zip(names, numbers, strict=False)), numbers[len(names) :]
    counts = [bin(sizes[_SIZES * i]).count("1") for i in range(_LAYERS)]

    def layers(x, begin, end):
        of = held[sum(counts[:begin]) : sum(counts[:end])]
        own = sizes[_SIZES * begin : _SIZES * end], numbers[NUMBERS * begin : NUMBERS * end]
        return _ops.lora_linears(x, of, *own)[: end - begin]

    def norm(x, name):
        if name not in weights:
            return x
        groups = x.unflatten(-1, (-1, len(weights[name])))
        return _ops.rms_norm(groups, weights[name], eps[name], offset, bool(rounds))[0].flatten(-2)

    batch, tokens, size = *x.shape[:2], keys.shape[3]
    q, k, v = layers(norm(x, "norm1"), 0, 3)
    q, k = norm(q, "q"), norm(k, "k")
    q, k, v = (y.view(batch, tokens, -1, size).transpose(1, 2) for y in (q, k, v))
    q, k = _ops.rotary_embedding(q, k, cos, sin)
    for memory, new in ((keys, k), (values, v)):
        memory.narrow(2, past, tokens).copy_(new)
    seen = (memory.narrow(2, 0, past + tokens) for memory in (keys, values))
    out = _ops.scaled_dot_product_attention(q, *seen, mask, False, scale, 0.0, None, None)[0]
    h = x + norm(layers(out.transpose(1, 2).reshape(batch, tokens, -1), 3, 4)[0], "post1")
    gate, up = layers(norm(h, "norm2"), 4, 6)
    return h + norm(layers(_ops.gated_activation(gate, up, activation), 6, 7)[0], "post2")


def _fake(x, *_):
    return x.new_empty(x.shape)


define(
    "decoder_layer",
    "(Tensor x, Tensor cos, Tensor sin, Tensor? mask, Tensor(a!) keys, Tensor(b!) values, int past, Tensor[] tensors, "
    "SymInt[] sizes, float[] numbers, int plan) -> Tensor",
    reference=_reference,
    fake=_fake,
    family="decoder_layer",
    cuda=False,
    inner=True,
)


@proof("decoder_layer")
def _proof(inputs):
    draw, size, past, tokens = inputs.draw, 32, 5, 2
    hidden, inner = 4 * size, 6 * size
    shapes = [(hidden, hidden), (2 * size, hidden), (2 * size, hidden), (hidden, hidden), (inner, hidden),
              (inner, hidden), (hidden, inner)]  # fmt: skip
    tensors, sizes, numbers = [], [], []
    for n, k in shapes:
        tensors += [draw(n, k, scale=k**-0.5), draw(8, k, of=torch.float32, scale=k**-0.5)]
        tensors.append(draw(n, 8, of=torch.float32, scale=0.25))
        sizes += [0b11000001, 0, n, k]
        numbers += [0.5, 0.0]
    angles = draw(2, tokens, size, of=torch.float32)
    cos, sin = angles.cos().to(inputs.dtype), angles.sin().to(inputs.dtype)
    keys, values = (draw(2, 2, past + tokens + 1, size) for _ in range(2))
    mask = torch.ones(2, 1, tokens, past + tokens, dtype=torch.bool, device=inputs.device)
    mask[1, :, :, :2] = mask[:, :, 0, -1] = False
    # The layers of Llama, Qwen 3 (norms of each head of q and k), Gemma 3 (also post₁ and post₂), OLMo 2 (neither norm₁
    # nor norm₂, and norms of all heads together), and a layer without a norm.
    kinds = ((1, ()), (5, (size, size)), (7, (size, size)), (6, (hidden, 2 * size)), (0, ()))
    for pairs, of_heads in kinds:
        lengths = [*([hidden, hidden] * (pairs & 1)), *([hidden, hidden] * (pairs >> 1 & 1)), *of_heads]
        weights = [inputs.vector(count).to(inputs.dtype) for count in lengths]
        eps, own = [1e-5 * (i + 1) for i in range(len(weights))], [0, 1, pairs]
        lists = ([*weights, *tensors], [*own, *sizes], [*eps, 0.0, 0.2, *numbers], 0)
        for given in (mask, None):
            yield "decoder_layer", (draw(2, tokens, hidden), cos, sin, given, keys, values, past, *lists)
