"""`python -m regla`: the command `regla` where its script is not on the path."""

from regla.cli import main

main()
