"""Runs the command line: python -m trainer."""

from trainer.cli import main
from trainer.system.distributed import ending_together

if __name__ == "__main__":
    with ending_together():
        main(prog_name="python -m trainer")
