"""How a verb takes the fields of its options as arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from akd_dist.options import Options

Arguments = ParamSpec("Arguments")
Given = TypeVar("Given", bound=Options)
Result = TypeVar("Result")


def taking(
    options: Callable[Arguments, Given],
) -> Callable[[Callable[[Given], Result]], Callable[Arguments, Result]]:
    """Let a verb take the fields of its options as arguments; type checkers, editors and `help` see them so."""

    def decorate(verb: Callable[[Given], Result]) -> Callable[Arguments, Result]:
        @functools.wraps(verb)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            return verb(options(*args, **kwargs))

        returns = verb.__annotations__["return"]
        call.__dict__["__signature__"] = inspect.signature(options).replace(return_annotation=returns)
        return call

    return decorate
