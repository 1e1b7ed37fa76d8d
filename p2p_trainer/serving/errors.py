"""Errors in the shape that OpenAI's clients understand."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError


# A name that is shown again; anything else that a client calls a field is its own text, of any length.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_LONGEST = 500
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "request_too_large", 415: "not_json"}


class ApiError(Exception):
    """
    What is wrong with a request, or why it can't be answered now.

    Args:
        status (`int`):
            HTTP status.
        message (`str`):
            Cause and fix. It goes to the client: nothing of the key, and of the client's own text only short names.
        param (`str`, *optional*):
            Field that is at fault.
        code (`str`, *optional*):
            Short name of the error; by default one that goes with the status, if there is one.
        headers (`Mapping[str, str]`, *optional*):
            More headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code or _CODES.get(status)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """
        Return the error object.

        Returns:
            `dict[str, Any]`: JSON values.
        """
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        message = str(self)[:_LONGEST]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """
        Return the HTTP response.

        Returns:
            `JSONResponse`: the response.
        """
        return JSONResponse(self.body(), self.status, self.headers)


def overloaded(message: str) -> ApiError:
    """
    Say that there is too much to do at the moment.

    Args:
        message (`str`):
            What there is too much of.

    Returns:
        [`ApiError`]: status 503, with the header `Retry-After`.
    """
    return ApiError(503, f"{message} Try again in a moment.", code="overloaded", headers={"retry-after": "1"})


def internal_error(request_id: str) -> ApiError:
    """
    Say that something failed, and nothing about what: the operator's log does.

    Args:
        request_id (`str`):
            Name of the request, under which the log has more.

    Returns:
        [`ApiError`]: status 500.
    """
    return ApiError(500, f"Internal error. The server's log says more of request {request_id}.", code="internal_error")


def invalid_request(error: ValidationError) -> ApiError:
    """
    Turn what pydantic found into a message that repeats nothing but the name of a field.

    Args:
        error (`ValidationError`):
            What is wrong; the first thing counts.

    Returns:
        [`ApiError`]: status 400.
    """
    found = error.errors(include_url=False, include_input=False)[0]
    if found["type"] == "json_invalid":
        cause = found["ctx"]["error"]
        return ApiError(400, f"The body is not valid JSON in UTF-8: {cause}.", code="invalid_json")
    said = found["msg"].removeprefix("Value error, ").rstrip(".")
    if not found["loc"]:
        return ApiError(400, f"{said[0].upper()}{said[1:]}.")
    param = _param(found["loc"])
    shown = "A field" if param is None else f"`{param}`"
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"{shown} is not supported by this server. Leave it out.", param, "unsupported_parameter")
    if found["type"] == "missing":
        return ApiError(400, f"{shown} is missing.", param, "missing_required_parameter")
    return ApiError(400, f"{shown}: {said}.", param)


def _param(location: Sequence[int | str]) -> str | None:
    """Write a place in the body as OpenAI does, `messages[0].content`; `None` where a name is not to be shown."""
    if not location or not all(isinstance(part, int) or _NAME.fullmatch(part) for part in location):
        return None
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
