"""Runs the command line: python -m evaluate."""

from evaluate.cli import main

if __name__ == "__main__":
    main(prog_name="python -m evaluate")
