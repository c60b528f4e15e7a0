"""Errors of the network and of the Hub in words: what, from where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from shared.app.hub.address import HubFile, by_hand
from shared.quant.errors import RunError, UserError


@contextmanager
def explained(file: HubFile, endpoint: str, target: Path) -> Iterator[None]:
    """Turn network and Hub errors inside the block into one that says what, from where, and what to do."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except (httpx2.HTTPError, OfflineModeIsEnabled, TimeoutError) as error:
        raise _explain(error, file, endpoint, target) from error


def _explain(error: Exception, file: HubFile, endpoint: str, target: Path) -> UserError:
    from huggingface_hub import errors

    name, repo, host = file.name, file.repo_id, urlsplit(endpoint).netloc
    hint = by_hand(file.url(endpoint), target)
    login = 'log in with "hf auth login" (or set HF_TOKEN)'
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.OfflineModeIsEnabled):
        return RunError(f"{name} is not on this machine, and HF_HUB_OFFLINE forbids downloading it.", hint)
    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{name}: {repo} on {host} is gated: its owner gives access account by account.",
            f"Accept the terms at {endpoint}/{repo}, {login} and try again. {hint}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f'{name}: {repo} on {host} has no revision "{file.revision}".', hint)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return UserError(f"{name}: {repo} on {host} has no file {file.path}.", hint)
    if status in (401, 403, 404):
        return UserError(
            f"{name}: {host} answers {status}: {repo} is not there, or only some accounts may read it.",
            f"Check the address, or {login}. {hint}",
        )
    if status is not None:
        return RunError(f"{name}: {host} answers with error {status}.", f"Try again later. {hint}")
    reason = str(error) or type(error).__name__
    return RunError(f"{name} is not on this machine, and {host} cannot be reached ({reason}).", hint)
