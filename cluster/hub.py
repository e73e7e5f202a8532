"""A few files to and from a repository on a model hub, as one commit. The token is ``HF_TOKEN`` and nothing else.

Not covered: models to train on and to serve (:mod:`cluster.models`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import BadInput, NotFound, Unavailable
from cluster.models import HUB_ID

TOKEN_VARIABLE = "HF_TOKEN"


def upload(repo: str, directory: Path, names: Sequence[str], message: str) -> str:
    """Put the files `names` of `directory` into `repo`, which is made (private) if it is not there.

    Returns:
        The address of the commit.

    Raises:
        BadInput: no token, or `repo` is not ``org/name``.
        NotFound, Unavailable: the hub does not know the repository, refuses, or does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    _check(repo)
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise BadInput(f"hub:{repo}: set {TOKEN_VARIABLE} to a token that may write there")
    with _errors(repo):
        api = HfApi(token=token)
        api.create_repo(repo, private=True, exist_ok=True)
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=directory / name) for name in names]
        return str(api.create_commit(repo, files, commit_message=message).commit_url)


def download(repo: str, revision: str | None, names: Sequence[str], out: Path) -> str:
    """Copy those of `names` that `repo` has into `out`; returns the commit they are of.

    Raises:
        BadInput, NotFound, Unavailable: as :func:`upload`, but no token is needed where anybody may read.
    """
    from huggingface_hub import HfApi

    _check(repo)
    with _errors(repo):
        api = HfApi(token=os.environ.get(TOKEN_VARIABLE) or False)
        commit = str(api.model_info(repo, revision=revision).sha)
        api.snapshot_download(repo, revision=commit, local_dir=out, allow_patterns=list(names))
    shutil.rmtree(out / ".cache", ignore_errors=True)  # huggingface_hub's notes for continuing a download.
    return commit


def _check(repo: str) -> None:
    if not HUB_ID.fullmatch(repo):
        raise BadInput(f"'hub:{repo}' is not a repository; write hub:org/name")


@contextmanager
def _errors(repo: str) -> Iterator[None]:
    from huggingface_hub import constants, errors

    where = f"hub:{repo} ({constants.ENDPOINT})"
    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotFound(
            f"{where}: there is no such repository or revision, or it is private; check the name, and set {TOKEN_VARIABLE}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        fix = f"check that {TOKEN_VARIABLE} may write there" if status in (401, 403) else "try again later"
        raise Unavailable(f"{where}: the hub answered {status}; {fix}") from error
    except (
        errors.HTTPError,
        errors.XetDownloadError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # Of any layer below it.
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The disk, not the hub.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Unavailable(f"{where} does not answer ({reason}); check HF_ENDPOINT and the network") from error
