"""
Entry point of recipes, under `accelerate launch` too: `recipes/*.py` and `p2p-trainer train` end up here.

Nothing heavy is imported before [`main`] has seen whether the Hub can be reached.
"""

import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit


_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def main(argv: Sequence[str] | None = None, default_config: Path | None = None) -> None:
    """
    Run a recipe from a command line. Bad input ends in one message; an error while training keeps its traceback.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments, by default those of the process.
        default_config (`Path`, *optional*):
            YAML file to use without `--config`.
    """
    stay_offline_if_unreachable()
    # Names that TRL's own defaults still use; there is nothing for a user to change. Our tests keep them as errors.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from . import recipe

    try:
        arguments = recipe.parse(sys.argv[1:] if argv is None else argv, default_config)
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("p2p_trainer").setLevel(logging.INFO if arguments[1].process_index == 0 else logging.ERROR)
        prepared = recipe.prepare(*arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        # On another machine the log of its first process is all that its owner sees.
        rank = os.environ.get("RANK", "0")
        raise SystemExit(f"error: {error}" if rank == "0" else f"error in process {rank}: {error}") from error
    try:
        recipe.train(prepared)
    finally:
        let_gloo_finish()


def let_gloo_finish() -> None:
    """
    Give up the interpreter's lock for a moment, before a trainer of several processes is forgotten.

    In torch 2.13 a thread of gloo needs the lock to drop the tensors of the last collective, and the DDP reducer, if
    it is the last to hold the process group, keeps the lock while it waits for that thread: a run whose results are
    written would never end (3 of 9 runs of a test that ends right behind a collective).
    """
    time.sleep(0.1)


def stay_offline_if_unreachable() -> None:
    """
    Use the local cache alone where the Hub's name does not resolve.

    Its client would retry for a minute at each file. Has no effect once a Hugging Face library is imported.
    """
    if "HF_HUB_OFFLINE" in os.environ or any(name in os.environ for name in _PROXIES):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


if __name__ == "__main__":
    main()
