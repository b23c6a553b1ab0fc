"""Mixtures whose experts are modules of their own, with the loops that models have, and such as can't be taken apart.

Each block takes tokens ``[T, K]`` and chooses the experts of each by a router of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

K, INNER, EXPERTS, TOP = 32, 24, 6, 2


class Mlp(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(K, INNER, bias=bias), nn.Linear(K, INNER, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(INNER, K, bias=bias), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, experts: int = EXPERTS, bias: bool = False) -> None:
        super().__init__()
        self.num_experts = experts
        self.router = nn.Linear(K, experts, bias=False)
        self.experts = nn.ModuleList(Mlp(bias) for _ in range(experts))
        self.dropout = nn.Dropout(0.5)
        self.total = 0

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts ``[T, k]``; the last expert gets nothing, the first all of an eighth of the tokens."""
        logits = self.router(x).float()
        logits[:, -1] = -1e9
        logits[: x.shape[0] // 8, 0] = 1e2
        weights, chosen = torch.topk(logits.softmax(-1), TOP, dim=-1)
        return weights.to(x.dtype), chosen


class IndexAdd(Block):
    """The experts that were chosen, as in most models."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert in hit:
            layer = self.experts[expert]
            at, token = torch.where(mask[expert].squeeze(0))
            rows = x[None, token].reshape(-1, x.shape[-1])
            result = layer(rows) * weights[token, at, None]
            out.index_add_(0, token, result.to(x.dtype))
        return out


class All(Block):
    """All experts, whether they have rows or not."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, at = torch.where(chosen == expert)
            out.index_add_(0, token, self.experts[expert](x[token]) * weights[token, at, None])
        return out


class SkipEmpty(Block):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            token, at = torch.where(chosen == i)
            if token.shape[0] == 0:
                continue
            rows = x[token]
            out.index_add_(0, token, self.experts[i](rows) * weights[token, at, None])
        return out


class Enumerated(Block):
    """A result for each of a token's experts, written to its place."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        each = x.repeat_interleave(TOP, dim=0)
        flat, y = chosen.view(-1), torch.empty_like(each)
        for i, expert in enumerate(self.experts):
            y[flat == i] = expert(each[flat == i])
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


class Sorted(Block):
    """Rows sorted by expert, slice by slice, with a count that goes along."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        order = chosen.view(-1).argsort()
        rows, counts = x[order // TOP], chosen.view(-1).bincount(minlength=self.num_experts).tolist()
        parts = []
        begin = 0
        for i, count in enumerate(counts):
            end = begin + count
            if count == 0:
                continue
            expert = self.experts[i]
            own = rows[begin:end]
            result = expert(own)
            parts.append(result)
            begin = end
        y = torch.cat(parts)[order.argsort()]
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


class Dropped(Block):
    """As NLLB's: what an expert gave is dropped, or scaled in place."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            token, at = torch.where(chosen == i)
            result = self.experts[i](x[token]) * weights[token, at, None]
            if self.training:
                result = self.dropout(result)
            else:
                result *= 0.5
            out.index_add_(0, token, result)
        return out


class Named(nn.ModuleDict):
    """A list of experts with a forward of its own."""

    def __init__(self) -> None:
        super().__init__({f"expert_{i}": Mlp() for i in range(EXPERTS)})

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in chosen.unique():
            token, at = torch.where(chosen == i)
            out.index_add_(0, token, self[f"expert_{i}"](x[token]) * weights[token, at, None])
        return out


class OfNamed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Named()

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        return self.experts(x, chosen, weights)


# --- what has to stay as it is ----------------------------------------------------------------------------------------


class Chained(Block):
    """An expert's rows hang on what the expert before gave."""

    def forward(self, x: Tensor) -> Tensor:
        out = x * 1.0
        for i in range(self.num_experts):
            out = out + self.experts[i](out)
        return out


class InPlace(Block):
    """The same, changed in place under another name, which the source does not show."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x * 1.0
        out = hidden.view(-1, K)
        token = torch.arange(x.shape[0], device=x.device)
        for i in range(self.num_experts):
            rows = hidden[token]
            result = self.experts[i](rows)
            with_no_graph = result.detach()
            out.index_add_(0, token, with_no_graph)
        return out + result


class OfBuffer(Block):
    """The same, through an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", torch.zeros(64, K), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.held
        out.copy_(x)
        for i in range(self.num_experts):
            result = self.experts[i](self.held[: x.shape[0]] * 1.0)
            out.add_(result.detach())
        return out + result


class Counting(Block):
    """A count that the second half gives and the first reads."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        scale = 1.0
        for i in range(self.num_experts):
            result = self.experts[i](x * scale)
            scale = scale * 0.5 + float(result.detach().mean()) * 0.0
            out = out + result
        return out


class Stops(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            result = self.experts[i](x)
            out = out + result
            if i == 2:
                break
        return out


class Tells(Block):
    """Leaves on itself what it saw, as it goes."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            scale = 1.0 + self.total
            out = out + self.experts[i](x * scale)
            self.total = self.total + 1
        self.total = 0
        return out


class Calls(Block):
    """Calls something else of its own in between."""

    def look(self, x: Tensor) -> float:
        self.total += 1
        return float(self.total)

    def forward(self, x: Tensor) -> Tensor:
        self.total = 0
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            out = out + self.experts[i](x * self.look(x))
        return out


class Views(Block):
    """A view of the input, scaled in place."""

    def forward(self, x: Tensor) -> Tensor:
        hidden, total = x * 1.0, torch.zeros_like(x)
        for i in range(self.num_experts):
            result = self.experts[i](hidden * 1.0)
            part = hidden[: x.shape[0] // 2].detach()
            part *= 0.5
            total = total + result
        return total


class AddedTo(Block):
    """As InPlace, by ``+=``."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x * 1.0
        out = hidden.view(-1, K)
        for i in range(self.num_experts):
            result = self.experts[i](hidden * 1.0)
            out += result.detach()
        return out + result


class OfList(Block):
    """A list of results, read under another name."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [x * 1.0]
        seen = parts
        for i in range(self.num_experts):
            rows = x * float(len(seen))
            result = self.experts[i](rows)
            parts += [result]
        return torch.stack(parts).sum(0)


class InList(Block):
    """A tensor of a list, changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x * 1.0
        held = [hidden]
        for i in range(self.num_experts):
            result = self.experts[i](hidden * 1.0)
            held[0].add_(result.detach())
        return hidden + result


class Moves(Block):
    """The input itself, changed in place before each call."""

    def forward(self, x: Tensor) -> Tensor:
        out, moved = torch.zeros_like(x), x.detach() * 1.0
        for i in range(self.num_experts):
            moved += x.detach()[0]
            result = self.experts[i](moved)
            out = out + result.detach()
        return out + result


class SkipsCount(Block):
    """A count of those results that are used."""

    def forward(self, x: Tensor) -> Tensor:
        out, n = torch.zeros_like(x), 0
        for i in range(self.num_experts):
            result = self.experts[i](x * (1 + n))
            if i % 2:
                continue
            out = out + result
            n = n + 1
        return out


class OnePath(Block):
    """A value that the first half gives in one turn and the second in all."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            if i == 0:
                scale = 3.0
            result = self.experts[i](x)
            out = out + result * scale
            scale = 1.0
        return out


class Unbound(Block):
    """A name that has a value in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            if not self.training:
                factor = 1.0 + i
            result = self.experts[i](x)
            if not self.training:
                result = result * factor
            out = out + result
        return out


class Drawn(Block):
    """Rows of a generator, which reads what a turn left."""

    def forward(self, x: Tensor) -> Tensor:
        held = {"x": x}
        rows = map(held.get, ["x"] * self.num_experts)
        for expert, own in zip(self.experts, rows, strict=True):
            result = expert(own)
            held["x"] = result
        return held["x"]


class Held(Block):
    """Something that keeps what it is given."""

    class Store:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def get(self) -> Tensor:
            return self.x

        def put(self, x: Tensor) -> None:
            self.x = x

    def forward(self, x: Tensor) -> Tensor:
        store = Held.Store(x)
        for i in range(self.num_experts):
            rows = store.get()
            result = self.experts[i](rows)
            store.put(result)
        return store.get()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(1), persistent=False)


class OfChild(Block):
    """A buffer of a child's, changed under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.stats = Inner()

    def forward(self, x: Tensor) -> Tensor:
        load, out = self.stats.load, torch.zeros_like(x)
        load.zero_()
        for i in range(self.num_experts):
            result = self.experts[i](x * (1 + self.stats.load.item()))
            load += 1
            out = out + result
        return out


class Asked(OfChild):
    """The same, asked for by name."""

    def forward(self, x: Tensor) -> Tensor:
        load, out = self.stats.load, torch.zeros_like(x)
        load.zero_()
        for i in range(self.num_experts):
            stats = getattr(self, "stats")  # noqa: B009
            result = self.experts[i](x * (1 + stats.load.item()))
            load += 1
            out = out + result
        return out


class Numpy(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = x.detach() * 1.0
        other = torch.from_numpy(hidden.numpy())
        for i in range(self.num_experts):
            result = self.experts[i](other * 1.0)
            hidden.add_(result.detach())
        return hidden + result


class Narrowed(Block):
    """A part of a buffer, which a function gives and no name shows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.load.fill_(1.0)
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            result = self.experts[i](x * float(self.load[0]))
            part = torch.narrow(self.load, 0, 0, 1)
            part *= 0.5
            out = out + result
        return out


class Seeds(Block):
    """A seed of each turn's own."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            torch.manual_seed(i)
            result = self.experts[i](x)
            out = out + F.dropout(result, 0.5)
        return out


class Later(Block):
    """A function that is made before the loop and called behind it."""

    def forward(self, x: Tensor) -> Tensor:
        out, scale = torch.zeros_like(x), 1.0
        last = lambda: scale  # noqa: E731
        for i in range(self.num_experts):
            scale = 1.0 + i
            result = self.experts[i](x)
            out = out + result * scale
        return out * last()


STEP = 0


class Global(Block):
    """A number of the module's, which the forward changes."""

    def forward(self, x: Tensor) -> Tensor:
        global STEP
        STEP += 1
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            result = self.experts[i](x)
            out = out + result
        return out


class Summed(Block):
    """Results that are kept, and changed in place behind the loop."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the sum of all,

        each of all tokens."""
        parts = []
        for expert in self.experts:
            parts.append(expert(x))
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total


class Gathers(Block):
    """A call among processes, that is no function of its arguments."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(self.num_experts):
            result = self.experts[i](x)
            torch.distributed.gather(result)
            out = out + result
        return out


LOOPS: dict[str, Any] = {
    kind.__name__: kind for kind in (IndexAdd, All, SkipEmpty, Enumerated, Sorted, Dropped, OfNamed, Summed)
}
WHOLE: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        Chained,
        InPlace,
        OfBuffer,
        Counting,
        Stops,
        Tells,
        Calls,
        Views,
        AddedTo,
        OfList,
        InList,
        Moves,
        SkipsCount,
        OnePath,
        Unbound,
        Held,
        OfChild,
        Asked,
        Numpy,
        Narrowed,
        Seeds,
        Later,
        Global,
        Drawn,
    )
}
