"""Plug-ins are loaded in another process first.

One that hangs or crashes must not take doctor with it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

from moe_routing._registry import registry
from moe_routing_registry import Request, UnknownNameError
from moe_routing_registry.containment import PluginFailure, contained
from moe_routing_registry.text import said_by, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_routing_registry import DeviceInfo
    from moe_routing_registry.registry import Plugin

SECONDS = 60
"""How long doctor waits for one plug-in.

For its import and its hooks, and for each of its support rules.
"""
_DONE = "done"


def leave_out_what_does_not_end(devices: Sequence[DeviceInfo]) -> None:
    """Leave out of this process the plug-ins that hang, or that end the process.

    They do so when they are loaded or asked.
    """
    known = registry()
    if known.loaded or all(plugin.built_in for plugin in known.plugins()):
        return
    left_out: dict[str, str] = {}
    while (found := _first_that_does_not_end(left_out, devices)) is not None:
        key, why = found
        left_out[key] = why
    for key, why in left_out.items():
        known.leave_out(key, why)


def _first_that_does_not_end(
    left_out: dict[str, str], devices: Sequence[DeviceInfo]
) -> tuple[str, str] | None:
    """Load and ask all plug-ins but those left out, in a process that says which one comes next."""
    script = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        "from moe_routing.doctor._plugins import load_and_ask; load_and_ask()"
    )
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)  # noqa: S603 -- this Python
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    try:
        assert process.stdin is not None  # noqa: S101 -- for mypy: it is a pipe
        process.stdin.write(pickle.dumps((left_out, tuple(devices))))
        process.stdin.close()
        at = ""
        while (line := lines.get(timeout=SECONDS)) and line != _DONE:
            at = line
    except queue.Empty:
        return (at, f"loading or asking it does not end within {SECONDS} seconds") if at else None
    except BrokenPipeError:
        return None  # the process ended before any plug-in: what is wrong is not theirs
    else:
        return (
            (at, f"loading or asking it {_ending(process.wait())}")
            if at and line != _DONE
            else None
        )
    finally:
        process.kill()
        process.wait()


def _read(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None  # noqa: S101 -- for mypy: it is a pipe
    with process.stdout as printed:
        for line in printed:
            lines.put(line.decode().rstrip("\n"))
    lines.put("")


def _ending(code: int) -> str:
    return (
        f"kills the process with {signal.Signals(-code).name}"
        if code < 0
        else f"ends the process with exit code {code}"
    )


def load_and_ask() -> None:
    """Load the plug-ins and ask their backends, in a process of its own.

    Print the key of each before its turn.
    """
    left_out, devices = pickle.load(sys.stdin.buffer)  # noqa: S301 -- doctor wrote it
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what plug-ins print is not for doctor
    known = registry()
    for key, why in left_out.items():
        known.leave_out(key, why)

    def announce(plugin: Plugin) -> None:
        _wait_for_threads()
        print(plugin.key, file=channel, flush=True)

    known.load(announce)
    for name, backend in known.backends.items():
        plugin = known.plugin(name)
        if plugin is not None and not plugin.built_in:
            others = frozenset(known.backends) - {name}
            for operation, device in itertools.product(backend.factories, devices):
                announce(plugin)
                with contextlib.suppress(UnknownNameError, PluginFailure):  # which the report says
                    known.resolve(
                        known.example(operation), device, Request(name, "argument", others)
                    )
    _wait_for_threads()
    print(_DONE, file=channel, flush=True)


def _wait_for_threads() -> None:
    """Wait for the threads that the previous plug-in started.

    Python does so before a process ends.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def torch_state() -> dict[str, Any]:
    """Return what plug-ins might change of torch: its functions and its global settings.

    Empty where torch is not usable.
    """
    try:
        with contained("looking at torch"):
            return _torch_state(sys.modules["torch"])
    except PluginFailure:  # not imported, or a stub of it
        return {}


def _torch_state(torch: Any) -> dict[str, Any]:  # noqa: ANN401 -- the module
    # Of the modules the public ones. Of a class also what it inherits: to set a method on the class
    # hides that.
    owners = {
        name: (module,)
        for name, module in sys.modules.items()
        if (name == "torch" or name.startswith("torch.")) and "._" not in name
    }
    owners |= {
        "torch.Tensor": torch.Tensor.__mro__[::-1],
        "torch.nn.Module": torch.nn.Module.__mro__[::-1],
    }
    functions = {
        f"{at}.{name}": value
        for at, several in owners.items()
        for owner in several
        for name, value in vars(owner).items()
        if callable(value)
    }
    return functions | {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
    """Say what is no longer as it was, a sentence each.

    What torch replaces by its own, as its compiler does when it is first imported, does not count.
    """
    return tuple(
        f"the plug-ins changed {name}, which is now "
        f"{said_by(partial(_named, after[name]), 'something else')}"
        if name in after
        else f"the plug-ins changed {name}, which is no function now"
        for name, value in before.items()
        if after.get(name) is not value
        and (not _is_torchs(after.get(name)) if callable(value) else after.get(name) != value)
    )


def _is_torchs(value: object) -> bool:
    """Tell whether torch defines a class, or a function and all that it wraps.

    ``functools.wraps`` copies a function's names, but not the module that the wrapper is written
    in.
    """
    if type(value) is FunctionType:
        wrapped = getattr(value, "__wrapped__", None)
        return _within_torch(value.__globals__.get("__name__")) and (
            wrapped is None or _is_torchs(wrapped)
        )
    return type(value) is type and _within_torch(value.__module__)


def _within_torch(module: object) -> bool:
    return type(module) is str and module.partition(".")[0] == "torch"


def _named(value: object) -> str:
    """Name a function by where it is written: ``functools.wraps`` gives it another's name."""
    if type(value) is FunctionType:
        return f"{value.__globals__.get('__name__')}.{value.__code__.co_name}"
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}.{name}" if module and name else shown(value)
