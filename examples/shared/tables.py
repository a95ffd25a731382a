"""Tables and sentences of docs/experiments.md: all of it computed from results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev

from bench.measure import paired_ratio

from .experiment import Row
from .results import Results
from .speed import median_ms

NOT_MEASURED = "Not measured yet: `--part speed` on a machine that does nothing else."

# Student's t for 95%, from 2 to 10 values on: how many standard errors chance may do.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)

# The loss of a character model of this size that has learned something.
GOAL = 2.0


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def values(results: Results, variant: str, key: str) -> list[float]:
    return [row[key] for row in sorted(results.of(variant), key=lambda row: row["seed"])]


def parameters(results: Results, variant: str) -> int:
    return int(results.of(variant)[0]["parameters"])


def where(trained: Results, _: Results | None) -> str:
    e = trained.environment
    seeds = len({row["seed"] for row in trained.rows})
    return (
        f"{e['gpu'] or e['cpu']}, {e['threads']} thread{'s' * (e['threads'] > 1)}, torch {e['torch']}, "
        f"{seeds} seed{'s' * (seeds > 1)}; settings: "
        f"{', '.join(f'{name} {value}' for name, value in trained.settings.items() if value is not None)}."
    )


def difference(results: Results, variant: str, base: str, key: str, digits: int) -> str:
    """Of what is better when it is smaller, paired by seeds: a sentence's end."""
    ours, theirs = values(results, variant, key), values(results, base, key)
    found = [a - b for a, b in zip(ours, theirs, strict=False)]
    text = f"{mean(found):+.{digits}f}"
    if len(found) < 2:
        return text
    error = stdev(found) / len(found) ** 0.5
    told = "worse" if mean(found) > 0 else "better"
    limit = STUDENT[min(len(found), len(STUDENT) + 1) - 2]
    clear = f"that is {told}" if abs(mean(found)) > limit * error else "no more than chance would do"
    return f"{text} ± {error:.{digits}f} (standard error over {len(found)} seeds: {clear})"


def comparison(results: Results, variant: str, base: str, key: str, what: str, digits: int = 2) -> str:
    share = parameters(results, variant) / parameters(results, base)
    size = "as many parameters as" if share == 1 else f"{share:.2f}x the parameters of"
    return f"- **{variant}**, {size} `{base}`: {what} {difference(results, variant, base, key, digits)}."


def molecules(trained: Results, _: Results | None) -> str:
    def line(variant: str) -> list[str]:
        errors = values(trained, variant, "rmse")
        losses = [point["loss"] for row in trained.of(variant) for point in row["curve"][-5:]]
        size, best, worst = parameters(trained, variant), min(errors), max(errors)
        return [variant, f"{size:,}", spread(errors), f"{best:.2f} to {worst:.2f}", f"{mean(losses):.3f}"]

    return table(["model", "parameters", "test RMSE", "range", "training loss"], map(line, trained.variants))


def molecules_found(trained: Results, _: Results | None) -> str:
    lines = []
    for kind in dict.fromkeys(variant.partition(":")[0] for variant in trained.variants):
        of_kind = [variant for variant in trained.variants if variant.startswith(f"{kind}:")]
        base = min((v for v in of_kind if "T layers" in v), key=lambda v: mean(values(trained, v, "rmse")))
        euler = f"{kind}: SCORE, dt 0.5"
        for variant in of_kind:
            if "SCORE" in variant:
                solver = "heun" in variant or "rk4" in variant
                lines.append(comparison(trained, variant, euler if solver else base, "rmse", "RMSE"))
    return "\n".join(lines)


def to_goal(trained: Results, variant: str) -> float:
    """Million characters that the first run saw until its validation loss was under the goal; infinity if it never was."""
    row = trained.of(variant)[0]
    each = trained.settings["batch"] * trained.settings["context"] / 1e6
    return min((point["step"] * each for point in row["curve"] if point["validation"] < GOAL), default=math.inf)


def language(trained: Results, timed: Results | None) -> str:
    head = ["model", "parameters", "validation loss", f"million characters until it is under {GOAL}", "CPU minutes"]

    def line(variant: str) -> list[str]:
        row = trained.of(variant)[0]
        losses, minutes = values(trained, variant, "best"), row["cpu_seconds"] / 60
        return [variant, f"{row['parameters']:,}", spread(losses, 3), f"{to_goal(trained, variant):.2f}", f"{minutes:.1f}"]

    return table(head, map(line, trained.variants))


def language_found(trained: Results, _: Results | None) -> str:
    base, *others = trained.variants
    lines = [comparison(trained, variant, base, "best", "validation loss", 3) for variant in others]
    reached = [variant for variant in trained.variants if mean(values(trained, variant, "best")) < GOAL]
    if len({row["seed"] for row in trained.rows}) == 1:
        lines.append("- All from one seed: a small difference may be chance.")
    shared = [variant for variant in others if "SCORE" in variant]
    earlier = [variant for variant in shared if to_goal(trained, variant) < to_goal(trained, base)]
    best = min((v for v in shared if "1 x T" in v), key=lambda v: mean(values(trained, v, "best")))
    cost = mean(values(trained, best, "best")) - mean(values(trained, base, "best"))
    lines.append(
        f"- One shared layer {'costs' if cost > 0 else 'does not cost'} accuracy at this size: the best of them, "
        f"`{best}`, ends {cost:+.3f} from `{base}`."
    )
    lines.append(
        f"- Faster convergence, which the paper reports, is {'seen' if earlier else 'not seen'} here: {len(earlier)} of "
        f"{len(shared)} models that share layers are under {GOAL} after fewer characters than `{base}`."
    )
    lines.append(f"- {len(reached)} of {len(trained.variants)} models end under a validation loss of {GOAL}.")
    for row in trained.rows:
        if row["dt"]:
            lines.append(f"- The learned dt, iteration by iteration: {', '.join(f'{dt:.2f}' for dt in row['dt'])}.")
    return "\n".join(lines)


def samples(trained: Results, _: Results | None) -> str:
    shared = [row for row in trained.rows if "SCORE" in row["variant"]]
    shown = [trained.rows[0], *sorted(shared, key=lambda row: row["best"])[:1]]
    return "\n\n".join(f"`{row['variant']}`:\n\n```\n{row['text'].strip()}\n```" for row in shown)


def by_depth(trained: Results, key: Callable[[Row], float], form: Callable[[list[float]], str]) -> str:
    """A line for each task and body, a column for each depth."""
    depths = trained.settings["depths"]

    def cell(variant: str) -> str:
        rows = trained.of(variant)
        return form([key(row) for row in rows]) if rows else "-"

    tasks = [variant.partition(":")[0] for variant in trained.variants]
    bodies = dict.fromkeys(variant.rpartition(", depth ")[0] for variant in trained.variants)
    ordered = sorted(bodies, key=lambda body: tasks.index(body.partition(":")[0]))
    lines = [[body, *(cell(f"{body}, depth {depth}") for depth in depths)] for body in ordered]
    return table(["model", *(f"depth {depth}" for depth in depths)], lines)


def mlp_scores(trained: Results, _: Results | None) -> str:
    sizes = by_depth(trained, lambda row: row["parameters"], lambda sizes: f"{sizes[0]:,.0f}")
    scores = by_depth(trained, lambda row: row["curve"][-1]["score"], spread)
    return f"{scores}\n\nParameters:\n\n{sizes}"


def mlp_gradients(trained: Results, _: Results | None) -> str:
    return by_depth(trained, lambda row: row["gradient_before"], lambda ratios: f"{mean(ratios):.1e}")


def mlp_found(trained: Results, _: Results | None) -> str:
    deepest = max(trained.settings["depths"])
    lines = []
    for task in dict.fromkeys(variant.partition(":")[0] for variant in trained.variants):
        at = [v for v in trained.variants if v.startswith(f"{task}:") and v.endswith(f", depth {deepest}")]
        told = [
            f"{v.partition(': ')[2].rpartition(', depth')[0]} {spread([row['curve'][-1]['score'] for row in trained.of(v)])}"
            for v in at
        ]
        lines.append(f"- {task}, {deepest} deep: {'; '.join(told)}.")
    return "\n".join(lines)


def speed(_: Results, timed: Results | None) -> str:
    """Step time and peak memory of our path and of the plain loop of the same model."""
    if timed is None or not timed.rows:
        return NOT_MEASURED
    e = timed.environment
    backends = sorted({backend for row in timed.rows for backend in row["backends"]})
    head = ["model", "plain loop, ms", "ours, ms", "plain loop / ours", "plain loop, peak MB", "ours, peak MB"]

    def line(row: Row) -> list[str]:
        ratio = paired_ratio(row["samples_ms"]["plain"], row["samples_ms"]["ours"])
        peaks = ["-" if row["peak_mb"][how] is None else f"{row['peak_mb'][how]:.1f}" for how in ("plain", "ours")]
        times = [f"{row['steps'] * median_ms(row, how):.1f}" for how in ("plain", "ours")]
        return [row["variant"], *times, "**{:.2f}** ({:.2f} to {:.2f})".format(*ratio), *peaks]

    machine = f"{e['gpu'] or e['cpu']}, threads: {e['threads']}; backend: {', '.join(backends)}."
    return f"{machine}\n\n{table(head, map(line, timed.rows))}"


def summary(trained: Results, _: Results | None) -> str:
    """README's: the kinds of graph network, T layers against one."""
    wanted = ("T layers, residual", "T layers, dt 0.5 (skip05)", "SCORE, dt 0.5")
    found = [variant for variant in trained.variants if variant.partition(": ")[2] in wanted]
    lines = [[v, f"{parameters(trained, v):,}", spread(values(trained, v, "rmse"))] for v in found]
    return table(["ESOL", "parameters", "test RMSE"], lines)
