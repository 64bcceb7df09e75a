"""The `ia3` command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Annotated, Any

from .. import __version__
from ..base.processes import (
    end_process,
    fails_first,
    is_launched,
    others_named,
    processes,
    unlaunched,
)
from ..base.progress import shown_by
from ..errors import BrokenFileError, IA3Error

try:
    import typer

    from ..report.console import passing_bar, quiet, screen
    from .adapters import combine, diff, inspect, list_adapters, search
    from .check import check
    from .classifier import evaluate, fit, predict
    from .compare import compare
    from .demo import demo, prepare
    from .doctor import doctor
    from .export import export, merge
    from .many import fit_many
    from .models import models
    from .options import as_options, reason, say, warn
    from .pretrain import convert, pretrain
    from .raft import raft
    from .serve import serve
    from .suggest import suggest
except ImportError as error:
    raise SystemExit(
        f"error: the ia3 command needs {error.name!r}: pip install 'ia3[cli]'"
    ) from error

# What several processes that a launcher started do together; all else the first one does alone.
TOGETHER = ("fit", "fit-many", "predict", "evaluate", "pretrain")

app = typer.Typer(
    help="Few-shot classification with (IA)³: learned vectors on a frozen model.",
    pretty_exceptions_enable=False,
)
# Of typer's own copy of click or of click itself, whichever this version has.
_UsageError: Any = typer.BadParameter.__base__
for _command in (
    check,
    fit,
    fit_many,
    predict,
    evaluate,
    suggest,
    demo,
    prepare,
    pretrain,
    compare,
    raft,
    convert,
):
    app.command()(_command)
app.command("list")(list_adapters)
for _of_adapters in (inspect, diff, search, combine, merge, export):
    app.command()(_of_adapters)
for _of_the_machine in (serve, doctor, models):
    app.command()(_of_the_machine)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ia3 {__version__}")
        raise typer.Exit


@app.callback()
def _before_any_command(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    if not is_launched():
        return
    if context.invoked_subcommand in TOGETHER:
        # Made a group at once, so that they know of each other's errors from here on.
        if not processes().is_first:
            quiet()
        signal.signal(signal.SIGTERM, _ended_by_launcher)
        return
    if os.environ["RANK"] != "0":
        raise typer.Exit
    warn(f"ia3 {context.invoked_subcommand} is one process's work: the others of this job end now")
    context.with_resource(unlaunched())


def _ended_by_launcher(*_: object) -> None:
    """As another process has ended, or the whole job was told to end."""
    if fails_first():
        screen.quiet = False
        say("another process of this job has ended, or all were told to end", "error:", "bold red")
    sys.exit(128 + signal.SIGTERM)


def main() -> None:
    """Run the command.

    Mistakes a user can mend are one line on standard error and exit code 1, 2 where the command
    line itself is wrong; Ctrl-C is exit code 130. Of several processes that a launcher started the
    first one prints, and the first to fail says why.
    """
    if is_launched() and os.environ["RANK"] != "0":
        # Of help and the version too.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        _run()
    except SystemExit as ended:
        if is_launched():
            # The launcher ends those too that are ending already.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            end_process(ended.code)
        raise


def _run() -> None:
    """Run the command and raise `SystemExit`; what is a fault of the program is raised."""
    warnings.showwarning = _show_warning
    try:
        with shown_by(passing_bar), others_named():
            sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except Exception as error:
        if is_launched() and not fails_first():
            sys.exit(1)
        screen.quiet = False
        if isinstance(error, _UsageError):
            where = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
            say(f"{error.format_message()}{where}", "error:", "bold red")
            sys.exit(2)
        if not isinstance(error, IA3Error | OSError):
            raise
        # What a file's keys are called is not what options are called.
        said = reason(error) if isinstance(error, BrokenFileError) else as_options(reason(error))
        say(said, "error:", "bold red")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    warn(as_options(str(message)))
