"""`python -m skyline` is the same as `skyline`."""

from skyline.cli import main

main()
