"""`python -m calotype` is `calotype`."""

from calotype.cli import main

main()
