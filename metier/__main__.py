"""``python -m metier`` and the console script: run the command line, and turn errors into a sentence and a code."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point; exits with a code of :func:`cluster.errors.exit_codes`."""
    from cluster.errors import MetierError
    from metier.cli import app
    from metier.console import complain

    try:
        app()
    except MetierError as error:
        complain(error.message)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)
    except OSError as error:
        import errno

        if error.errno == errno.ENOSPC:
            complain(f"no space left on the device ({error.filename or 'while writing'}); free some, then run the same again")
            sys.exit(6)
        raise


if __name__ == "__main__":
    main()
