"""MONAI Label's coroutines, run where they may block."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any


def without_loop(function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """A plain function that runs a coroutine function which never waits for anything, so that a thread can call it.

    Raises:
        RuntimeError: When called, if the coroutine does wait.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        coroutine = function(*args, **kwargs)
        try:
            coroutine.send(None)
        except StopIteration as done:
            return done.value
        coroutine.close()
        raise RuntimeError(f"{function.__name__} waits on the event loop and cannot be run in a thread")

    functools.update_wrapper(run, function)
    del run.__wrapped__  # type: ignore[attr-defined] # FastAPI would find the coroutine function again
    run.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return run
