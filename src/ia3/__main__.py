"""`python -m ia3` is the `ia3` command."""

from .cli import main

main()
