"""``python -m pared`` is the command ``pared``."""

from pared.cli import main

if __name__ == "__main__":
    main()
