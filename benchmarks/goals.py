"""What a GPU has to reach, and what it reached, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

__all__ = ["GOALS", "Goal", "goal_rows", "goals_table", "has_goal"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of some rows.

    Attributes:
        name: what is wanted of what. op, case: the operator, and what the name of its case ends with ("": any).
        weights: how the rows are timed. tokens: those it is wanted at; none: an operator without tokens.
        bound: the figure that is wanted, at least, or with ``at_most`` at most. unit: "x" or "%".
        value: the figure of a row; None where its peer is absent.
    """

    name: str
    op: str
    case: str
    weights: str
    tokens: tuple[Optional[int], ...]
    bound: float
    value: Callable[[Row], Optional[float]]
    unit: str = "x"
    at_most: bool = False

    def wants(self, op: str, case: str, tokens: Optional[int], weights: str) -> bool:
        return op == self.op and weights == self.weights and tokens in self.tokens and case.endswith(self.case)

    def text(self, figure: float) -> str:
        return f"{figure:.0f}%" if self.unit == "%" else f"{figure:.2f}x"


def _ratio(peer: str) -> Callable[[Row], Optional[float]]:
    return lambda row: row["speedup"].get(peer)


def _share_of_frozen(row: Row) -> Optional[float]:
    ratio = row["speedup"].get("frozen")
    return 1 / ratio if ratio else None


GOALS = (
    Goal("`nf4_dequantize`, of the copy bandwidth", "nf4_dequantize", "", "graph", (None,), 90.0,
         lambda row: row["roofline"].get("ours"), unit="%"),
    Goal("`nf4_dequantize`, faster than bitsandbytes", "nf4_dequantize", "", "graph", (None,), 1.3,
         _ratio("bitsandbytes")),
    Goal("`nf4_linear`, faster than bitsandbytes", "nf4_linear", "4096->4096, forward", "graph", (8, 16, 32, 64), 1.5,
         _ratio("bitsandbytes")),
    Goal("DoRA's norm, faster than the dense way", "dora_weight_norm", "", "graph", (None,), 3.0, _ratio("dense")),
    Goal("LoRA with dropout, of the frozen layer's time", "lora_linear", ", bf16 base, dropout 0.05", "rotating",
         (8192,), 1.12, _share_of_frozen, at_most=True),
    Goal("DoRA, of the frozen layer's time", "dora_linear", " 4096->4096, bf16 base", "rotating", (8192,), 1.30,
         _share_of_frozen, at_most=True),
    Goal("IA3, of the frozen layer's time", "ia3_linear", ", bf16 base, output", "rotating", (8192,), 1.10,
         _share_of_frozen, at_most=True),
)  # fmt: skip


def has_goal(op: str, case: str, tokens: Optional[int], weights: str) -> bool:
    return any(goal.wants(op, case, tokens, weights) for goal in GOALS)


def goal_rows(result: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """``(goal, case, wanted, measured, met)`` of each row of a result file that a goal is about."""
    found = []
    for goal in GOALS:
        wanted = f"{'at most' if goal.at_most else 'at least'} {goal.text(goal.bound)}"
        rows = [row for row in result["rows"] if goal.wants(row["op"], row["case"], row["tokens"], row["weights"])]
        for row in rows:
            figure = goal.value(row)
            if figure is None:
                found.append((goal.name, row["case"], wanted, "the peer is absent", ""))
            else:
                met = figure <= goal.bound if goal.at_most else figure >= goal.bound
                found.append((goal.name, row["case"], wanted, goal.text(figure), "yes" if met else "no"))
        if not rows:
            found.append((goal.name, "", wanted, "not measured", ""))
    return found


def goals_table(result: dict[str, Any]) -> str:
    lines = ["| goal | case | wanted | measured | met |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in goal_rows(result))])
