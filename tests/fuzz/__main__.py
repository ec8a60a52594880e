"""Fuzz every format that fusedlm reads back.

    python -m tests.fuzz [--cases 10000] [--seed 0] [--target NAME ...] [--workers 2]

Prints a table of outcomes and each fault with the number of its case; `--case N --target NAME` runs one again.
The exit code is 0 if there is no fault: no traceback, no silent acceptance, no hang, memory bounded.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.runner import Case, count, make_homes, run_case, run_cases
from tests.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    parser.add_argument("--target", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        homes = Path(folder)
        make_homes(arguments.target, homes)
        if arguments.case is not None:
            print(run_case(Case(arguments.target[0], arguments.case, arguments.seed), homes))
            return 0
        per_target = -(-arguments.cases // len(arguments.target))
        cases = [Case(name, number, arguments.seed) for number in range(per_target) for name in arguments.target]
        start, verdicts = time.monotonic(), []
        for verdict in run_cases(cases, homes, arguments.workers):
            verdicts.append(verdict)
            if not verdict.is_good:
                print(f"FAULT {verdict.outcome}: {verdict.case} {verdict.file} ({verdict.how})")
                print(verdict.detail, flush=True)
        _print(verdicts, time.monotonic() - start)
    return 0 if all(verdict.is_good for verdict in verdicts) else 1


def _print(verdicts, seconds: float) -> None:
    found = count(verdicts)
    outcomes = sorted({outcome for _, outcome in found})
    print(f"{'':12}" + "".join(f"{outcome:>11}" for outcome in outcomes))
    for name in sorted({target for target, _ in found}):
        print(f"{name:12}" + "".join(f"{found[name, outcome]:11,}" for outcome in outcomes))
    bad = sum(not verdict.is_good for verdict in verdicts)
    print(f"{len(verdicts):,} cases, {bad} faults, {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
