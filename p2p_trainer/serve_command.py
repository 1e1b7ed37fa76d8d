"""`p2p-trainer serve`: a saved run behind an HTTP server."""

import argparse
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .saved_run_options import load_saved_run, saved_run_parser


if TYPE_CHECKING:
    import uvicorn

    from .inference import DefendedModel

# Connections that wait to be accepted, as with uvicorn.
_BACKLOG = 2048
_SHOWN_CLASSES = 12


def run(argv: list[str]) -> int:
    """
    Serve a saved run until SIGTERM or SIGINT.

    Args:
        argv (`list[str]`):
            Arguments behind `serve`.

    Returns:
        `int`: exit status.

    Raises:
        `ValueError`: there is no such run, it can't be served, or the server's packages are not installed.
        `OSError`: the port is taken, or may not be used.
    """
    arguments = _parser().parse_args(argv)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"`p2p-trainer serve` needs {error.name!r}, which is not installed. Run "
            f"`pip install 'p2p_trainer[serve]'`."
        ) from error

    from .serving.app import create_app, make_server
    from .serving.engine import Engine
    from .serving.logs import hiding

    if arguments.max_body < 1:
        raise ValueError(f"`--max_body` is a number of bytes of at least 1, got {arguments.max_body}.")
    # Bound at once, so that a port in use shows before a model is loaded; nobody can connect before it listens.
    with _bound(arguments.host, arguments.port) as listener:
        model = load_saved_run(arguments)
        engine = Engine(model, arguments.batch_size, arguments.max_waiting)
        name = arguments.served_model_name or _name(arguments.folder)
        app = create_app(engine, name, model.encoder.format.chat, arguments.max_body, arguments.withhold_unprefixed)
        with hiding(engine.hide):
            logging.basicConfig(
                level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
            )
            _listen(listener)
            sys.stderr.write(_announcement(model, name, listener) + "\n")
            sys.stderr.flush()
            _serve(make_server(app), listener)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = saved_run_parser("serve", "Serve a saved run over HTTP, as OpenAI's and vLLM's clients know it.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--served_model_name", help="name that clients ask for; by default that of the folder")
    parser.add_argument(
        "--max_waiting",
        type=int,
        default=1024,
        help="rows that may wait, a quarter of them of one request; beyond, clients get 503",
    )
    parser.add_argument(
        "--max_body", type=int, default=2**20, metavar="BYTES", help="longest request, in bytes; beyond, 413"
    )
    parser.add_argument(
        "--withhold_unprefixed", action="store_true", help="withhold written answers that lack the answer prefix"
    )
    return parser


def _name(folder: str) -> str:
    """Name a run as its folder, and not as the way there: that is the operator's."""
    return Path(folder).resolve().name if Path(folder).is_dir() else folder


def _bound(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise ValueError(f"`--port` is a number from 0 to 65535, got {port}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise _no_port(host, port, error) from error
    return listener


def _listen(listener: socket.socket) -> None:
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _no_port(host, port, error) from error


def _no_port(host: str, port: int, error: OSError) -> OSError:
    return OSError(f"Can't listen on {host}, port {port}: {error.strerror}. Give another `--host` or `--port`.")


def _announcement(model: "DefendedModel", name: str, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    what = "written answers"
    if model.labels:
        more = ", ..." if len(model.labels) > _SHOWN_CLASSES else ""
        what = f"{len(model.labels)} classes: {', '.join(model.labels[:_SHOWN_CLASSES])}{more}"
    return f"Serving {name} ({what}) at http://{shown}:{port}"


def _serve(server: "uvicorn.Server", listener: socket.socket) -> None:
    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn raises the signal again once it has ended: to have been told to stop is no failure.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
