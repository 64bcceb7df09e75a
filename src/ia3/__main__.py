"""`python -m ia3` is the `ia3` command."""

from .cli import main

# A process that is started by another one (multiprocessing) imports this too.
if __name__ == "__main__":
    main()
