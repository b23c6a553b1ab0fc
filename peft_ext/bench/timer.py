"""Verify against float64 first, then time all contenders in turn, in one process.

Machines are shared and clocks drift, so a lone time says little: every round runs each contender once, in rotating
order, and a ratio is the median over rounds of the two times of the same round. Before each call, outside the timed
part, a contender takes its weights: the same ones again ("hot"), or the next of so many that no cache holds them
("rotating"). A short call is timed as one of several in a row, as a generation runs them: alone it would pay for what
the contender before it left in the caches and for threads that had gone to sleep.

A comparison without a float64 result is not possible: :class:`Contender` asks for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from ..sources.json_file import first_line

SEED = 0  # of each verified call and of the mask that its float64 result draws
LONGEST_CALL_S = 5.0
# A call below the first is repeated until the calls take the second together, or are so many.
SHORT_CALL_S, SHORT_CALLS_S, SHORT_CALLS = 5e-3, 20e-3, 200


@dataclass
class Contender:
    """One way to compute what is compared.

    Attributes:
        run: the timed call.
        outputs: what a call computed, by name, from what it returned.
        exact: the same in float64, by the same names; called under the seed that the call had, so that it can draw the
            same dropout mask. A peer whose mask nobody can draw again has the reason instead.
        take: what comes before each call and is not timed: the weights of this call.
    """

    run: Callable[[], Any]
    outputs: Callable[[Any], dict[str, Tensor]]
    exact: Union[Callable[[], dict[str, Tensor]], str]
    take: Callable[[], Any] = lambda: None


# Gets a contender ready, and returns what takes one time of it: the seconds of a call.
Clock = Callable[[Contender], Callable[[], float]]


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns the seconds of a call, a GPU's work included where one is in use."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def host_clock(contender: Contender) -> Callable[[], float]:
    """Returns what takes the host's time of a call: of a short one, the mean of several, a first one not counted."""

    def once() -> float:
        contender.take()
        return seconds_of(contender.run)

    def sample() -> float:
        first = once()
        if first >= SHORT_CALL_S:
            return first
        calls, total = 1, once()
        while total < SHORT_CALLS_S and calls < SHORT_CALLS:
            calls, total = calls + 1, total + once()
        return total / calls

    return sample


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Returns ``|value - exact| / |exact|``, Frobenius; the norm of the difference where exact is zero."""
    if value.numel() != exact.numel():
        raise ValueError(f"relative_error: value has shape {tuple(value.shape)}, wanted {tuple(exact.shape)}")
    difference = (value.detach().double().reshape(-1) - exact.double().reshape(-1)).norm().item()
    return difference / (exact.double().norm().item() or 1.0)


def error_text(error: Exception) -> str:
    """Returns an error's class and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


def verify(
    op: str, contenders: Mapping[str, Contender], tolerance: float
) -> tuple[dict[str, Union[dict[str, float], str]], dict[str, str]]:
    """Returns ``(errors, absent)`` by contender, ours first: relative errors by output, and why a peer can't run.

    Raises AssertionError where ours is off by more than ``tolerance``; 0: it has the very bits.
    """
    errors: dict[str, Union[dict[str, float], str]] = {}
    absent: dict[str, str] = {}
    exact_by_function: dict[int, dict[str, Tensor]] = {}  # peers with one float64 result share it
    for turn, (name, contender) in enumerate(contenders.items()):
        contender.take()
        torch.manual_seed(SEED)
        try:
            found = contender.outputs(contender.run())
        except Exception as error:
            if turn == 0:
                raise
            absent[name] = error_text(error)
            continue
        if isinstance(contender.exact, str):
            if turn == 0:
                raise ValueError(f"{op}: {name} has no float64 result to be verified against")
            errors[name] = contender.exact
            continue
        if (key := id(contender.exact)) not in exact_by_function:
            torch.manual_seed(SEED)
            exact_by_function[key] = contender.exact()
        exact = exact_by_function[key]
        if found.keys() != exact.keys():
            raise ValueError(f"{op}: {name} computes {sorted(found)}, its float64 result has {sorted(exact)}")
        by_output = {output: float(f"{relative_error(found[output], exact[output]):.3g}") for output in exact}
        errors[name] = by_output
        if turn == 0:
            wrong = {output: error for output, error in by_output.items() if not error <= tolerance}
            assert not wrong, f"{op}: {name} is off from float64 by {wrong}, tolerance {tolerance}"
    return errors, absent


def interleave(
    samples: Mapping[str, Callable[[], float]], budget_s: float, *, least: int, most: int
) -> dict[str, list[float]]:
    """Returns the seconds of each sample by round, of rounds that take about ``budget_s`` in all.

    A first round warms up and is not counted; it tells how many there can be, between ``least`` and ``most``. Of a
    sample that takes longer than ``LONGEST_CALL_S`` in it that time is all there is: bfloat16 on a CPU without
    instructions for it. The first sample is not one of these, however long it takes.
    """
    times: dict[str, list[float]] = {name: [] for name in samples}
    spent = {name: seconds_of(lambda name=name: times[name].append(samples[name]())) for name in samples}
    ours, *others = samples
    names = [ours, *(name for name in others if times[name][0] <= LONGEST_CALL_S)]
    times.update({name: [] for name in names})
    for turn in range(max(least, min(most, int(budget_s / max(sum(spent[name] for name in names), 1e-6))))):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(samples[name]())
    return times


def median_ratios(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns each one's time over the first one's, the median over rounds (above 1: the first is faster)."""
    return {name: statistics.median(ratios) for name, ratios in _ratios(times).items()}


def quartile_ratios(times: Mapping[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Returns the first and the third quartile of what :func:`median_ratios` has the median of."""

    def quartiles(ratios: list[float]) -> tuple[float, float]:
        if len(ratios) == 1:
            return ratios[0], ratios[0]
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
        return first, third

    return {name: quartiles(ratios) for name, ratios in _ratios(times).items()}


def _ratios(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    ours, *others = times
    return {name: [t / o for t, o in zip(times[name], times[ours], strict=False)] for name in others}
