"""Triton's interpreter without work that it does over and over.

At every call of a device function it looks through its language for what to replace, a third of the time of its tests. Once a
launch does, for what was replaced stays until the launch ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def apply() -> None:
    """From now on, in this process."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[tuple[int, ...]] = set()

    @functools.cache
    def languages(function: Callable[..., Any]) -> tuple[int, ...]:
        """What the interpreter patches for a function: of these modules those that it sees."""
        seen = function.__globals__.values()
        return tuple(id(module) for module in (interpreter.tl, interpreter.tl.core) if any(x is module for x in seen))

    def patch_once(function: Callable[..., Any]) -> Any:
        found = languages(function)
        if found in done:
            return interpreter._LangPatchScope()
        done.add(found)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        done.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
