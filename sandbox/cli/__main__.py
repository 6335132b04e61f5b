"""`python -m sandbox.cli`: how the command line starts an agent of its own."""

from sandbox.cli import main

main()
