"""``python -m birkhoff``."""

from birkhoff.cli import main

main()
