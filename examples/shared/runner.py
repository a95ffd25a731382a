"""The command line of the examples: trains, measures, and writes both to files of examples/results/ as they come."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from . import data, speed
from .experiment import Experiment, Interrupted, Run, train
from .results import Results

RESULTS = Path(__file__).resolve().parents[1] / "results"
PARTS = ("train", "speed")


def main(experiment: type[Experiment], arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 130 after Ctrl-C; argparse's 2 for what makes no sense, and for data that is not there."""
    parser = _parser(experiment)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        file = None if experiment.data is None else data.find(experiment.data, options.data)
        settings = experiment.presets[options.preset]
        of_all = experiment(settings if options.steps is None else replace(settings, steps=options.steps), file, options.device)
        if options.explain:
            print("\n\n".join(f"{v}\n{speed.explained(of_all, v)[0]}" for v in chosen(of_all.variants, options)))
            return 0
        for part in options.part or PARTS:
            path = options.out / f"{experiment.name}-{options.preset}-{part}.json"
            results = Results.open(path, asdict(of_all.settings), options.device, options.fresh)
            {"train": _train, "speed": _speed}[part](of_all, results, options)
            print(f"{part}: {path}")
    except (data.DataError, ValueError) as error:
        parser.error(str(error))
    except (Interrupted, KeyboardInterrupt):
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _train(experiment: Experiment, results: Results, options: argparse.Namespace) -> None:
    runs = [Run(v, s) for s in range(options.seeds or experiment.settings.seeds) for v in chosen(experiment.variants, options)]
    left = [run for run in runs if not results.has(*run)]
    with _bar() as bar:
        for at, run in enumerate(left, start=1):
            name = f"{run.variant}, seed {run.seed}"
            task = bar.add_task(f"{at}/{len(left)} {name}", total=experiment.steps(run.variant), metric="")
            checkpoint = results.checkpoints / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.pt"
            row = train(experiment, run, checkpoint, partial(_tell, bar, task, experiment.metric))
            results.add(row)
            checkpoint.unlink(missing_ok=True)
            bar.remove_task(task)
            bar.console.print(
                f"{name}: {experiment.metric} {row['curve'][-1][experiment.metric]:.4f}, "
                f"{row['parameters']:,} parameters, {row['seconds']:.0f} s"
            )


def _speed(experiment: Experiment, results: Results, options: argparse.Namespace) -> None:
    left = [variant for variant in chosen(experiment.timed, options) if not results.has(variant, 0)]
    with _bar() as bar:
        for at, variant in enumerate(left, start=1):
            task = bar.add_task(f"{at}/{len(left)} {variant}", total=options.rounds, metric="")
            row = speed.measure(experiment, variant, options.preset, options.rounds, partial(_tell, bar, task, ""))
            results.add(row)
            bar.remove_task(task)
            bar.console.print(f"{variant}: {speed.sentence(row)}")


def _tell(bar: Bar, task: TaskID, metric: str, done: int, point: dict[str, float] | None = None) -> None:
    shown = {name: (point or {}).get(name) for name in ("loss", metric)}
    text = ", ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None)
    bar.update(task, completed=done, metric=text)


def chosen(variants: Sequence[str], options: argparse.Namespace) -> list[str]:
    found = [name for name in variants if not options.variant or any(fnmatch(name, wanted) for wanted in options.variant)]
    if not found:
        raise ValueError(f"--variant: expected one of {'; '.join(variants)}, or a pattern, got {options.variant}")
    return found


@contextmanager
def _bar() -> Iterator[Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[metric]}"))
    with Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        yield bar


def _parser(experiment: type[Experiment]) -> argparse.ArgumentParser:
    about = sys.modules[experiment.__module__].__doc__ or ""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{experiment.name}", description=about.split("\n")[0])
    parser.add_argument("--preset", choices=experiment.presets, default="cpu", help="the sizes (default: cpu)")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: both; repeatable")
    parser.add_argument("--variant", action="append", metavar="NAME", help="or a pattern (*); default: all; repeatable")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (default: the preset's)")
    parser.add_argument("--steps", type=int, metavar="N", help="of a run (default: the preset's)")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each in the speed part (default: 20)")
    if experiment.data is not None:
        parser.add_argument(
            "--data", type=Path, metavar="PATH", help="the file or its folder; else SCORE_KERNELS_DATA, a download"
        )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="default: examples/results")
    parser.add_argument("--explain", action="store_true", help="only tell how the first op of every variant runs: sk.explain")
    parser.add_argument("--fresh", action="store_true", help="begin anew; without it, finished runs are kept and others go on")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"default here: {default}")
    return parser
