"""Checks types and shapes of the package's functions, without wrapping what has no shapes.

jaxtyping's hook wraps every function, whatever its annotations. It wraps a function that is defined
in another at each call of the other, which takes milliseconds: most of the input pipeline's tests.
"""

import inspect

import jaxtyping
from beartype import BeartypeConf, beartype

_wrap = jaxtyping.jaxtyped
_check_types = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def install() -> None:
    """Takes the place of what the hook calls, before anything imports the package."""
    jaxtyping.jaxtyped = _jaxtyped


def _jaxtyped(*, typechecker):
    """Wraps what has shapes, and classes, as before; elsewhere types are enough.

    Functions inside functions are left alone unless they have shapes.
    """

    def decorate(function):
        if inspect.isclass(function) or _has_shapes(function):
            return _wrap(function, typechecker=typechecker)
        return function if "<locals>" in function.__qualname__ else _check_types(function)

    return decorate


def _has_shapes(function) -> bool:
    return any("jaxtyping" in repr(each) for each in function.__annotations__.values())
