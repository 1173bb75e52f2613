"""``python -m pared`` is the command ``pared``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, also where the environment lets nothing else be imported."""
    try:
        from pared import cli
    except ImportError as e:
        # The extension refuses an unusable PARED_ISA or PARED_NUM_THREADS as soon as it is loaded.
        if not str(e).startswith("PARED_"):
            raise
        print(f"pared: error: {e}", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
