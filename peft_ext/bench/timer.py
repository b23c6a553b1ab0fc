"""Computes the errors of contenders against float64, then times all contenders in turn, in one process.

Machines are shared and clocks drift, so that a single time says little. A round measures one time of each contender;
the order of the contenders rotates from round to round. A reported ratio is the median, over the rounds, of the
quotient of two contenders' times in the same round. A peer (a contender other than peft_ext) whose call takes more than
``LONGEST_CALL_S`` seconds is timed in the first round only. Before each call, outside the timed part, a contender
selects the weights of the call: the same weights in each call ("hot"), or the next of so many weights that no cache
holds all of them ("rotating"). The time of a short call is the mean of several calls in a row, as in generation: a
single call would be slower, because another contender's data is in the caches and threads have to wake up.

:func:`verify` requires a float64 result for the first contender, which is peft_ext, and raises an error if peft_ext's
result differs too much from the float64 result. The errors of peers are recorded and have no limit.
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

SEED = 0  # Seed of each call in ``verify``, and of the dropout mask in the call's float64 result.
LONGEST_CALL_S = 5.0  # A peer whose call takes more than LONGEST_CALL_S seconds is timed only once.
SHORT_CALL_S = 5e-3  # A call that takes fewer than SHORT_CALL_S seconds is repeated.
# A short call is repeated until the repetitions take SHORT_CALLS_S seconds together, but at most SHORT_CALLS times.
SHORT_CALLS_S, SHORT_CALLS = 20e-3, 200


@dataclass
class Contender:
    """One implementation of the operator that a benchmark compares, such as peft_ext's or PEFT's.

    Attributes:
        run: function that makes the call whose time is measured.
        outputs: function of the return value of ``run``, which returns the results of the call by name.
        exact: function that returns the float64 results under the same names as ``outputs``. ``exact`` runs under the
            same seed as ``run``, so that both draw the same dropout mask. For a contender without a float64 result,
            ``exact`` is the reason, as a string.
        take: function that selects the weights of a call; ``take`` runs before each call and is not timed.
    """

    run: Callable[[], Any]
    outputs: Callable[[Any], dict[str, Tensor]]
    exact: Union[Callable[[], dict[str, Tensor]], str]
    take: Callable[[], Any] = lambda: None


# Type of functions such as host_clock, which return, for a contender, a function that measures the seconds of a call.
Clock = Callable[[Contender], Callable[[], float]]


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns the seconds that a call of ``run`` takes. Where CUDA is in use, the work on the GPU is included."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def host_clock(contender: Contender) -> Callable[[], float]:
    """Returns a function that measures, by the host's clock, the seconds of a contender's call.

    For a call shorter than ``SHORT_CALL_S``, the function returns the mean of several calls after a first call.
    """

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
    """Returns ``|value - exact| / |exact|`` (Frobenius norms), or ``|value - exact|`` where exact is zero."""
    if value.numel() != exact.numel():
        raise ValueError(f"relative_error: value has shape {tuple(value.shape)}, wanted {tuple(exact.shape)}")
    difference = (value.detach().double().reshape(-1) - exact.double().reshape(-1)).norm().item()
    return difference / (exact.double().norm().item() or 1.0)


def error_text(error: Exception) -> str:
    """Returns the class of an error and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


def verify(
    op: str, contenders: Mapping[str, Contender], tolerance: float
) -> tuple[dict[str, Union[dict[str, float], str]], dict[str, str]]:
    """Returns ``(errors, absent)``, two mappings with the contenders' names as keys: the relative errors by output, and
    why a peer can't run.

    Where a peer has no float64 result, its entry in ``errors`` is the reason. Raises AssertionError where a relative
    error of the first contender, which is peft_ext's, is above ``tolerance``. Raises ValueError where the first
    contender has no float64 result, or where the names or sizes of a contender's outputs differ from those of its
    float64 results. An error that the first contender's call raises is raised unchanged.
    """
    errors: dict[str, Union[dict[str, float], str]] = {}
    absent: dict[str, str] = {}
    exact_by_function: dict[int, dict[str, Tensor]] = {}  # contenders with the same `exact` share its result
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
            if wrong:  # an assert statement would do nothing under python -O
                raise AssertionError(f"{op}: {name} is off from float64 by {wrong}, tolerance {tolerance}")
    return errors, absent


def interleave(
    samples: Mapping[str, Callable[[], float]], budget_s: float, *, least: int, most: int
) -> dict[str, list[float]]:
    """Returns, for each function in ``samples``, the seconds that it returned in each round; the rounds take about
    ``budget_s`` seconds in all.

    A first round, which warms up, is not counted. The number of counted rounds, from ``least`` to ``most``, follows
    from the seconds of the first round. A sample that takes longer than ``LONGEST_CALL_S`` in the first round, such as
    a bfloat16 product on a CPU without bfloat16 instructions, is not measured again: the time of the first round is its
    result. The first sample, which is peft_ext's, is measured in all rounds.
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
    """Returns, for each contender except the first, the median over the rounds of the ratio of the contender's time to
    the first contender's time."""
    return {name: statistics.median(ratios) for name, ratios in _ratios(times).items()}


def quartile_ratios(times: Mapping[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Returns the first and the third quartile of the ratios whose median :func:`median_ratios` returns."""

    def quartiles(ratios: list[float]) -> tuple[float, float]:
        if len(ratios) == 1:
            return ratios[0], ratios[0]
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
        return first, third

    return {name: quartiles(ratios) for name, ratios in _ratios(times).items()}


def _ratios(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    ours, *others = times
    return {name: [t / o for t, o in zip(times[name], times[ours], strict=False)] for name in others}
