"""The application: commands, help, and one place that turns errors into a line and an exit code."""

from __future__ import annotations

import sys
import traceback
import warnings
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Annotated

import typer

from moe_routing.cli._bench import bench
from moe_routing.cli._conformance import conformance
from moe_routing.cli._doctor import doctor
from moe_routing.cli._explain import explain
from moe_routing.cli._help import Group, taught
from moe_routing.cli._list import list_routers
from moe_routing.cli._new_backend import new_backend
from moe_routing.cli._report import report
from moe_routing.cli._scale import scale
from moe_routing.cli._show import Unusable, UsageError, drop_stdout, print_json_of, shortened
from moe_routing.cli._transformers import transformers
from moe_routing.cli._tune import tune
from moe_routing.probing import NUMPY_WARNING, AbsentDeviceError, UnknownDeviceError
from moe_routing_registry import BackendUnavailableError, UnknownNameError
from moe_routing_registry.containment import sentence
from moe_routing_registry.errors import DuplicateNameError
from moe_routing_registry.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

# Newer versions of typer carry their own copy of click, older ones import it: this finds the class
# that they raise.
_ParserError: type[Exception] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)
_USAGE = 2
_INTERRUPTED = 130

app = typer.Typer(
    name="moe-routing",
    cls=Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """MoE routing for PyTorch: router logits to expert weights and ids, on any device."""
    if version:
        from moe_routing import __version__

        sys.stdout.write(f"moe-routing {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


app.command(
    "doctor",
    cls=taught(
        (
            "moe-routing doctor --device cuda:0 --verify",
            "does every backend compute right on this device?",
        ),
        ("moe-routing doctor --router deepseek_v3", "judge the backends by that model's routing"),
        ("moe-routing doctor --check torch --check triton", "only these checks"),
        (
            "torchrun --nproc-per-node 2 -m moe_routing doctor",
            "what each rank has, and whether ranks differ",
        ),
        (
            "moe-routing doctor --json | jq .checks",
            "for programs; exit code 0 fine, 1 unusable, 2 wrong usage",
        ),
    ),
)(doctor)
app.command(
    "list",
    cls=taught(
        ("moe-routing list", "everything"),
        ("moe-routing list qwen", "names with qwen in them, and where each formula comes from"),
        ("moe-routing list --json", "for programs"),
    ),
)(list_routers)
app.command(
    "explain",
    cls=taught(
        ("moe-routing explain gemma4", "on the CPU"),
        (
            "moe-routing explain deepseek_v3 --device cuda:0 --dtype float32",
            "with E = 256 and K = 8, the model's own",
        ),
        (
            "moe-routing explain softmax_topk -e 64 -k 6 --backend eager",
            "can this backend do it? exit code 1 if not",
        ),
        (
            "moe-routing explain plan -e 128 -k 8 --device cuda:0",
            "which backend groups tokens by expert there",
        ),
    ),
)(explain)
app.command(
    "conformance",
    cls=taught(
        (
            "moe-routing conformance acme --report acme.html",
            "the whole contract, and a page to publish",
        ),
        (
            "moe-routing conformance acme --device cuda:0 --full",
            "every size and dtype, before a release",
        ),
        (
            "moe-routing conformance acme --clause 10 --clause 11",
            "only batch invariance and determinism",
        ),
    ),
)(conformance)
app.command(
    "transformers",
    cls=taught(
        (
            "moe-routing transformers mixtral",
            "which layers of such a model patch() replaces, by what",
        ),
        (
            "moe-routing transformers ./checkpoint --json",
            "by a checkpoint's config.json, for programs; exit code 1 if one is left",
        ),
    ),
)(transformers)
app.command(
    "new-backend",
    cls=taught(
        (
            "moe-routing new-backend acme moe-routing-acme",
            "a distribution to install, check and fill with a kernel",
        )
    ),
)(new_backend)
app.command(
    "bench",
    cls=taught(
        ("moe-routing bench", "gemma4 on the first accelerator, and plain PyTorch"),
        (
            "moe-routing bench --backend all --dtype bf16,fp32 --plot bench.html",
            "every backend that fits, and a page to look at",
        ),
        (
            "moe-routing bench --mode call --compare eager,compile-default",
            "whole calls, and PyTorch and torch.compile",
        ),
        (
            "moe-routing bench plan --num-experts 128 --topk 8 --block 64",
            "grouping tokens by expert: every backend that fits, and a sort in PyTorch",
        ),
        ("moe-routing bench --json > before.json", "keep a run"),
        (
            "moe-routing bench --against before.json",
            "exit code 1 if a backend got slower by more than the noise",
        ),
    ),
)(bench)
app.command(
    "report",
    cls=taught(
        ("moe-routing report", "moe-routing-report.html, to attach to a bug report"),
        ("moe-routing report --device cpu --out cpu.html", "try the CPU, although there is a GPU"),
    ),
)(report)
app.command(
    "tune",
    cls=taught(
        (
            "moe-routing tune",
            (
                "which launch serves how many tokens best, for Gemma4's routing; "
                "a minute, with a progress bar"
            ),
        ),
        (
            "moe-routing tune --model deepseek_v3,qwen3_moe --dtype bf16,fp32",
            "several models, with their own E and K",
        ),
        (
            "moe-routing tune --router softmax_topk --experts 64 --topk 6 --tokens 1,8,64",
            "the sizes that you serve",
        ),
    ),
)(tune)
app.command(
    "scale",
    cls=taught(
        (
            "moe-routing scale --ranks 8,64,512",
            "what each rank sends and how long it takes, for DeepSeek-V3's layer",
        ),
        (
            "moe-routing scale --ranks 4,8 --tokens 1,4096 --hidden 2816 --experts 128",
            "the sizes that you serve",
        ),
        (
            "moe-routing scale --network-rate 25 --network-latency 8",
            "another network between hosts",
        ),
        ("moe-routing scale --json | jq .changes", "for programs"),
    ),
)(scale)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; return its exit code.

    What goes wrong is one line on stderr, never a traceback.
    """
    if sys.stdout is None:  # Python's way to say that file descriptor 1 is closed
        return _fail("stdout is closed, so there is nowhere to print to", 1)
    with warnings.catch_warnings():
        warnings.showwarning = _say
        warnings.filterwarnings("ignore", message=NUMPY_WARNING)
        try:
            # In a context of its own: whether there was an answer concerns this command alone.
            code = copy_context().run(_run, list(arguments))
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read has read enough
            drop_stdout()
            return 1
        except OSError as error:
            drop_stdout()
            return _fail(str(error), 1)
        return code


def _run(arguments: list[str]) -> int:
    try:
        # Without standalone mode the exit code comes back as the value.
        return int(app(args=arguments, prog_name="moe-routing", standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except OSError:
        raise
    except BaseException as error:  # noqa: BLE001 -- a kernel, or torch itself, may raise anything
        if isinstance(error, SystemExit) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # typer's way to end at a broken pipe
        text, code = _judged(error)
    if "--json" in arguments:
        print_json_of(text)
    return _fail(text, code)


def _judged(error: BaseException) -> tuple[str, int]:
    """Return the sentence for what was raised, and the exit code."""
    if isinstance(error, UnknownNameError):
        return shortened(error), _USAGE
    if isinstance(error, (UsageError, UnknownDeviceError)):
        return str(error), _USAGE
    if isinstance(error, _ParserError):
        return _message(error), _USAGE
    if isinstance(error, (Unusable, AbsentDeviceError, DuplicateNameError)):
        return str(error), 1
    if isinstance(error, BackendUnavailableError):
        refused = error.report.rejection(error.report.requested or "")
        why = f": {refused.verdict.reason}" if refused else ""
        return f"{str(error).partition(chr(10))[0]}{why}; `moe-routing explain` says more", 1
    return _unforeseen(error), 1


def _message(error: Exception) -> str:
    text: str = getattr(error, "format_message", error.__str__)()
    return text.replace("Value error, ", "")


def _unforeseen(error: BaseException) -> str:
    """Say what was raised, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{sentence('this command', error)} ({frame.filename}, line {frame.lineno})"


def _say(message: Warning | str, *_details: object, **_more: object) -> None:
    _print_on_stderr(f"warning: {message}")


def _fail(text: str, code: int) -> int:
    _print_on_stderr(text)
    return code


def _print_on_stderr(text: str) -> None:
    # If stderr is closed or cannot be written, nothing is left to say it on.
    with suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(f"moe-routing: {printable(' '.join(text.split()))}\n")
