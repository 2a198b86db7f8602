# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Publishing a model on the Hub: staged beside the folder, checked as a user would load it, sent in one commit."""

import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from . import __version__
from .hub_card import is_generated, write_card
from .hub_checks import check_card, check_loads, check_no_machine_paths
from .hub_staging import CARD, is_replaced, stage


class PublishError(RuntimeError):
    """The Hub refused, or the way to it broke: the repository has nothing of the new version, or all of it."""


@dataclass(frozen=True)
class Publication:
    """What was published, or with `dry_run` would be."""

    repo_id: str
    revision: str
    files: dict[str, int]  # name in the repository -> bytes
    left_out: tuple[str, ...]  # names in the folder that are not published
    notes: tuple[str, ...]  # what should be mended, though it prevents nothing
    commit: str | None = None  # its sha; the revision's as it was if nothing had changed
    url: str | None = None


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    with_code: bool = False,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Publishes the model in `folder` as `repo_id` in one commit, after checking that it loads and runs.

    `folder` is what `save_pretrained` writes, or a checkpoint with the published names, which is converted; it is not
    changed. Without a README.md of your own it gets a card that states what the model is and, for the final model of a
    pre-training run, what that run recorded. The repository, and the branch `revision`, are made if need be. Weights,
    configurations and code of an earlier version that are no longer there are removed in the same commit. `with_code`
    adds the model code, so that `trust_remote_code=True` loads the model where this package is not installed.
    `dry_run` checks and sends nothing.

    Raises:
        FileNotFoundError: no folder, configuration or weights.
        ValueError: the folder cannot be published as it is; the message says what to change.
        PublishError: the Hub could not be reached, or refused.
    """
    source = Path(folder)
    _check_names(repo_id, revision)
    with tempfile.TemporaryDirectory(prefix="spear_hf-publish-") as place:
        staged = Path(place)
        left_out = stage(source, staged, with_code)
        check_no_machine_paths(staged, source)
        notes = check_card(staged / CARD) if (staged / CARD).is_file() else None
        model = check_loads(staged, source)
        if notes is None or is_generated(staged / CARD):
            write_card(staged, source, model, repo_id, with_code)
            notes = check_card(staged / CARD)
        del model
        files = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
        publication = Publication(
            repo_id=repo_id,
            revision=revision or constants.DEFAULT_REVISION,
            files={name: path.stat().st_size for name, path in files.items()},
            left_out=tuple(left_out),
            notes=tuple(notes),
        )
        if dry_run:
            return publication
        return _send(publication, files, private, message or f"Upload model with spear_hf {__version__}", token)


def _check_names(repo_id: str, revision: str | None) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not the id of a repository, OWNER/NAME: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner: give OWNER/{repo_id}.")
    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(f"revision {revision!r} is a commit, which cannot be added to: give the name of a branch.")


def _send(
    publication: Publication, files: dict[str, Path], private: bool, message: str, token: str | None
) -> Publication:
    """The network half. One commit on the revision as it was found, so that nobody's work is overwritten unseen."""
    api = HfApi(token=token, library_name="spear_hf", library_version=__version__)
    repo_id, revision = publication.repo_id, publication.revision
    try:
        api.whoami()  # an invalid token is named as such here; later it looks like a missing repository
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision != constants.DEFAULT_REVISION:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        found = api.model_info(repo_id, revision=revision)
        if private and found.private is False:
            raise PublishError(f"{repo_id} exists and is public: make it private in its settings, or choose another.")
        old = [sibling.rfilename for sibling in found.siblings or () if is_replaced(sibling.rfilename)]
        # Not upload_folder, which since huggingface_hub 2 may spread its files over several commits.
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in old if name not in files),
                *(CommitOperationAdd(name, str(path.resolve())) for name, path in files.items()),
            ],
            commit_message=message,
            revision=revision,
            parent_commit=found.sha,
        )
    except PublishError:
        raise
    except Exception as error:  # whatever the client, its transport or the Hub raises
        raise PublishError(_explain(error, repo_id, revision)) from error
    return replace(publication, commit=commit.oid, url=str(commit.commit_url))


def _explain(error: Exception, repo_id: str, revision: str) -> str:
    """What went wrong on the way, and what to do."""
    if isinstance(error, LocalTokenNotFoundError):
        return "The Hub needs a token to publish: `hf auth login`, or set HF_TOKEN."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status == 401:
        return "The Hub does not accept the token: get one at its settings page, then `hf auth login` or set HF_TOKEN."
    if status == 403:
        return f"The token may not write to {repo_id}: use one with the right to write, or a repository of your own."
    if status == 412:
        return f"{repo_id} got another commit on {revision} meanwhile: look at it, and publish again."
    causes = [error]
    while causes[-1].__cause__ is not None and len(causes) < 4:
        causes.append(causes[-1].__cause__)  # type: ignore[arg-type]
    reasons = "; ".join(dict.fromkeys(str(cause).strip().rstrip(".") or type(cause).__name__ for cause in causes))
    return (
        f"Not published: {reasons}. The branch {revision} of {repo_id} has no part of the new version. Run the same "
        "command again: large files that arrived are not sent twice."
    )
