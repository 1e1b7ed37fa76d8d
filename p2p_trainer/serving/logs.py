"""Keeps the key out of the log, whoever writes to it."""

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator


# Characters of a message or a traceback; a client's text may be in it.
_LONGEST = 16000
# Seconds between two complaints of the event loop that the system has no room for a connection. It makes as many as
# wait, each second.
_QUIET = 10.0
_NO_ROOM = "socket.accept() out of system resource"


@contextlib.contextmanager
def hiding(hide: Callable[[str], str]) -> Iterator[None]:
    """
    Pass all that is logged meanwhile, tracebacks included, through a function; what would flood the log, seldom.

    Records are changed where they are made, so it holds for loggers and handlers of every library, those that are set
    up later too. A filter of a logger would not see the records of the loggers below it.

    Args:
        hide (`Callable[[str], str]`):
            Replaces the key in a text.
    """
    make = logging.getLogRecordFactory()

    def safe(text: str) -> str:
        hidden = hide(text)
        return hidden if len(hidden) <= _LONGEST else f"{hidden[: _LONGEST // 2]} ... {hidden[-_LONGEST // 2 :]}"

    def factory(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except Exception:
            # `logging` would print the arguments that do not fit.
            message = str(record.msg)
        record.msg, record.args = safe(message), ()
        if record.exc_info:
            # Formatters take this for the traceback that they have formatted before.
            record.exc_text = safe("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
            record.exc_info = None
        if record.stack_info:
            record.stack_info = safe(record.stack_info)
        return record

    seldom = _Seldom()
    logging.setLogRecordFactory(factory)
    logging.getLogger("asyncio").addFilter(seldom)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        logging.getLogger("asyncio").removeFilter(seldom)


class _Seldom(logging.Filter):
    """Lets one complaint about connections that can't be accepted pass, and no more for a while."""

    _next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith(_NO_ROOM):
            return True
        if record.created < self._next:
            return False
        self._next = record.created + _QUIET
        return True
