"""Starts the processes that train one model together: torchrun's launcher, with our exit codes and without its tables."""

import logging
import os
import signal
import sys

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from trainer.config import ConfigError, LoadedConfig, one_line
from trainer.system.device import choose_device

# Seconds from a signal until processes that have not ended are killed: time for a step and a checkpoint. It has to be
# less than the time the container is given (stop_grace_period in compose.yaml).
SHUTDOWN_SECONDS = 100

KILLED = ": by hand, or because memory ran out (then lower training.per_device_train_batch_size)"


def launch(loaded: LoadedConfig, name: str, processes: int, machines: int, rendezvous: str | None) -> int:
    """Run this command in `processes` processes here, together with those on other machines.

    `rendezvous` is HOST:PORT of the first machine, where all of them meet under `name`; None on a single one. Returns
    the exit status: 0, 128 plus the signal after one, or that of the process that failed.
    """
    os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"] = str(processes * machines), str(processes)
    os.environ["NORDSPARSE_LAUNCHER"] = str(os.getpid())
    os.environ["NORDSPARSE_RENDEZVOUS"] = rendezvous or ""
    choose_device(loaded.config)  # what this machine cannot do is said once, not by every process
    logging.disable(logging.ERROR)  # this process only waits: a table per ended process helps nobody
    # torchrun's own choice is one thread per process
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=processes,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous or "localhost:0",
        max_restarts=0,  # a run is gone on with from its checkpoint, by `resume`
        logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)),
    )
    if machines > 1:
        print(f"waiting   for {machines} machines at {rendezvous}", flush=True)
    try:
        elastic_launch(config, sys.executable)("-m", "trainer", *sys.argv[1:])
    except (RendezvousError, DistError) as error:
        raise ConfigError(
            f"--rendezvous {rendezvous}: the machines do not meet: {one_line(error)}. HOST has to be one of them, with "
            "PORT open, and the same on all"
        ) from None
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                name = signal.Signals(-failure.exitcode).name
                print(f"Error: process {rank} was ended by {name}" + KILLED * (name == "SIGKILL"), file=sys.stderr)
        return exit_status([failure.exitcode for failure in error.failures.values()])
    return 0


def exit_status(codes: list[int]) -> int:
    """One status for several processes: that of one that was killed, else of one that failed.

    The launcher itself stops (-SIGTERM) those that are left, and some end with 1 because they have lost another.
    """
    own = [code for code in codes if code != -signal.SIGTERM] or codes
    first = min(own, key=lambda code: (code > 0, code == 1))
    return first if first > 0 else 128 - first
