"""`python -m bench list` and `python -m bench run`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import console
from .cases import DTYPES, MODES, SUITES, Suite, select
from .environment import environment
from .providers import PROVIDERS
from .run import Row, Settings, problems, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 when a row is wrong or failed; argparse's 2 for a command line that makes no sense."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "list":
        console.show_list()
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
    settings = Settings(options.rounds, options.memory or suite.memory, options.device)
    targets = problems(cases, options.mode, options.dtype)
    where = environment(options.device)
    rows: list[Row] = []
    with console.meter(targets, len(providers), settings) as meter:
        for measured in run(targets, providers, settings, meter.tell):
            meter.next()
            rows += measured
            if options.json is not None:
                options.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1, allow_nan=False) + "\n")
    console.show_results(where, rows)
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=sys.modules["bench"].__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the suites, their cases, and the providers")
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
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", default=default, choices=("cpu", "cuda"), help=f"default here: {default}")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
