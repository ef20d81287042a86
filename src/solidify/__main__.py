"""`python -m solidify` and the `solidify` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; what is wrong with the input ends in one message on stderr and exit code 2."""
    from solidify.cli import app
    from solidify.errors import CheckFailed, SolidifyError

    try:
        app()
    except CheckFailed as error:
        print(f"solidify: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # outside of a verb, which says more
        print("solidify: interrupted; nothing half-written is left", file=sys.stderr)
        sys.exit(130)
    except SolidifyError as error:
        print(f"solidify: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
