"""What the Hub answers, in one line that says what to do. Nothing here talks to it."""

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

# The HTTP library under huggingface_hub has changed its name before, and has its own line of errors.
_HttpError: type[Exception] = HfHubHTTPError.__bases__[0]
HUB_ERRORS = (OSError, _HttpError, EntryNotFoundError)

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_BY_STATUS = {
    401: "the Hub refuses {token}; {login}",
    403: "{token} may not do this; take one with the right to ({settings})",
    409: "another change came in between; run the same command again",
    412: "another change came in between; run the same command again",
    413: "a file is larger than the Hub takes",
    429: "too many requests, and waiting did not help; run the same command again later",
}


def hub_reason(error: Exception) -> str:
    """One line on what went wrong between here and the Hub, and what to do about it; a token is never in it."""
    cause = error.__cause__
    if isinstance(cause, HUB_ERRORS) and (
        isinstance(error, LocalEntryNotFoundError | RuntimeError) or type(error) is OSError
    ):
        # Said by a part that did not see the answer.
        return hub_reason(cause)
    # The order is from special to general: a gated repository is one that is not found, for the client.
    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its terms on its page, then {login_advice()} (now: {_token()})"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such repository, or a private one that {_token()} may not read; {login_advice()}"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such branch, tag or commit; look at its history on its page"
    if isinstance(error, OfflineModeIsEnabled) or (
        isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        return f"not all of it is in the cache, and {offline()} forbids to fetch it; run once without"
    if isinstance(error, HfHubHTTPError):
        return _of_status(error)
    if isinstance(error, LocalEntryNotFoundError | _HttpError):
        return f"{constants.ENDPOINT} could not be reached ({named(error)}); check the network"
    return named(error)


def is_unreachable(error: Exception) -> bool:
    """Whether nothing came from the Hub, so that what is in the cache may do."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    # An answer that is an error has the client's own as its cause.
    if any(isinstance(each, HfHubHTTPError) for each in chain):
        return False
    return any(isinstance(each, OfflineModeIsEnabled | _HttpError) for each in chain)


def _of_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status in _BY_STATUS:
        settings = f"{constants.ENDPOINT}/settings/tokens"
        return f"{_BY_STATUS[status].format(token=_token(), settings=settings, login=login_advice())} (status {status})"
    if status >= 500:
        return f"the Hub is not well (status {status}); run the same command again later"
    said = (error.server_message or str(error)).strip().splitlines()
    return f"the Hub answers {status} ({said[0] if said else 'and says nothing'})"


def offline() -> str | None:
    """The environment variable that forbids the network, as it is set; None: it is allowed."""
    if not constants.HF_HUB_OFFLINE:
        return None
    # The client reads the second one if the first is empty.
    name = next((name for name in _OFFLINE if os.environ.get(name)), _OFFLINE[0])
    return f"{name}={os.environ.get(name, '1')}"


def login_advice() -> str:
    """The way to another token: a login has no effect while a variable is set."""
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
