"""``python -m kdflow``."""

from kdflow.cli import main

main()
