"""A repository of the Hub before a student is sent there: its name, the right to write, and its present content."""

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
    """Refuse what is no name of a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo}: no name for a repository ({first_line(error)}); wanted owner/name") from error
    if repo.count("/") != 1:
        raise UserError(f"{repo}: no name for a repository; wanted owner/name, such as your user name/{repo}")


@dataclass(frozen=True)
class Target:
    """The repository as it is: its newest commit on the branch, the files there, the teacher if it holds a student."""

    commit: str | None
    files: frozenset[str]
    there: bool
    private: bool
    teacher: str | None = None


def check_target(repo: str, teacher: str, branch: str | None = None, *, force: bool = False) -> Target:
    """Whether this token may write there, and whether what is there may be replaced. Nothing is written.

    Args:
        teacher: a student of another one is something else.

    Raises:
        UserError: with what is missing.
    """
    check_name(repo)
    _check_online(repo)
    teacher = _public(teacher)
    if get_token() is None:
        raise UserError(
            f"{repo}: no token for the Hub; log in (hf auth login) or set HF_TOKEN, with the right to write"
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
    """The public name of a teacher of which only the name is known."""
    return public_name(teacher) if is_local(teacher) else teacher


def _check_online(repo: str) -> None:
    if setting := offline():
        name = setting.partition("=")[0]
        raise UserError(
            f"{repo}: publishing needs the network, and {setting} forbids it; unset {name} and run the same command "
            "again"
        )


def _check_owner(repo: str, me: dict[str, object]) -> None:
    owner, name = repo.split("/")[0], str(me.get("name"))
    orgs = me.get("orgs")
    owners = [name, *(str(org["name"]) for org in orgs if isinstance(org, dict))] if isinstance(orgs, list) else [name]
    if owner not in owners:
        raise UserError(f"{repo}: your token is of {', '.join(owners)}; wanted one of {owner}, or a name of yours")
    auth = me.get("auth")
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    if isinstance(token, dict) and token.get("role") == "read":
        raise UserError(f"{repo}: your token may only read, and publishing writes; {login_advice()}")


def _look(api: HfApi, repo: str, branch: str | None) -> Target:
    try:
        main = api.model_info(repo)
    except RepositoryNotFoundError:
        return Target(None, frozenset(), there=False, private=False)
    try:
        info = api.model_info(repo, revision=branch)
    except RevisionNotFoundError:
        # A branch begins as main is.
        info = main
    names = frozenset(sibling.rfilename for sibling in info.siblings or [])
    return Target(info.sha, names, there=True, private=bool(main.private))


def _check_ours(repo: str, teacher: str, target: Target) -> None:
    """A repository may be replaced that is empty or holds a student of the same teacher."""
    foreign = sorted(target.files - {".gitattributes"})
    if not foreign:
        return
    other = target.teacher
    if other is None:
        shown = ", ".join(foreign[:_SHOWN]) + (", ..." if len(foreign) > _SHOWN else "")
        raise UserError(f"{repo} holds something else ({shown}); take another name, or --force to write over it")
    if other != teacher:
        raise UserError(
            f"{repo} holds a student of another teacher ({other}; this one's is {teacher}); take another name, or "
            "--force to write over it"
        )


def _teacher_there(repo: str, target: Target) -> str | None:
    """Of the student that is there; None: a file of the same name is something else."""
    kept = Path(hf_hub_download(repo, MANIFEST, revision=target.commit))
    try:
        about = read_mapping(kept, {"teacher": str}, todo="")
    except BrokenFileError:
        return None
    # An earlier version sent the path of a local teacher.
    teacher: str = about["teacher"]
    return public_teacher(teacher, about["revision"]) if "revision" in about else _public(teacher)
