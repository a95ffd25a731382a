"""`python -m bench list | run | compare | report | profile`."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from . import comparison, flat, layout, own, profiling, report, resultfile, user_module
from .cases import MODES
from .environment import clocks, environment
from .measure import rates
from .precision import DTYPES
from .providers import PROVIDERS, Provider
from .run import Row, Settings, Target, problems, run
from .suites import A_CASE_OF_YOUR_OWN, SUITES, Suite, select

# Commands that are modules: each adds its parser and executes it.
COMMANDS = (comparison, report, profiling)

# What has to agree between a result and the run that goes on with it.
SAME = ("gpu", "driver", "torch", "triton", "cpu", "threads", "git_sha", "dirty")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 for a row that is wrong or failed, and for a regression; argparse's 2 for what makes no sense."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "list":
        for sheet in layout.listing(options.device):
            _screen().show(sheet)
        return 0
    try:
        return _run(options) if options.command == "run" else options.execute(options, _screen().show)
    except ValueError as error:
        parser.error(str(error))


def _run(options: argparse.Namespace) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    chosen, providers, memory = _chosen(options)
    where = environment(options.device)
    rows = _resumed(options.json, where) if options.resume else []
    targets = _left(chosen, providers, rows)
    measured_rates = rates(options.device) if options.device == "cuda" else None
    where["rates"] = measured_rates and measured_rates._asdict()
    where["clocks"] = {"before": clocks(options.device), "after": None}
    settings = Settings(options.rounds, options.memory or memory, options.device, measured_rates)
    end = time.monotonic() + 60 * options.minutes
    screen = _screen()
    done = 0
    # Interrupted, it tells what it has, as it does when its time is over.
    with suppress(KeyboardInterrupt), screen.meter(targets, len(providers), settings) as meter:
        for measured in run(takewhile(lambda _: time.monotonic() < end, targets), providers, settings, meter.tell):
            meter.next()
            done += 1
            rows += measured
            where["clocks"]["after"] = clocks(options.device)
            if options.json is not None:
                resultfile.write(options.json, where, rows)
            if options.csv is not None:
                flat.write(options.csv, rows)
    screen.show(layout.results(where, rows))
    for target in targets[done:]:
        print(f"not measured (--resume goes on): {target}", file=sys.stderr)
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


def _chosen(options: argparse.Namespace) -> tuple[Sequence[Target], list[Provider], bool]:
    """What is measured, by whom, and whether its suite asks for peak memory: a module or case of the user's own, or a suite."""
    own_case = own.case_of(options)
    if sum((own_case is not None, options.module is not None, bool(options.suite or options.case))) > 1:
        raise ValueError("expected one of --module, a case of your own (--op ...), and --suite or --case; got more than one")
    if options.module is not None:
        if options.provider:
            raise ValueError(f"--provider: a module is compared with itself, {' and '.join(user_module.PROVIDERS)} only")
        targets = user_module.problems(options.module, options.input_shape, options.mode, options.dtype)
        return targets, list(user_module.PROVIDERS.values()), False
    if own_case is not None:
        suite = Suite("", (own_case,), A_CASE_OF_YOUR_OWN)
    elif options.suite or not options.case:
        name = options.suite or "quick"
        suite = replace(SUITES[name], cases=select(name, options.case))
    else:
        suite = Suite("", select(None, options.case))
    providers = [PROVIDERS[name] for name in options.provider or suite.providers]
    return problems(suite.cases, options.mode, options.dtype), providers, suite.memory


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


def _left(targets: Sequence[Target], providers: Sequence[Provider], rows: Sequence[Row]) -> list[Target]:
    """The targets that no rows are of. Providers are compared within one run, so a target is measured with all or none."""
    found = {(row["case"], row["mode"], row["dtype"]): set[str]() for row in rows}
    for row in rows:
        found[row["case"], row["mode"], row["dtype"]].add(row["provider"])
    wanted = {provider.name for provider in providers}
    left = []
    for target in targets:
        there = found.get((target.name, target.mode, target.dtype), set())
        if there and there != wanted:
            raise ValueError(f"--resume: {target} was measured with other providers: {', '.join(sorted(there))}")
        if not there:
            left.append(target)
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
    command.add_argument("--csv", type=Path, metavar="PATH", help="the rows of the result as a table too")
    command.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    command.add_argument("--memory", action="store_true", help="measure peak memory too, each in a child process")
    command.add_argument("--minutes", type=float, default=math.inf, help="begin no problem after so many minutes")
    command.add_argument("--resume", action="store_true", help="keep what is in the file of --json, measure what is not")
    command.add_argument("--device", default=default, choices=("cpu", "cuda"), help=f"default here: {default}")
    own.add_arguments(command)
    group = command.add_argument_group("a module of your own", "as it is, and after score_kernels.convert")
    group.add_argument("--module", metavar="FILE.py:FACTORY", help="a function that returns an nn.Module, or (module, input)")
    group.add_argument("--input-shape", type=_shape, metavar="M,D", help="of a random input, in place of the factory's own")
    for module in COMMANDS:
        module.add_parser(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_positive(size) for size in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
