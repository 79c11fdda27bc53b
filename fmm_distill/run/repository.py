"""Checks of a Hub repository before an upload: its name, the right to write, and its present content."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, get_token, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # in its documentation, not in __all__

from fmm_distill.errors import UserError, first_line
from fmm_distill.export.local_paths import is_local, public_name
from fmm_distill.export.manifest import MANIFEST
from fmm_distill.export.public import public_teacher
from fmm_distill.io.reading import BrokenFileError, read_mapping
from fmm_distill.teachers.hub.errors import HUB_ERRORS, hub_reason, login_advice, offline

__all__ = ["Target", "check_name", "check_target"]

_SHOWN = 4


def check_name(repo: str) -> None:
    """Refuse an invalid repository name.

    Raises:
        UserError: with the reason.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"{repo}: expected a repository as owner/name ({first_line(error)}); choose another name"
        ) from error
    if repo.count("/") != 1:
        raise UserError(f"{repo}: expected a repository as owner/name; try YOUR_USER_NAME/{repo}")


@dataclass(frozen=True)
class Target:
    """The present state of a repository.

    Attributes:
        commit: the newest commit of the branch; None: the repository does not exist.
        files: the names of the files.
        there: the repository exists.
        private: the repository is private.
        teacher: the teacher of the student in it; None: it has no student.
    """

    commit: str | None
    files: frozenset[str]
    there: bool
    private: bool
    teacher: str | None = None


def check_target(repo: str, teacher: str, branch: str | None = None, *, force: bool = False) -> Target:
    """Check that the token may write to a repository and that its content may be replaced. Nothing is written.

    Args:
        teacher: the student's teacher; a repository with a student of another teacher is refused.
        force: accept any content.

    Raises:
        UserError: if the network, the token or the right to write is missing, or the content is not replaceable.
    """
    check_name(repo)
    _check_online(repo)
    teacher = _public(teacher)
    if get_token() is None:
        raise UserError(
            f"{repo}: expected a Hub token with the right to write, got none; log in (hf auth login) or set HF_TOKEN"
        )
    api = HfApi()
    try:
        _check_owner(repo, api.whoami())
        target = _look(api, repo, branch)
        if target.there:
            api.auth_check(repo, write=True)
        if MANIFEST in target.files:
            target = replace(target, teacher=_teacher_there(repo, target))
        if not force:
            _check_ours(repo, teacher, target)
    except (*HUB_ERRORS, ValueError) as error:
        raise UserError(f"{repo}: {hub_reason(error)}") from error
    return target


def _public(teacher: str) -> str:
    """Return the public name of a teacher by its name alone."""
    return public_name(teacher) if is_local(teacher) else teacher


def _check_online(repo: str) -> None:
    if setting := offline():
        name = setting.partition("=")[0]
        raise UserError(
            f"{repo}: publishing needs the network, but {setting} is set; unset {name} and run the same command again"
        )


def _check_owner(repo: str, me: dict[str, object]) -> None:
    owner, name = repo.split("/")[0], str(me.get("name"))
    orgs = me.get("orgs")
    owners = [name, *(str(org["name"]) for org in orgs if isinstance(org, dict))] if isinstance(orgs, list) else [name]
    if owner not in owners:
        raise UserError(
            f"{repo}: expected a token of {owner}, got one of {', '.join(owners)}; use that token, or a repository of "
            "yours"
        )
    auth = me.get("auth")
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    if isinstance(token, dict) and token.get("role") == "read":
        raise UserError(f"{repo}: expected a token that may write, got one that may only read; {login_advice()}")


def _look(api: HfApi, repo: str, branch: str | None) -> Target:
    try:
        main = api.model_info(repo)
    except RepositoryNotFoundError:
        return Target(None, frozenset(), there=False, private=False)
    try:
        info = api.model_info(repo, revision=branch)
    except RevisionNotFoundError:
        # A new branch starts from main.
        info = main
    names = frozenset(sibling.rfilename for sibling in info.siblings or [])
    return Target(info.sha, names, there=True, private=bool(main.private))


def _check_ours(repo: str, teacher: str, target: Target) -> None:
    """Refuse a repository that is neither empty nor a student of the same teacher."""
    foreign = sorted(target.files - {".gitattributes"})
    if not foreign:
        return
    other = target.teacher
    if other is None:
        shown = ", ".join(foreign[:_SHOWN]) + (", ..." if len(foreign) > _SHOWN else "")
        raise UserError(
            f"{repo}: expected an empty repository or a student, got other files ({shown}); choose another name, or "
            "--force to overwrite it"
        )
    if other != teacher:
        raise UserError(
            f"{repo}: expected a student of {teacher}, got one of {other}; choose another name, or --force to "
            "overwrite it"
        )


def _teacher_there(repo: str, target: Target) -> str | None:
    """Return the teacher of the student in a repository; None: its manifest is another kind of file."""
    manifest = Path(hf_hub_download(repo, MANIFEST, revision=target.commit))
    try:
        about = read_mapping(manifest, {"teacher": str}, todo="")
    except BrokenFileError:
        return None
    # An earlier version uploaded the path of a local teacher.
    teacher: str = about["teacher"]
    return public_teacher(teacher, about["revision"]) if "revision" in about else _public(teacher)
