"""`python -m solidify` and the `solidify` command."""

from __future__ import annotations

import io
import os
import sys

DEBUG = "SOLIDIFY_DEBUG"  # set to anything, the original error is shown with its traceback


def main() -> None:
    """Runs the command line; what is wrong with the input ends in one message on stderr and exit code 2.

    So does what nobody foresaw, unless the environment variable SOLIDIFY_DEBUG is set: then it is raised as it is.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone still shows every word
    try:
        _run()
    except BrokenPipeError:  # who read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _run() -> None:
    from solidify import foreign
    from solidify.cli import app
    from solidify.errors import CheckFailed, SolidifyError

    try:
        app()
    except (CheckFailed, SolidifyError) as error:
        if os.environ.get(DEBUG):
            raise
        _say(str(error))
        sys.exit(1 if isinstance(error, CheckFailed) else 2)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:  # outside of a verb, which says more
        _say("interrupted; nothing half-written is left")
        sys.exit(130)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        _say(f"{foreign.said(error)} (nobody foresaw this; {DEBUG}=1 shows where it comes from)")
        sys.exit(2)


def _say(words: str) -> None:
    """Prints a message without what could steer a terminal: names in it come from files."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in words)
    sys.stderr.write(f"solidify: {shown}\n")  # in one piece: several processes may share the terminal
    sys.stderr.flush()


if __name__ == "__main__":
    main()
