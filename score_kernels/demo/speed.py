"""Part 3 of the demo: the time of a few shapes against the plain PyTorch loop and torch.compile of it."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.cases import Case
from bench.measure import paired_ratio
from bench.providers import PROVIDERS
from bench.run import BASELINE, Problem, Row, Settings, measure

from . import screen

# Label -> the provider of `bench` that is measured.
COMPARED = {"the plain loop": "eager", "torch.compile": "torch_compile", "score_kernels": "blas"}

ROWS, ITERATIONS = 16384, 8
SHAPES = ((128, 128), (128, 512), (256, 256))
ROUNDS, QUICK_ROUNDS = 10, 5


def run(console: Console, quick: bool) -> None:
    """Measures, prints the table and what it says."""
    console.rule("3. Is it fast? Forward, float32, against the plain PyTorch loop and torch.compile")
    settings = Settings(rounds=QUICK_ROUNDS if quick else ROUNDS)
    cases = [Case(f"{d} -> {h} -> {d}", "mlp", ROWS, d, h, ITERATIONS, "demo") for d, h in SHAPES[: 1 if quick else None]]
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=float(len(cases)))
        for case in cases:
            rows += measure(
                Problem(case, "forward", "float32"),
                [PROVIDERS[name] for name in COMPARED.values()],
                settings,
                lambda what, share: progress.update(task, description=what, advance=share),
            )
    console.print(table(rows))
    screen.paragraph(
        console,
        f"{ITERATIONS} iterations of layernorm and an mlp with gelu on {ROWS} rows. Everything is compared with float64 before "
        f"it is timed; then they take turns, {settings.rounds} rounds. Time: median. Speed: the plain loop's time over this "
        "one's in the same round, median and its 95 % interval; above 1 is faster than the plain loop.",
    )
    screen.points(console, [*failures(rows), *conclusions(rows)])


def table(rows: list[Row]) -> Table:
    lines = screen.table(("features", "how"), ("time", "speed", "error against float64"))
    previous = None
    for row in rows:
        name = row["case"] if row["case"] != previous else ""
        previous = row["case"]
        time = f"{row['ms_median']:.1f} ms" if row["status"] == "ok" else _state(row)
        speed, error = row["speedup_vs_eager"], row["rel_error"]
        ratio = f"{speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})" if speed else "-"
        baseline = row["provider"] == BASELINE and speed
        lines.add_row(name, _label(row), time, "1" if baseline else ratio, "-" if error is None else f"{error:.1e}")
    return lines


def failures(rows: list[Row]) -> list[str]:
    """Why something has no time: what is wrong is not timed, and what does not run is absent."""
    bad = [row for row in rows if row["status"] != "ok"]
    return [f"{row['case']}: {_label(row)} is {_state(row)}: {row['error'].strip().splitlines()[0]}" for row in bad]


def conclusions(rows: list[Row]) -> list[str]:
    """Per shape: how score_kernels' time compares with the plain loop's and torch.compile's, as medians of paired ratios."""
    sentences = []
    for case in dict.fromkeys(row["case"] for row in rows):
        samples = {row["provider"]: row["samples"] for row in rows if row["case"] == case and row["status"] == "ok"}
        ours = samples.pop(COMPARED["score_kernels"], None)
        against = [
            f"{paired_ratio(samples[name], ours).median:.2f}x as fast as {label}"
            for label, name in COMPARED.items()
            if ours and name in samples
        ]
        if against:
            sentences.append(f"{case}: score_kernels is {' and '.join(against)}.")
    return sentences


def _state(row: Row) -> str:
    return "wrong" if row["status"] == "wrong" else "absent"


def _label(row: Row) -> str:
    return next(label for label, provider in COMPARED.items() if provider == row["provider"])
