"""`python -m bench list` and `python -m bench run`."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from . import layout
from .cases import DTYPES, MODES, SUITES, Suite, select
from .environment import environment
from .measure import rates
from .providers import PROVIDERS, Provider
from .run import Problem, Row, Settings, problems, run

# What has to agree between a result and the run that goes on with it.
SAME = ("gpu", "driver", "torch", "triton", "cpu", "threads", "git_sha", "dirty")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 when a row is wrong or failed; argparse's 2 for a command line that makes no sense."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "list":
        for sheet in layout.listing(options.device):
            _screen().show(sheet)
        return 0
    try:
        return _run(options)
    except ValueError as error:
        parser.error(str(error))


def _run(options: argparse.Namespace) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    suite = SUITES[options.suite or "quick"] if options.suite or not options.case else Suite("", ())
    cases = select(options.suite or (None if options.case else "quick"), options.case)
    providers = [PROVIDERS[name] for name in options.provider or suite.providers]
    where = environment(options.device)
    rows = _resumed(options.json, where) if options.resume else []
    targets = _left(problems(cases, options.mode, options.dtype), providers, rows)
    measured_rates = rates(options.device) if options.device == "cuda" else None
    where["rates"] = measured_rates and measured_rates._asdict()
    settings = Settings(options.rounds, options.memory or suite.memory, options.device, measured_rates)
    end = time.monotonic() + 60 * options.minutes
    screen = _screen()
    done = 0
    with screen.meter(targets, len(providers), settings) as meter:
        for measured in run(takewhile(lambda _: time.monotonic() < end, targets), providers, settings, meter.tell):
            meter.next()
            done += 1
            rows += measured
            if options.json is not None:
                options.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1, allow_nan=False) + "\n")
    screen.show(layout.results(where, rows))
    for problem in targets[done:]:
        print(f"not measured, no time left (--resume goes on): {problem}", file=sys.stderr)
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


def _screen() -> Any:
    """The module that shows things: rich is not needed to measure."""
    return importlib.import_module(".console" if find_spec("rich") else ".plain", "bench")


def _resumed(path: Path | None, where: dict[str, Any]) -> list[Row]:
    """The rows that an earlier run on this machine and this code left; none where there is no file yet."""
    if path is None:
        raise ValueError("--resume goes on with the file of --json, which is not given")
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    for name in SAME:
        if result["environment"][name] != where[name]:
            raise ValueError(f"--resume: {path} is of {name} {result['environment'][name]!r}, this is {where[name]!r}")
    return result["rows"]


def _left(targets: list[Problem], providers: Sequence[Provider], rows: Sequence[Row]) -> list[Problem]:
    """The problems that no rows are of. Providers are compared within one run, so a problem is measured with all or none."""
    found = {(row["case"], row["mode"], row["dtype"]): set[str]() for row in rows}
    for row in rows:
        found[row["case"], row["mode"], row["dtype"]].add(row["provider"])
    wanted = {provider.name for provider in providers}
    left = []
    for problem in targets:
        there = found.get((problem.case.name, problem.mode, problem.dtype), set())
        if there and there != wanted:
            raise ValueError(f"--resume: {problem} was measured with other providers: {', '.join(sorted(there))}")
        if not there:
            left.append(problem)
    return left


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=sys.modules["bench"].__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    commands.add_parser("list", help="the suites, their cases, and the providers").set_defaults(device=default)
    command = commands.add_parser("run", help="check, time and measure the providers on a suite or on single cases")
    command.add_argument("--suite", choices=SUITES, help="default: quick, or every suite when --case is given")
    command.add_argument("--case", action="append", default=[], metavar="NAME", help="a case or a pattern (*); repeatable")
    command.add_argument("--provider", action="append", default=[], choices=PROVIDERS, help="default: the suite's; repeatable")
    command.add_argument("--mode", action="append", default=[], choices=MODES, help="default: the case's; repeatable")
    command.add_argument("--dtype", action="append", default=[], choices=DTYPES, help="default: the case's; repeatable")
    command.add_argument("--rounds", type=_positive, default=20, help="samples of each provider (default: 20)")
    command.add_argument("--json", type=Path, metavar="PATH", help="where to write the result, after every problem")
    command.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    command.add_argument("--memory", action="store_true", help="measure peak memory too, each in a child process")
    command.add_argument("--minutes", type=float, default=math.inf, help="begin no problem after so many minutes")
    command.add_argument("--resume", action="store_true", help="keep what is in the file of --json, measure what is not")
    command.add_argument("--device", default=default, choices=("cpu", "cuda"), help=f"default here: {default}")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
