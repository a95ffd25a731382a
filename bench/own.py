"""A case from the command line: `python -m bench run --op mlp --rows 40000 --features 96 --hidden 384 --iterations 8`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import MISSING, replace
from dataclasses import fields as fields_of
from typing import Any, get_type_hints

import torch

from score_kernels.arguments import NAMES
from score_kernels.problem import INPUTS, SHAPES

from .cases import Case
from .inputs import make, ours

# Fields of a case that are no options of a call, or have flags of their own.
NOT_FLAGS = ("name", "source", "modes", "dtype")

CHOICES: dict[str, Iterable[str]] = {"op": SHAPES, **NAMES}
FIELDS = [field for field in fields_of(Case) if field.name not in NOT_FLAGS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of a case; those that are not given are not in the result of parsing."""
    group = parser.add_argument_group("a case of your own", "options of the op that --op names; defaults in brackets")
    hints = get_type_hints(Case)
    for field in FIELDS:
        default = "" if field.default is MISSING else f"[{field.default}]"
        if hints[field.name] is bool:
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif field.name in CHOICES:
            kind = {"choices": list(CHOICES[field.name])}
        else:
            kind = {"type": _number(hints[field.name]), "metavar": field.name[0].upper()}
        group.add_argument(_flag(field.name), dest=f"case_{field.name}", default=argparse.SUPPRESS, help=default, **kind)


def case_of(options: argparse.Namespace) -> Case | None:
    """The case that the flags describe, or None when none of them is given.

    Raises ValueError for a case that lacks a size or that the op does not take.
    """
    given = {field.name: value for field in FIELDS if (value := getattr(options, f"case_{field.name}", None)) is not None}
    if not given:
        return None
    if given.get("op") in ("linear", "attention"):
        given.setdefault("hidden", given.get("features"))
    if given.get("op") == "attention":
        given.setdefault("activation", "identity")
    if missing := [_flag(field.name) for field in FIELDS if field.default is MISSING and field.name not in given]:
        raise ValueError(f"a case of your own needs {', '.join(missing)} too")
    if given.get("norm") == "none":
        given["norm"] = None
    if given.get("update", "contractive") != "contractive":
        given.setdefault("dt", None)  # the update's own
    case = Case(name=_name(given), source="the command line", **given)
    if case.op in ("linear", "attention") and (case.gated or case.hidden != case.features):
        raise ValueError(f"--op {case.op}: expected no --gated, and no --hidden or that of --features: it is D -> D")
    if case.op in INPUTS and (case.tokens < 1 or case.rows % case.tokens):
        raise ValueError(f"--tokens: expected a divisor of --rows, which are sequences of so many, got {case.tokens}")
    _try(case)
    return case


def _try(case: Case) -> None:
    """The op's own complaint about the case, from a call with no rows."""
    if case.rows < 1:
        raise ValueError(f"--rows: expected 1 or more, got {case.rows}")
    if min(case.features, case.hidden, case.sets) < 1:
        raise ValueError(f"--features, --hidden, --sets: expected 1 or more, got {case.features}, {case.hidden}, {case.sets}")
    given = make(replace(case, rows=0), "forward", torch.float32, "cpu")
    ours(case, "reference")(given.h, given.parameters)


def _name(given: dict[str, Any]) -> str:
    """The sizes, and every other option that is given: cases that differ have different names."""
    sizes = [given["op"], f"{given['rows']}x{given['features']}x{given['hidden']}", f"t{given['iterations']}"]
    columns = ("op", "rows", "features", "hidden", "iterations")
    return "-".join([*sizes, *(f"{name}={value}" for name, value in given.items() if name not in columns)])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _number(hint: Any) -> Callable[[str], float]:
    return float if hint == (float | None) else int
