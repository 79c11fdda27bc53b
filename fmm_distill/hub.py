"""What the Hub answers, in one line that says what to do. Nothing here talks to it."""

from __future__ import annotations

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

__all__ = ["HUB_FAULTS", "hub_reason", "no_answer"]

# The HTTP library under huggingface_hub has changed its name before, and has its own line of errors.
_HttpError: type[Exception] = HfHubHTTPError.__bases__[0]
HUB_FAULTS = (OSError, _HttpError, EntryNotFoundError)

_BY_STATUS = {
    401: "the Hub refuses {token}; log in again (hf auth login)",
    403: "{token} may not do this; take one with the right to ({settings})",
    409: "another change came in between; run the same command again",
    412: "another change came in between; run the same command again",
    413: "a file is larger than the Hub takes",
    429: "too many requests, and waiting did not help; run the same command again later",
}


def hub_reason(error: Exception) -> str:
    """One line on what went wrong between here and the Hub, and what to do about it; a token is never in it."""
    cause = error.__cause__
    if isinstance(cause, HUB_FAULTS) and (
        isinstance(error, LocalEntryNotFoundError | RuntimeError) or type(error) is OSError
    ):
        # Said by a part that did not see the answer.
        return hub_reason(cause)
    # The order is from special to general: a gated repository is one that is not found, for the client.
    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its terms on its page, then log in (hf auth login; now: {_token()})"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such repository, or a private one that {_token()} may not read (hf auth login)"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such branch, tag or commit; look at its history on its page"
    if isinstance(error, OfflineModeIsEnabled) or (
        isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        return "not all of it is in the cache, and HF_HUB_OFFLINE=1 forbids to fetch it; run once without"
    if isinstance(error, HfHubHTTPError):
        return _of_status(error)
    if isinstance(error, LocalEntryNotFoundError | _HttpError):
        return f"{constants.ENDPOINT} could not be reached ({_first_line(error)}); check the network"
    return _first_line(error)


def no_answer(error: Exception) -> bool:
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
        return f"{_BY_STATUS[status].format(token=_token(), settings=settings)} (status {status})"
    if status >= 500:
        return f"the Hub is not well (status {status}); run the same command again later"
    said = (error.server_message or str(error)).strip().splitlines()
    return f"the Hub answers {status} ({said[0] if said else 'and says nothing'})"


def _token() -> str:
    return "no token" if get_token() is None else "your token"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
