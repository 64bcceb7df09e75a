"""The `ia3` command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

from .. import __version__
from ..base.progress import shown_by
from ..errors import BrokenFileError, IA3Error

try:
    import typer

    from ..report.console import passing_bar
    from .adapters import combine, diff, inspect, list_adapters, search
    from .check import check
    from .classifier import evaluate, fit, predict
    from .compare import compare
    from .demo import demo, prepare
    from .doctor import doctor
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
for _of_adapters in (inspect, diff, search, combine):
    app.command()(_of_adapters)
for _of_the_machine in (serve, doctor, models):
    app.command()(_of_the_machine)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ia3 {__version__}")
        raise typer.Exit


@app.callback()
def _before_any_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command.

    Mistakes a user can mend are one line on standard error and exit code 1, 2 where the command
    line itself is wrong; Ctrl-C is exit code 130.
    """
    warnings.showwarning = _show_warning
    try:
        with shown_by(passing_bar):
            sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except _UsageError as error:
        where = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        say(f"{error.format_message()}{where}", "error:", "bold red")
        sys.exit(2)
    except (IA3Error, OSError) as error:
        # What a file's keys are called is not what options are called.
        said = reason(error) if isinstance(error, BrokenFileError) else as_options(reason(error))
        say(said, "error:", "bold red")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    warn(as_options(str(message)))
