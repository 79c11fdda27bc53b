"""An exported student to the Hub: looked at here, asked for there, then sent in one commit."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # in its documentation, not in __all__

from fmm_distill import marker
from fmm_distill.errors import UserError
from fmm_distill.export.about import ABOUT, read_about
from fmm_distill.export.card import card
from fmm_distill.export.verify import TOLERANCE
from fmm_distill.hub import HUB_FAULTS, hub_reason, no_answer

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Parcel", "check_name", "check_target", "pack", "publish"]

_SHOWN = 4


@dataclass(frozen=True)
class Parcel:
    """What goes to the Hub.

    Attributes:
        folder: the exported student.
        teacher: the id or folder of its teacher.
        files: name in the repository to the file here.
        texts: name in the repository to what is written for it: the card and the facts it is made of.
    """

    folder: Path
    teacher: str
    files: dict[str, Path]
    texts: dict[str, str]

    @property
    def card(self) -> str:
        """The model card for that repository."""
        return self.texts["README.md"]

    @property
    def how_to_load(self) -> str:
        """The lines of code in the card."""
        blocks = self.card.split("```python\n")[1:]
        return "\n\n".join(block.split("\n```")[0] for block in blocks)

    def describe(self) -> str:
        """Every file with its size, and the card."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes |= {name: len(text.encode()) for name, text in self.texts.items()}
        lines = [f"{size:>13,} bytes  {name}" for name, size in sorted(sizes.items())]
        total = f"{sum(sizes.values()):>13,} bytes  in {len(sizes)} files"
        return "\n".join([*lines, total, "", self.card])


def pack(source: Path, repo: str, branch: str | None = None, steps: tuple[int, ...] | None = None) -> Parcel:
    """Look at a run or an exported folder, and make the card for the repository; nothing is sent.

    Args:
        steps: which folded pipelines go along; None: all.

    Raises:
        UserError: if there is no student there that was opened and compared, or the steps were not exported.
    """
    check_name(repo)
    is_run = marker.is_run(source)
    folder = source / "student" if is_run else source
    if folder != source and not folder.is_dir():
        raise UserError(f"{source} has no student yet; run the same distillation command to its end")
    if is_run and not (folder / ABOUT).is_file():
        raise UserError(
            f"{folder} was exported by an earlier version; run fmm-distill export {source} FOLDER, then publish FOLDER"
        )
    about = read_about(folder)
    _check_verified(folder)
    there = tuple(n for n in about.steps if (folder / f"steps-{n}" / "model_index.json").is_file())
    chosen = there if steps is None else tuple(sorted(set(steps)))
    if missing := [n for n in chosen if n not in there]:
        raise UserError(
            f"--steps {missing[0]}: {folder} has {', '.join(map(str, there)) or 'none'}; export the others first "
            "(fmm-distill export RUN FOLDER --steps ...)"
        )
    left_out = [f"steps-{n}/" for n in about.steps if n not in chosen]
    texts = {"README.md": card(folder, repo, branch, chosen), ABOUT: replace(about, steps=chosen).to_json()}
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {
        name: path
        for name, path in names.items()
        if name not in texts and not name.startswith(tuple(left_out)) and not _is_debris(name)
    }
    return Parcel(folder, about.teacher, files, texts)


def _is_debris(name: str) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))


def check_name(repo: str) -> None:
    """Refuse what is no name of a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"{repo}: no name for a repository ({str(error).splitlines()[0]}); wanted owner/name"
        ) from error
    if repo.count("/") != 1:
        raise UserError(f"{repo}: no name for a repository; wanted owner/name, such as your user name/{repo}")


def _check_verified(folder: Path) -> None:
    report = folder / "verification.json"
    if not report.is_file():
        raise UserError(f"{folder} was not opened and compared (no verification.json); export the student again")
    try:
        differences = json.loads(report.read_text(encoding="utf-8"))["largest_pixel_difference"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report} can't be read ({error}); export the student again") from error
    if not differences or not all(value <= TOLERANCE for value in differences.values()):
        raise UserError(f"{folder}: its pipelines differ from the student ({differences}), above {TOLERANCE}")


@dataclass(frozen=True)
class _Target:
    """The repository as it is: its newest commit on the branch, the files there, the teacher if it holds a student."""

    commit: str | None
    files: frozenset[str]
    there: bool
    private: bool
    teacher: str | None = None


def check_target(repo: str, teacher: str, branch: str | None = None, *, force: bool = False) -> _Target:
    """Whether this token may write there, and whether what is there may be replaced. Nothing is written.

    Args:
        teacher: a student of another one is something else.

    Raises:
        UserError: with what is missing.
    """
    check_name(repo)
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
        if ABOUT in target.files:
            target = replace(target, teacher=_teacher_there(repo, target))
        if not force:
            _check_ours(repo, teacher, target)
    except (*HUB_FAULTS, ValueError) as error:
        raise UserError(f"{repo}: {hub_reason(error)}") from error
    return target


def _check_owner(repo: str, me: dict[str, object]) -> None:
    owner, name = repo.split("/")[0], str(me.get("name"))
    orgs = me.get("orgs")
    owners = [name, *(str(org["name"]) for org in orgs if isinstance(org, dict))] if isinstance(orgs, list) else [name]
    if owner not in owners:
        raise UserError(f"{repo}: your token is of {', '.join(owners)}; wanted one of {owner}, or a name of yours")
    auth = me.get("auth")
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    if isinstance(token, dict) and token.get("role") == "read":
        raise UserError(f"{repo}: your token may only read; take one with the right to write (hf auth login)")


def _look(api: HfApi, repo: str, branch: str | None) -> _Target:
    try:
        main = api.model_info(repo)
    except RepositoryNotFoundError:
        return _Target(None, frozenset(), there=False, private=False)
    try:
        info = api.model_info(repo, revision=branch)
    except RevisionNotFoundError:
        # A branch begins as main is.
        info = main
    names = frozenset(sibling.rfilename for sibling in info.siblings or [])
    return _Target(info.sha, names, there=True, private=bool(main.private))


def _check_ours(repo: str, teacher: str, target: _Target) -> None:
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


def _teacher_there(repo: str, target: _Target) -> str | None:
    """Of the student that is there; None: a file of the same name is something else."""
    kept = Path(hf_hub_download(repo, ABOUT, revision=target.commit))
    try:
        about = json.loads(kept.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return str(about["teacher"]) if isinstance(about, dict) and "teacher" in about else None


def publish(
    parcel: Parcel,
    repo: str,
    branch: str | None = None,
    *,
    private: bool = False,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """Send it in one commit, and give the address. What came there before stays there if the rest does not come.

    Files of an earlier student that this one has not are removed; with ``force`` files of something else stay.

    Raises:
        UserError: with what went wrong and what to do; the repository is then as it was before, or empty.
    """
    target = check_target(repo, parcel.teacher, branch, force=force)
    if target.there and target.private != private and private:
        say(f"{repo} is there already and public: --private makes new ones private; change it in its settings")
    names = {*parcel.files, *parcel.texts}
    stale = target.files - names - {".gitattributes"}
    if target.teacher is None and stale:
        say(f"{repo}: {len(stale)} files that are not of this student stay there")
        stale = frozenset()
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, text.encode()) for name, text in parcel.texts.items()),
        *(CommitOperationAdd(name, str(path)) for name, path in parcel.files.items()),
        *(CommitOperationDelete(name) for name in sorted(stale)),
    ]
    api = HfApi()
    try:
        ModelCard(parcel.card).validate()
        if not target.there:
            api.create_repo(repo, private=private)
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        made = api.create_commit(
            repo,
            operations,
            commit_message="A few-step student",
            commit_description=f"Of {parcel.teacher}, by fmm_distill.",
            revision=branch,
            parent_commit=target.commit,
        )
    except (*HUB_FAULTS, ValueError, RuntimeError) as error:
        ends = "nothing of it was published"
        if no_answer(error):
            ends = "if it was the last answer that was lost, it is published: run the same command again to see"
        raise UserError(f"{repo}: {hub_reason(error)}; {ends}") from error
    address = f"{api.endpoint}/{repo}" + ("" if branch is None else f"/tree/{branch}")
    if made.oid == target.commit:
        say(f"nothing new: {address} holds all {len(names)} files as they are here")
    else:
        say(f"published {len(names)} files at {address}")
    return address
