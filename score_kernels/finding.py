"""Runs of equal blocks in a stack of modules.

A block is `[norm] Linear [activation]` (op `linear`), `[norm] Linear activation Linear` (op `mlp`), or a module of the user's
whose forward is `x + block(x)` and nothing else.
"""

from __future__ import annotations

import dis
import inspect
import operator
import re
from collections.abc import Sequence
from types import CodeType, FunctionType
from typing import NamedTuple

from torch import fx, nn

from .tokens import LINEAR, NORM, OTHER, RESIDUAL, SEQUENTIALS, TRANSPARENT, UNKNOWN, Token, describe, hooked, leaves

# A block of each op as the kinds of its modules.
_PATTERNS = {"linear": re.compile("n?la?"), "mlp": re.compile("n?lal")}

# How many blocks make a run: two or more; then, in what is left, single MLPs too: their hidden features stay in cache.
_LEAST = ({"linear": 2, "mlp": 2}, {"mlp": 1})


class Block(NamedTuple):
    """One block of an op; tokens: of its modules, without the transparent ones. residual: it is `x + block(x)`."""

    op: str
    tokens: tuple[Token, ...]
    residual: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """D of linear, D and H of mlp: as many as it has Linears."""
        return tuple(token.value[0] for token in self.tokens if token.kind == LINEAR)


class Found(NamedTuple):
    """A run: the modules from start to stop are `iterations` blocks, all equal to `block`."""

    start: int
    stop: int
    block: Block
    iterations: int


def examine(stack: nn.Sequential) -> tuple[list[tuple[str, nn.Module]], list[Token | str], list[Found]]:
    """The modules that a stack calls with their paths, their tokens (or why they have none), and the runs among them."""
    parts = list(leaves(stack))
    tokens = [describe(module) for _, module in parts]
    tokens = [
        residual(module) if token == UNKNOWN and not type(module).__module__.startswith("torch.") else token
        for token, (_, module) in zip(tokens, parts, strict=True)
    ]
    return parts, tokens, find(tokens)


def find(tokens: Sequence[Token | str]) -> list[Found]:
    """The maximal runs, in order. A string, the reason why a module has no token, ends a run."""
    told = [Token(OTHER) if isinstance(token, str) else token for token in tokens]
    at = [i for i, token in enumerate(told) if token.kind != TRANSPARENT]
    known = [told[i] for i in at]
    free = "".join(token.kind for token in known)
    found = []
    for least in _LEAST:
        first = 0
        while first < len(free):
            # The patterns differ in what follows a block, so no more than one of the ops has a run here.
            run = next((run for op, n in least.items() if len(run := _run(known, free, first, op)) >= n), [])
            if not run:
                first += 1
                continue
            stop = first + len(run) * _length(run[0])
            found.append(Found(at[first], at[stop - 1] + 1, run[0], len(run)))
            free = free[:first] + OTHER * (stop - first) + free[stop:]
            first = stop
    return sorted(found)


def _run(tokens: Sequence[Token], kinds: str, first: int, op: str) -> list[Block]:
    """The equal blocks of an op that follow one another from `first` on."""
    run: list[Block] = []
    while block := _block(tokens, kinds, first, op):
        if run and block != run[0]:
            break
        run.append(block)
        first += _length(block)
    return run


def _length(block: Block) -> int:
    return 1 if block.residual else len(block.tokens)


def _block(tokens: Sequence[Token], kinds: str, first: int, op: str) -> Block | None:
    if kinds[first : first + 1] == RESIDUAL:
        inside = [token for _, token in tokens[first].value[1] if token.kind != TRANSPARENT]
        whole = _PATTERNS[op].fullmatch("".join(token.kind for token in inside))
        return Block(op, tuple(inside), True) if whole and _chains(inside) else None
    match = _PATTERNS[op].match(kinds, first)
    block = tokens[first : match.end()] if match else []
    return Block(op, tuple(block), False) if block and _chains(block) else None


def _chains(tokens: Sequence[Token]) -> bool:
    """Whether it maps D features to D features, with the norm over D."""
    linears = [token.value for token in tokens if token.kind == LINEAR]
    norms = [token.value for token in tokens if token.kind == NORM]
    features = linears[0][0]
    return [width for width, *_ in linears[1:]] + [features] == [out for _, out, *_ in linears] and all(
        width == features for _, width, *_ in norms
    )


def residual(module: nn.Module) -> Token | str:
    """A RESIDUAL token if the module's forward is `x + chain(x)` of its children, else why it is not.

    Only a forward that always does the same can be told from one trace: straight-line code that uses nothing but `self`, its
    input and its children. So no branch (a random skip would be one), no global, no in-place addition.
    """
    forward, called = type(module).forward, type(module).__call__
    if not isinstance(forward, FunctionType) or called is not nn.Module.__call__ or not _straight(forward.__code__, module):
        return "its forward does more than call its children and add"
    try:
        nodes = list(_Tracer().trace(module).nodes)
    except Exception as error:
        return f"its forward cannot be traced: {error}"
    if len(nodes) < 3:
        return "its forward is not x + chain(x)"
    x, *calls, last, output = nodes
    names = [str(node.target) for node in calls]
    chained = all(
        node.op == "call_module" and node.args == (before,) and not node.kwargs
        for before, node in zip([x, *calls], calls, strict=False)
    )
    added = last.target is operator.add and set(last.args) == {x, [x, *calls][-1]} and output.args == (last,)
    if not (calls and chained and added and len(set(names)) == len(names)):
        return "its forward is not x + chain(x)"
    inside = _inside(module, names)
    reasons = [f"{name}: {token}" for name, token in inside if isinstance(token, str)]
    return reasons[0] if reasons else Token(RESIDUAL, (type(module), tuple(inside)))


def _straight(code: CodeType, module: nn.Module) -> bool:
    children = {part for name, _ in module.named_modules() for part in name.split(".")}
    jumps = {*dis.hasjrel, *dis.hasjabs}
    return (
        code.co_argcount == 2
        and not code.co_kwonlyargcount
        and not code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
        and not code.co_freevars
        and set(code.co_names) <= children
        and not any(isinstance(constant, CodeType) for constant in code.co_consts)
        and not any(
            i.opcode in jumps or "GLOBAL" in i.opname or (i.opname == "BINARY_OP" and i.argrepr != "+")
            for i in dis.get_instructions(code)
        )
    )


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) not in SEQUENTIALS or hooked(m)


def _inside(module: nn.Module, names: Sequence[str]) -> list[tuple[str, Token | str]]:
    """Every module that is called, the Sequentials around them included: a hook on any of them has to be seen."""
    paths = dict.fromkeys(
        ".".join(parts[:n]) for parts in (name.split(".") for name in names) for n in range(1, len(parts) + 1)
    )
    return [(path, describe(module.get_submodule(path))) for path in paths]
