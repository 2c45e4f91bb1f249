"""``python -m empg_lite``."""

from empg_lite.cli import main

main()
