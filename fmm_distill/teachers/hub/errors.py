"""Errors of the Hub as one line with a remedy. Nothing here calls the Hub."""

from __future__ import annotations

import os

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fmm_distill.errors import named

__all__ = ["HUB_ERRORS", "hub_reason", "is_unreachable", "login_advice", "offline"]

# The base class of the HTTP library below huggingface_hub, which was requests once and is httpx today.
_HttpError: type[Exception] = HfHubHTTPError.__bases__[0]
HUB_ERRORS = (OSError, _HttpError, EntryNotFoundError)

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_BY_STATUS = {
    401: "the Hub refuses {token}; {login}",
    403: "{token} may not do this; take one with the right to ({settings})",
    409: "the repository changed in the meantime; run the same command again",
    412: "the repository changed in the meantime; run the same command again",
    413: "a file is larger than the Hub accepts",
    429: "too many requests; run the same command again later",
}


def hub_reason(error: Exception) -> str:
    """Return one line on an error of the Hub and its remedy; it never contains a token."""
    cause = error.__cause__
    if isinstance(cause, HUB_ERRORS) and (
        isinstance(error, LocalEntryNotFoundError | RuntimeError) or type(error) is OSError
    ):
        # Raised by a part of the client that did not see the response.
        return hub_reason(cause)
    # From special to general: in the client, GatedRepoError is a RepositoryNotFoundError.
    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its terms on its page, then {login_advice()} (now: {_token()})"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such repository, or a private one that {_token()} may not read; {login_advice()}"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such branch, tag or commit; try one from the history on its page"
    if isinstance(error, OfflineModeIsEnabled) or (
        isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        return f"the cache is incomplete, and {offline()} forbids downloads; run once without it"
    if isinstance(error, HfHubHTTPError):
        return _of_status(error)
    if isinstance(error, LocalEntryNotFoundError | _HttpError):
        return f"{constants.ENDPOINT} could not be reached ({named(error)}); check the network"
    return named(error)


def is_unreachable(error: Exception) -> bool:
    """Return whether the Hub did not respond at all, so that the cache may be used instead."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    # A response with an error status is in the chain as the client's own error.
    if any(isinstance(each, HfHubHTTPError) for each in chain):
        return False
    return any(isinstance(each, OfflineModeIsEnabled | _HttpError) for each in chain)


def _of_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status in _BY_STATUS:
        settings = f"{constants.ENDPOINT}/settings/tokens"
        return f"{_BY_STATUS[status].format(token=_token(), settings=settings, login=login_advice())} (status {status})"
    if status >= 500:
        return f"the Hub has an internal error (status {status}); run the same command again later"
    lines = (error.server_message or str(error)).strip().splitlines()
    return f"the Hub responds with status {status} ({lines[0] if lines else 'without a message'})"


def offline() -> str | None:
    """Return the setting that forbids network access, as ``NAME=value``; None: access is allowed."""
    if not constants.HF_HUB_OFFLINE:
        return None
    # As in the client: the second variable is read if the first is empty.
    name = next((name for name in _OFFLINE if os.environ.get(name)), _OFFLINE[0])
    return f"{name}={os.environ.get(name, '1')}"


def login_advice() -> str:
    """Return how to change the token; a login has no effect while an environment variable is set."""
    name = _token_variable()
    return (
        "log in again (hf auth login)"
        if name is None
        else f"set {name} to another token, or unset it and log in (hf auth login)"
    )


def _token_variable() -> str | None:
    return next((name for name in _TOKENS if os.environ.get(name)), None)


def _token() -> str:
    if get_token() is None:
        return "no token"
    name = _token_variable()
    return "your token" if name is None else f"the token in {name}"
