"""Computes what the operators of a training step cost on 16 to 192 threads, from records of their parallel loops.

    python tools/many_cores.py               record everything, write many_cores.json, draw docs/performance.md's tables
    python tools/many_cores.py --trace 64    record only the cache lines and pages of 64 threads, and keep the record
    python tools/many_cores.py --only norm   record only the operators with "norm" in their names, and draw the tables
    python tools/many_cores.py --draw        draw the tables of docs/performance.md from many_cores.json
    python tools/many_cores.py --loops 64    print each operator's loops on 64 threads from many_cores.json

tools/recorded_loops.py runs the operators and records how they divide their work. :func:`loop_seconds` computes the
time of a loop from the record and from the constants of a :class:`Machine`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from typing import Any, Optional

import recorded_loops
from native_build import ROOT
from recorded_loops import ACCESSES, FROM_DRAM, FROM_L2, FROM_L3, GROUP, TAKEN, THREAD, TIME, TO

DOCUMENT, RECORDS = ROOT / "docs/performance.md", ROOT / "tools/many_cores.json"
BEGIN, END = "<!-- computed: python tools/many_cores.py -->", "<!-- /computed -->"
THREADS = (16, 64, 96, 192)
LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Machine:
    """The constants of a machine in which each group of GROUP cores shares an L3 cache. Rates are in bytes/s, and times
    in seconds."""

    sockets: int
    l3_rate: float  # Rate at which one core reads from L3.
    group_rate: float  # Rate at which the cores that share an L3 together read from DRAM.
    socket_rate: float  # Rate at which the cores of one socket together read from the socket's DRAM.
    link_rate: float  # Rate at which one socket reads from the other socket.
    empty: float  # Time of an empty loop on two threads.
    # Time to get a cache line that another core of the same socket wrote. A line from the other socket takes twice as
    # long.
    transfer: float

    def line_seconds(self) -> float:
        return self.transfer * (1.5 if self.sockets == 2 else 1.0)

    def start_seconds(self, threads: int) -> float:
        """Returns the time that the start and the end of a loop take, for threads that wait actively.

        libgomp's first thread writes a record for each other thread, and each thread adds to a shared counter at the
        end of the loop. The model therefore transfers two cache lines, one after the other, for each thread after the
        second.
        """
        return self.empty + 2 * (threads - 2) * self.line_seconds()


# The data sheets of AMD's EPYC 9004 state 8 cores and 32 MiB of L3 for each die, 1 MiB of L2 for each core, 12 channels
# of DDR5-4800 for each socket (460 GB/s), four xGMI links of 32 GB/s, and 32 bytes in a clock of 1.8 GHz between a die
# and the memory. The model assumes 80% of the DRAM's rate, 16 bytes in a clock of 3 GHz from L3 to a core, and 0.1 µs
# for the transfer of a cache line. recorded_loops.time_here measured 0.6 µs for an empty loop on two cores.
ONE_SOCKET = Machine(1, 48e9, 57e9, 368e9, 128e9, 6e-7, 1e-7)
TWO_SOCKETS = replace(ONE_SOCKET, sockets=2)


# --- what a record tells ----------------------------------------------------------------------------------------------


def plan_of(row: dict[str, Any]) -> list[Any]:
    """Returns a list with, for each loop of the record ``row``, the loop's name and the range of work that each thread
    computes, without counts and times."""
    return [[loop["name"], [part[: TO + 1] for part in loop["parts"]]] for loop in row["loops"]]


def summary(timed: dict[str, Any], traced: Optional[dict[str, Any]]) -> dict[str, Any]:
    """Returns a dict with the times of an operator's parallel loops and, if ``traced`` is given, the counts of cache
    lines. ``timed``: a record with CPU times. ``traced``: a record with counts of cache lines, or None. Raises
    AssertionError if the two records divide the work differently."""
    where = {key: timed[key] for key in ("operator", "direction", "threads", "isa")}
    if traced is not None and plan_of(timed) != plan_of(traced):
        raise AssertionError(f"{where}: the two libraries divide the work differently")
    loops = []
    for number, loop in enumerate(timed["loops"]):
        times = [part[TIME] / 1e9 for part in loop["parts"]]
        loops.append({"name": loop["name"], "parts": len(times), "sum": sum(times), "most": max(times)})
        if traced is None:
            continue
        lines = traced["loops"][number]
        columns = list(zip(*lines["parts"], strict=True))
        by_group: dict[int, int] = {}
        for thread, count in zip(columns[THREAD], columns[FROM_DRAM], strict=True):
            by_group[thread // GROUP] = by_group.get(thread // GROUP, 0) + count
        loops[-1].update(accesses=sum(columns[ACCESSES]), most_accesses=max(columns[ACCESSES]),
                         l2=LINE * sum(columns[FROM_L2]), l3=LINE * sum(columns[FROM_L3]),
                         most_l3=LINE * max(columns[FROM_L3]), dram=LINE * sum(by_group.values()),
                         most_dram=LINE * max(by_group.values()), shared=lines["shared"],
                         most_taken=max(columns[TAKEN]))  # fmt: skip
    pages = {} if traced is None else {key: traced[key] for key in ("pages", "huge_pages")}
    return {**where, "teams": timed["teams"], "serial": timed["serial"][0] / 1e9, **pages, "loops": loops}


# --- the model --------------------------------------------------------------------------------------------------------


def loop_seconds(loop: dict[str, Any], machine: Machine) -> float:
    """Returns the seconds of a loop without its start and end: the time of its slowest thread or of the memory,
    whichever is longer. The memory's time is left out if the record has no counts of cache lines."""
    if "dram" not in loop:
        return loop["most"]
    thread = max(loop["most"], loop["most_l3"] / machine.l3_rate) + loop["most_taken"] * machine.line_seconds()
    of_socket = loop["dram"] / machine.sockets
    # The pages of the operands are spread over both sockets, so that half of the bytes that a socket reads come over
    # the link between the sockets.
    link = of_socket / 2 / machine.link_rate if machine.sockets == 2 else 0.0
    return max(thread, loop["most_dram"] / machine.group_rate, of_socket / machine.socket_rate, link)


@dataclass(frozen=True)
class Cost:
    """The time of an operator on many threads, divided by the ideal: the time on one thread / the number of threads."""

    work: float  # Time of the loops if the work of each loop were divided equally among all threads.
    uneven: float  # Time that the loops take longer because their busiest threads have more work than the mean.
    memory: float  # Time in which threads wait for L3, for DRAM and for cache lines that another thread wrote.
    starts: float  # Time in which loops start and end.
    serial: float  # Time of the code between the loops.

    @property
    def total(self) -> float:
        return self.work + self.uneven + self.memory + self.starts + self.serial


def cost(rows: list[dict[str, Any]], one: list[dict[str, Any]], machine: Machine) -> Cost:
    """Returns the :class:`Cost` of the calls recorded in ``rows`` together, such as the rows of a forward and a
    backward. ``one``: the rows of the same operators and directions on one thread."""
    threads = rows[0]["threads"]
    ideal = sum(row["serial"] for row in one) / threads
    loops = [loop for row in rows for loop in row["loops"]]
    work, slowest = sum(loop["sum"] for loop in loops) / threads, sum(loop["most"] for loop in loops)
    waits = sum(loop_seconds(loop, machine) for loop in loops)
    starts = sum(row["teams"] for row in rows) * machine.start_seconds(threads)
    serial = sum(row["serial"] for row in rows)
    return Cost(*(seconds / ideal for seconds in (work, slowest - work, waits - slowest, starts, serial)))


def busy(row: dict[str, Any]) -> float:
    """Returns how evenly the loops of a row divide their work: the mean number of memory accesses of a thread, summed
    over the loops, divided by the number of accesses of each loop's busiest thread, summed over the loops. If the
    record of a loop has no counts of accesses, CPU times take the place of the accesses."""
    loops = row["loops"]
    most, total = ("most_accesses", "accesses") if all("dram" in loop for loop in loops) else ("most", "sum")
    slowest = sum(loop[most] for loop in loops)
    return sum(loop[total] for loop in loops) / (row["threads"] * slowest) if slowest else 1.0


# --- tables -----------------------------------------------------------------------------------------------------------

COLUMNS = {"16": (16, ONE_SOCKET), "64": (64, ONE_SOCKET), "96": (96, ONE_SOCKET), "64, two sockets": (64, TWO_SOCKETS),
           "192, two sockets": (192, TWO_SOCKETS)}  # fmt: skip
DIRECTIONS = ("forward", "backward")


class Records:
    """The content of tools/many_cores.json. The keys of ``times`` (measured seconds) and of ``rows`` (records of
    parallel loops) are triples of operator, direction and number of threads."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.times = {key_of(row): row["seconds"] for row in found["times"]}
        self.rows = {key_of(row): row for row in found["rows"]}
        self.operators = list(dict.fromkeys(row["operator"] for row in found["rows"]))

    def directions(self, operator: str) -> list[str]:
        """Returns the directions in which the operator was recorded: "forward", and "backward" if it has a gradient."""
        return [direction for direction in DIRECTIONS if (operator, direction, 1) in self.rows]

    def at(self, operator: str, threads: int) -> list[dict[str, Any]]:
        return [self.rows[operator, direction, threads] for direction in self.directions(operator)]

    def cost(self, operator: str, threads: int, machine: Machine) -> Cost:
        return cost(self.at(operator, threads), self.at(operator, 1), machine)


def _table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (corner.count(" | ") + 1) + "|---" * len(columns) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def costs_table(records: Records) -> str:
    rows = {}
    for operator in records.operators:
        cells = []
        for threads, machine in COLUMNS.values():
            of = records.cost(operator, threads, machine)
            rows_at = records.at(operator, threads)
            own = all(row["teams"] == len(row["loops"]) for row in rows_at)
            least = "≥ " * any("dram" not in loop for row in rows_at for loop in row["loops"])
            cells.append(f"{least}{of.total:.2f}" + f" ({of.total - of.serial:.2f})" * own)
        rows[operator] = cells
    return _table("operator", list(COLUMNS), rows)


def losses_table(records: Records) -> str:
    rows = {}
    for operator in records.operators:
        for threads in (64, 96):
            of = records.cost(operator, threads, ONE_SOCKET)
            rows[f"{operator} | {threads}"] = [
                f"{part:.2f}" for part in (of.work, of.uneven, of.memory, of.starts, of.serial)
            ]
    return _table("operator | threads", ["work", "uneven parts", "memory", "starts", "between loops"], rows)


def counts_table(records: Records) -> str:
    rows = {}
    for operator in records.operators:
        for direction in records.directions(operator):
            row = records.rows[operator, direction, 64]
            total = {key: sum(loop[key] for loop in row["loops"]) for key in ("shared", "l2", "l3", "dram")}
            shares = " ".join(f"{busy(records.rows[operator, direction, threads]):.2f}" for threads in THREADS)
            mib = [f"{total[key] / 2**20:.0f}" for key in ("l2", "l3", "dram")]
            pages = [f"{used}, {written}" for used, written in (row["pages"], row["huge_pages"])]
            rows[f"{operator} | {direction}"] = [str(row["teams"]), shares, str(total["shared"]), *pages, *mib]
    columns = ["loops", f"busy share at {', '.join(map(str, THREADS))}", "lines written by two threads",
               "pages of 4 KiB", "pages of 2 MiB", "MiB from L2", "MiB from L3", "MiB from DRAM"]  # fmt: skip
    return _table("operator | direction", columns, rows)


def check_table(records: Records) -> str:
    """Returns a table of the measured and computed milliseconds on one core and on two cores of the machine that made
    the records."""
    rows = {}
    for operator in records.operators:
        for direction in records.directions(operator):
            cells = []
            for threads in (1, 2):
                row = records.rows[operator, direction, threads]
                starts = row["teams"] * ONE_SOCKET.empty
                computed = row["serial"] + starts + sum(loop["most"] for loop in row["loops"])
                measured = records.times.get((operator, direction, threads))
                cells.append(f"{1e3 * computed:.2f}")
                cells += ["-", "-"] if measured is None else [f"{1e3 * measured:.2f}", f"{computed / measured:.2f}"]
            rows[f"{operator} | {direction}"] = cells
    columns = [f"{threads}: {what}" for threads in ("1 thread", "2 threads")
               for what in ("computed", "measured", "ratio")]  # fmt: skip
    return _table("operator | direction", columns, rows)


def loops_text(records: Records, threads: int) -> str:
    """Returns a text with the loops of each operator and the time that each loop loses. The unit of the lost times is
    the operator's time on one thread divided by the number of threads."""
    lines = []
    for operator in records.operators:
        ideal = sum(row["serial"] for row in records.at(operator, 1)) / threads
        for row in records.at(operator, threads):
            lines.append(f"{operator}, {row['direction']}: ideal {1e6 * ideal:.0f} µs, between loops "
                         f"{row['serial'] / ideal:.2f}")  # fmt: skip
            for loop in row["loops"]:
                work = loop["sum"] / threads
                lost = (loop_seconds(loop, ONE_SOCKET) + ONE_SOCKET.start_seconds(threads) - work) / ideal
                lines.append(f"    {loop['name']:24} {loop['parts']:3} parts, busy {work / loop['most']:.2f} by time, "
                             f"lost {lost:.2f}")  # fmt: skip
                if "dram" in loop:
                    share = loop["accesses"] / threads / max(1, loop["most_accesses"])
                    mib = ", ".join(f"{key} {loop[key] / 2**20:.1f}" for key in ("l2", "l3", "dram"))
                    lines[-1] += f"; busy {share:.2f} by accesses, {loop['shared']} shared lines, MiB: {mib}"
    return "\n".join(lines)


def table(records: Records) -> str:
    """Returns the computed tables that docs/performance.md shows."""
    return "\n\n".join([
        "**Computed cost** of a forward and a backward, and for the decoder layer of a forward alone. A figure in "
        "parentheses leaves out the code between the loops, except where this code calls PyTorch's products. A figure "
        "after ≥ leaves out the time of the memory:",
        costs_table(records),
        "**Computed parts of the cost** on one socket; the ideal is 1 for the work, and 0 for the other parts:",
        losses_table(records),
        "**Counts** of the work of an operator's parallel loops: the busy share for each number of threads, all other "
        "columns for 64 threads. Of the two counts in a column of pages, the first counts the pages that two sockets "
        "use, the second the pages that two sockets write:",
        counts_table(records),
        "**Computed and measured milliseconds** on the two cores of the measured machine:",
        check_table(records),
    ])  # fmt: skip


def key_of(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["operator"], row["direction"], row["threads"]


def record(names: list[str]) -> dict[str, Any]:
    """Returns the records of the operators ``names``, and the measured times of these operators on this machine."""
    traced = {key_of(row): row for threads in THREADS for row in recorded_loops.traced_rows(threads, names)}
    times = recorded_loops.child("time_here", names=names, repeats=5)
    timed = recorded_loops.child("record_here", names=names, threads=[1, 2, *THREADS], repeats=4)
    rows = [summary(row, traced.get(key_of(row))) for row in timed]
    # The code between the loops is the same for every number of threads from two on, but on the recording machine its
    # data has left the caches after a loop of many threads. Rows of two and more threads therefore get the least
    # measured time of this code. Rows of an operator that calls PyTorch's own loops keep their times, which contain the
    # time of PyTorch's loops.
    least: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["threads"] > 1 and row["teams"] == len(row["loops"]):
            place = row["operator"], row["direction"]
            least[place] = min(row["serial"], least.get(place, row["serial"]))
    for row in rows:
        if row["threads"] > 1 and row["teams"] == len(row["loops"]):
            row["serial"] = least[row["operator"], row["direction"]]
    return {"times": times, "rows": rows}


def merged(kept: dict[str, Any], new: dict[str, Any], operators: list[str]) -> dict[str, Any]:
    """Returns the content of many_cores.json after a record of some operators: the rows ``new``, and the rows ``kept``
    of the operators that ``new`` does not have. The rows are in the order of ``operators``, and the rows of other
    operators are left out."""
    found = {}
    for name, rows in new.items():
        recorded = {row["operator"] for row in rows}
        rows = rows + [row for row in kept[name] if row["operator"] not in recorded]
        found[name] = [row for operator in ("empty loop", *operators) for row in rows if row["operator"] == operator]
    return found


def as_text(found: dict[str, Any]) -> str:
    """Returns JSON with a line for each row. Seconds are rounded to four significant digits, for a short file."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {key: short(inside) for key, inside in value.items()}
        return [short(inside) for inside in value] if isinstance(value, list) else value

    lines = {name: ",\n".join(json.dumps(short(row)) for row in rows) for name, rows in found.items()}
    return "{" + ",\n".join(f'"{name}": [\n{rows}\n]' for name, rows in lines.items()) + "}\n"


def drawn(text: str) -> Optional[str]:
    """Returns the text of the document between BEGIN and END; None if BEGIN or END is missing."""
    _, begin, after = text.partition(BEGIN)
    inside, end, _ = after.partition(END)
    return inside if begin and end else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw the tables of the records that are there")
    parser.add_argument("--trace", type=int, metavar="THREADS", help="record lines and pages alone, for a later record")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="record the operators with a TEXT in their names")
    parser.add_argument("--loops", type=int, metavar="THREADS", help="print the loops of the records that are there")
    args = parser.parse_args()
    if not args.draw and not args.loops:
        sys.path.insert(0, str(ROOT))
        operators = list(recorded_loops.steps())
        for text in args.only or ():
            if not any(text in name for name in operators):
                parser.error(f"--only: {text!r} is in no name of {'; '.join(operators)}")
        names = [name for name in operators if args.only is None or any(text in name for text in args.only)]
        if args.trace:
            recorded_loops.traced_rows(args.trace, names)
            return 0
        kept = json.loads(RECORDS.read_text()) if args.only else {"times": [], "rows": []}
        RECORDS.write_text(as_text(merged(kept, record(names), operators)))
    records = Records(json.loads(RECORDS.read_text()))
    if args.loops:
        print(loops_text(records, args.loops))
        return 0
    text = DOCUMENT.read_text()
    if drawn(text) is None:
        sys.exit(f"{DOCUMENT.name}: has no {BEGIN} and {END}")
    DOCUMENT.write_text(text.replace(f"{BEGIN}{drawn(text)}{END}", f"{BEGIN}\n\n{table(records)}\n\n{END}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
