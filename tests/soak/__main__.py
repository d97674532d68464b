"""Kills trainings at random moments and resumes them until done; what comes out must equal an uninterrupted run.

python -m tests.soak --kills 25          every architecture, and several processes, 25 kills each
python -m tests.soak --long              2,000 steps: memory and open files must not grow
"""

import argparse
import functools
import os
import sys
import time

import torch

from tests.soak.long_run import measure_long
from tests.soak.one_process import soak
from tests.soak.processes import soak_processes
from tests.soak.report import table
from tests.soak.work import ARCHITECTURES


def main(arguments: list[str] | None = None) -> int:
    """0 when nothing differs, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="per architecture and number of processes")
    parser.add_argument("--architectures", nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--processes", nargs="*", type=int, default=[2], help="gloo processes that train together")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of phases and moments")
    parser.add_argument("--long", action="store_true", help="2,000 steps without a kill")
    options = parser.parse_args(arguments)
    # Before the fork: no thread of this process may hold a lock that its children would wait for.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    if options.long:
        found = measure_long(2000, 500, print)
        return int(found["rss_mb_per_1000_steps"] >= 1 or found["files_first"] != found["files_last"])
    print(f"seed {options.seed}", flush=True)
    echo = functools.partial(print, flush=True)
    reports = [soak(name, options.kills, options.seed, echo) for name in options.architectures]
    reports += [soak_processes(number, options.kills, options.seed, echo) for number in options.processes]
    print(table(reports))
    wrong = [difference for report in reports for difference in report.differences]
    for difference in wrong[:40]:
        print(f"differs: {difference}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
