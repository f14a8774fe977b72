"""What the checks of every operation require of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def require(condition: object, problem: str) -> None:
    """Raise ``AssertionError``; an ``assert`` statement would vanish under ``python -O``."""
    if not condition:
        raise AssertionError(problem)


def require_refusal(
    call: Callable[[], object], argument: str, what: str, telltale: float | None = None
) -> str:
    """Require that a call raises a TypeError or ValueError that names the argument.

    It says what came and what was expected.

    :param what: what is wrong, for the message if nothing is raised.
    :param telltale: an element of the call's tensors, which no error may show.
    :returns: the message of the error.
    """
    try:
        call()
    except (TypeError, ValueError) as error:
        message = str(error)
    except Exception as error:
        msg = f"{what}: expected a TypeError or ValueError, got {type(error).__name__}: {error}"
        raise AssertionError(msg) from error
    else:
        msg = f"{what}: no error"
        raise AssertionError(msg)
    require(
        message.startswith(f"{argument}: "),
        f"the error does not begin with the argument's name: {message!r}",
    )
    require(
        "expected" in message and "got" in message,
        f"the error does not say what came and what was expected: {message!r}",
    )
    require(
        telltale is None or str(telltale) not in message,
        f"the error shows the elements of a tensor: {message!r}",
    )
    return message
