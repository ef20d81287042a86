"""`python -m solidify` and the `solidify` command."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn

DEBUG = "SOLIDIFY_DEBUG"  # set to anything, the original error is shown with its traceback


def main() -> None:
    """Runs the command line; what is wrong with the input ends in one message on stderr and exit code 2.

    So does an unexpected error, unless the environment variable SOLIDIFY_DEBUG is set: then it is raised as it is.
    """
    try:
        _open_streams()
        _run_command()
    except BrokenPipeError:  # who read the output has read enough
        _discard_rest(sys.stdout)
        sys.exit(0)
    except KeyboardInterrupt:  # outside of a verb, which says more; the first things are still being imported
        sys.stderr.write("solidify: interrupted; nothing half-written is left\n")
        sys.exit(130)


def _open_streams() -> None:
    """Gives a stream that was closed (`>&-`) to nobody, so that no file of ours gets its number and what is printed.

    A terminal that knows ASCII alone still shows every word.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run_command() -> None:
    from solidify.command.cli import app
    from solidify.errors import CheckFailed, SolidifyError
    from solidify.system import foreign

    try:
        _require_here()
        _require_words()
        try:
            app()
        finally:
            _flush_output()
    except (CheckFailed, SolidifyError) as error:
        if os.environ.get(DEBUG):
            raise
        _end_process(str(error), 1 if isinstance(error, CheckFailed) else 2)
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            _end_process(f"{os.fsdecode(error.filename)[:300]} cannot be used: {error.strerror}", 2)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _discard_rest(sys.stdout)
            _end_process(f"stdout or a file cannot be written to: {error.strerror}", 2)
        _end_process(f"{foreign.said(error)} (an unexpected error; set {DEBUG}=1 to see where it comes from)", 2)


def _require_here() -> None:
    """Refuses to start in a directory that is gone: no path that is not absolute leads anywhere there."""
    from solidify.errors import SolidifyError

    try:
        os.getcwd()
    except OSError as error:
        words = "the directory that solidify was started in is gone; change to one that exists (cd)"
        raise SolidifyError(words) from error


def _require_words() -> None:
    """Refuses arguments that are not text: no file format in which names are written down could hold them."""
    from solidify.errors import SolidifyError

    for word in sys.argv[1:]:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise SolidifyError(f"the argument {word[:200]!a} is not text in UTF-8; write it in UTF-8") from error


def _flush_output() -> None:
    """Writes what is printed but not yet written; what cannot be is an error of its own."""
    from solidify.errors import SolidifyError

    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_rest(sys.stdout)
        raise SolidifyError(f"stdout cannot be written to: {error.strerror}") from error


def _discard_rest(stream: Any) -> None:
    """Lets what is left in a stream go nowhere; Python would try to write it once more at the end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _end_process(words: str, code: int) -> NoReturn:
    from solidify.system import console

    try:
        console.message(words)
    except OSError:  # there is nobody to tell
        _discard_rest(sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
