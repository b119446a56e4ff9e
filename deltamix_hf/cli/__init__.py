"""The `deltamix` command: nothing heavy is imported before one of its commands runs.

A command is a function whose signature typer turns into arguments and options, and whose docstring
it turns into help. It imports torch and transformers inside, so that `--help` answers at once. It
raises; `main` turns what is raised into one readable line and an exit status other than 0.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps

import typer

from .compress import compress
from .console import report
from .diff import diff
from .env import env
from .eval import evaluate
from .generate import PASS_ON, chat, generate, serve
from .inspect import inspect, verify
from .merge import merge
from .push import push

app = typer.Typer(
    name="deltamix",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Any command takes --debug, which shows the whole trace of an error.",
)


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Ctrl-C reported as other errors are: typer would end without a word."""

    @wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as error:
            if "--debug" in sys.argv[1:]:
                raise
            raise typer.Exit(report(error)) from error

    return run


@app.callback()
def about() -> None:
    """Store a fine-tuned model as a small delta to its base, and run it beside the base."""


for command in (compress, inspect, verify, diff, merge, generate, chat, push, env):
    app.command()(_interruptible(command))
app.command("eval")(_interruptible(evaluate))
app.command(context_settings=PASS_ON)(_interruptible(serve))


def main() -> None:
    """Entry point of the `deltamix` script."""
    # Read when torch is imported. Its idle threads spin else: on two busy cores the same products
    # took 41 s instead of 2.6.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except Exception as error:
        if debug:
            raise
        sys.exit(report(error))
