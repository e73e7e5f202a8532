"""``python -m metier`` and the console script: run the command line, and turn errors into a sentence and a code."""

from __future__ import annotations

import signal
import sys

ENDED = {130: "interrupted", 143: "terminated"}


def main() -> None:
    """Entry point; exits with a code of :func:`cluster.errors.exit_codes`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` blocks end what they started
    from cluster.errors import MetierError
    from metier.cli import app
    from metier.console import complain

    try:
        app()
    except MetierError as error:
        complain(error.message)
        sys.exit(error.exit_code)
    except SystemExit as end:  # typer turns Ctrl-C into code 130 without a word
        if isinstance(end.code, int) and end.code in ENDED:
            complain(ENDED[end.code])
        raise
    except OSError as error:
        import errno

        if error.errno == errno.ENOSPC:
            complain(
                f"no space left on the device ({error.filename or 'while writing'}); free some, then run the same again"
            )
            sys.exit(6)
        raise


if __name__ == "__main__":
    main()
