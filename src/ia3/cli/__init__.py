"""The `ia3` command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from ..errors import IA3Error

try:
    import typer

    from .adapters import combine, diff, inspect, list_adapters, search
    from .classifier import evaluate, fit, predict
    from .compare import compare
    from .demo import demo, prepare
    from .many import fit_many
    from .options import reason, say, warn
    from .pretrain import convert, pretrain
    from .raft import raft
except ImportError as error:
    raise SystemExit(
        f"error: the ia3 command needs {error.name!r}: pip install 'ia3[cli]'"
    ) from error

app = typer.Typer(
    help="Few-shot classification with (IA)³: learned vectors on a frozen model.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Of typer's own copy of click or of click itself, whichever this version has.
_UsageError: Any = typer.BadParameter.__base__
for _command in (fit, fit_many, predict, evaluate, demo, prepare, pretrain, compare, raft, convert):
    app.command()(_command)
app.command("list")(list_adapters)
for _of_adapters in (inspect, diff, search, combine):
    app.command()(_of_adapters)


def main() -> None:
    """Run the command.

    Mistakes a user can mend are one line on standard error and exit code 1, 2 where the command
    line itself is wrong; Ctrl-C is exit code 130.
    """
    warnings.showwarning = _show_warning
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except _UsageError as error:
        where = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
        say(f"{error.format_message()}{where}", "error:", "bold red")
        sys.exit(2)
    except (IA3Error, OSError) as error:
        say(reason(error), "error:", "bold red")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    warn(str(message))
