"""A decoder layer for few tokens on a CPU, without a gradient, in one operator.

    q, k, v = projections(norm₁(x))      the rotated k, and v, are written behind the keys and values of the cache
    h = x + o(attention(rotated q, all keys, all values))      y = h + down(act(gate(norm₂(h))) ∘ up(norm₂(h)))

In some layers, q and k are normed before they are rotated: each head by itself, or all heads of a token together. The
norms are RMSNorms, and each of the seven linear layers is computed as a layer of :func:`lora_linears`. The operator
has no public function: the fused decoder layers of :mod:`peft_ext.integrations` call the operator, with checked
arguments.

x: ``[B, T, K]`` with T from 1 to 8. keys, values: ``[B, H, capacity, D]``, of which ``past`` tokens are filled. mask:
bool ``[B, 1, T, past + T]``, or None; without a mask each query sees all keys. tensors: the weights of norm₁, norm₂
and, if q and k have norms, of the norms of q and of k (the length of such a weight is the number of adjacent values
that are normed together); then the tensors of the layers q, k, v, o, gate, up and down, see :mod:`.layer_lists`. sizes:
the number of the activation, whether the norms round before they multiply by the weight, the number of norms (2 or 4),
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


def _reference(x, cos, sin, mask, keys, values, past, tensors, sizes, numbers, _plan):
    activation, rounds, norms, *sizes = sizes
    weights, held = tensors[:norms], tensors[norms:]
    eps, (offset, scale, *numbers) = numbers[:norms], numbers[norms:]
    counts = [bin(sizes[_SIZES * i]).count("1") for i in range(_LAYERS)]

    def layers(x, begin, end):
        of = held[sum(counts[:begin]) : sum(counts[:end])]
        own = sizes[_SIZES * begin : _SIZES * end], numbers[NUMBERS * begin : NUMBERS * end]
        return _ops.lora_linears(x, of, *own)[: end - begin]

    def norm(x, i):
        groups = x.unflatten(-1, (-1, len(weights[i])))
        return _ops.rms_norm(groups, weights[i], eps[i], offset, bool(rounds))[0].flatten(-2)

    batch, tokens, size = *x.shape[:2], keys.shape[3]
    q, k, v = layers(norm(x, 0), 0, 3)
    if norms > 2:
        q, k = norm(q, 2), norm(k, 3)
    q, k, v = (y.view(batch, tokens, -1, size).transpose(1, 2) for y in (q, k, v))
    q, k = _ops.rotary_embedding(q, k, cos, sin)
    for memory, new in ((keys, k), (values, v)):
        memory.narrow(2, past, tokens).copy_(new)
    seen = (memory.narrow(2, 0, past + tokens) for memory in (keys, values))
    out = _ops.scaled_dot_product_attention(q, *seen, mask, False, scale, 0.0, None, None)[0]
    h = x + layers(out.transpose(1, 2).reshape(batch, tokens, -1), 3, 4)[0]
    gate, up = layers(norm(h, 1), 4, 6)
    return h + layers(_ops.gated_activation(gate, up, activation), 6, 7)[0]


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
    # Without norms of q and k, with norms of each head, and with norms of all heads together.
    for of_q, of_k in ((0, 0), (size, size), (hidden, 2 * size)):
        weights = [inputs.vector(count).to(inputs.dtype) for count in (hidden, hidden, of_q, of_k) if count]
        eps, own = [1e-5, 2e-5, 3e-5, 4e-5][: len(weights)], [0, 1, len(weights)]
        lists = ([*weights, *tensors], [*own, *sizes], [*eps, 0.0, 0.2, *numbers], 0)
        for given in (mask, None):
            yield "decoder_layer", (draw(2, tokens, hidden), cos, sin, given, keys, values, past, *lists)
