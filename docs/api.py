"""Writes docs/api.md, the reference of the public names, from their docstrings and signatures: `python docs/api.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import score_kernels as sk
from score_kernels import arguments, conversion, functional, plans, settings, sharing

STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
PAGE = Path(__file__).with_name("api.md")

HEAD = """# Reference

Every public name, from its docstring; `python docs/api.py` writes this page. `import score_kernels as sk` and
`from score_kernels import functional as SF`. Shapes: D features, H hidden features, T iterations, L parameter sets, `...` any
leading dimensions.
"""

# Heading -> what is under it: the name as users write it, and the object.
SECTIONS: dict[str, list[tuple[str, Any]]] = {
    "Ops": [(f"SF.{name}", getattr(functional, name)) for name in functional.__all__],
    "Modules": [
        (f"sk.{name}", getattr(sk, name))
        for name in ("ScoreLinear", "ScoreMLP", "ScoreAttention", "ScoreTransformer", "FusedSequential")
    ],
    "Models that you have": [
        ("sk.convert", sk.convert),
        ("sk.revert", sk.revert),
        ("Report", conversion.Report),
        ("Entry", conversion.Entry),
        ("sk.share", sk.share),
        ("Shared", sharing.Shared),
    ],
    "What runs where": [
        ("sk.available_backends", sk.available_backends),
        ("sk.explain", sk.explain),
        ("Explanation", plans.Explanation),
    ],
    "Autograd": [(f"sk.autograd.{f.__name__}", f) for f in sk.autograd.FUNCTIONS.values()],
}


def page() -> str:
    parts = [HEAD]
    for heading, members in SECTIONS.items():
        parts.append(f"## {heading}\n")
        if heading == "Autograd":
            parts.append(prose(sk.autograd))
        parts += [entry(name, member) for name, member in members]
        if heading == "Ops":
            parts.append(options())
    parts.append(f"## Environment\n\n{prose(settings)}\nThose of the build are in [building.md](building.md).\n")
    return "\n".join(parts)


def entry(name: str, member: Any) -> str:
    # Nobody makes a result or an autograd Function by hand.
    called = not inspect.isclass(member) or name.startswith("sk.Score")
    return "\n".join([f"### `{name}`\n", *([f"```python\n{signature(name, member)}\n```\n"] if called else []), prose(member)])


def signature(name: str, member: Callable[..., Any]) -> str:
    """A call on one line where it fits, else with a line for each parameter."""
    found = inspect.signature(member)
    parameters: list[str] = []
    for p in found.parameters.values():
        if p.kind == p.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        default = "" if p.default is p.empty else f" = {p.default!r}"
        parameters.append(f"{STARS.get(p.kind, '')}{p.name}: {p.annotation}{default}")
    result = (
        "" if found.return_annotation in (found.empty, "None") or inspect.isclass(member) else f" -> {found.return_annotation}"
    )
    line = f"{name}({', '.join(parameters)}){result}"
    return line if len(line) <= 100 else "\n".join([f"{name}(", *(f"    {text}," for text in parameters), f"){result}"])


def options() -> str:
    """The defaults of what every op takes, and the names that an option may have."""
    types = functional.Common.__annotations__
    rows = []
    for name, p in inspect.signature(arguments.check).parameters.items():
        if name in types:
            default = "of the op" if p.default is p.empty else f"`{p.default!r}`"
            kind = str(p.annotation).replace("|", "\\|")
            rows.append(f"| `{name}` | `{kind}` | {default} | {', '.join(f'`{x}`' for x in arguments.NAMES.get(name, ()))} |")
    head = ["### Keyword arguments of every op\n", "| name | type | default | one of |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def prose(documented: Any) -> str:
    """A docstring as Markdown: its list of arguments as a list, the rest as it is."""
    return "\n".join(_lines((inspect.getdoc(documented) or "").splitlines())) + "\n"


def _lines(lines: list[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        inside = line == "Args:" or (inside and line.startswith("    "))
        if inside and line.startswith("    "):
            item = re.match(r"    (\S[^:]*): (.*)", line)
            yield f"- `{item[1]}`: {item[2]}" if item else f"  {line.strip()}"
        else:
            yield line
            if inside:
                yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
