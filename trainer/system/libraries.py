"""What the libraries print, send and keep in memory."""

import logging
import os
import warnings


def set_up_libraries(verbose: bool) -> None:
    """Quiet logs, no telemetry, and no memory for matrix shapes that do not come again."""
    # oneDNN keeps a kernel for each of the last 1,024 shapes, and torch's own layer above it as much again: texts of all
    # lengths fill both, in the quickstart with 390 MB, and leave as much unused between them. Read at the first product.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "16")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        return
    import huggingface_hub

    quiet_libraries()
    huggingface_hub.utils.disable_progress_bars()  # downloads have lines of their own


def quiet_libraries() -> None:
    """Errors only, no progress bars but the hub's, no telemetry."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    import huggingface_hub
    import transformers

    logging.basicConfig(level=logging.ERROR)
    huggingface_hub.logging.set_verbosity_error()  # else every failed attempt to reach the hub is told twice
    warnings.simplefilter("ignore", FutureWarning)  # of the libraries to each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
