"""Upload of an exported student to the Hub: check the files, check the repository, upload in one commit."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from yaml import YAMLError

from fmm_distill.errors import UserError
from fmm_distill.export.card import card
from fmm_distill.export.contents import CONTENTS, Changes, changes, contents, shown
from fmm_distill.export.local_paths import without_known
from fmm_distill.export.manifest import MANIFEST, read_manifest
from fmm_distill.export.place import in_use, recover
from fmm_distill.export.public import known_paths, public_json, public_manifest, public_recipe
from fmm_distill.io.reading import read_mapping
from fmm_distill.run import marker
from fmm_distill.run.repository import check_name, check_target
from fmm_distill.teachers.hub.errors import HUB_ERRORS, hub_reason, is_unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fmm_distill.export.manifest import StudentManifest
    from fmm_distill.run.repository import Target

__all__ = ["Upload", "check_name", "check_target", "pack", "publish"]

logger = logging.getLogger(__name__)

# Files that name the teacher and the data, like the manifest, the recipe and the card.
_FACTS = ("evaluation.json", "verification.json")
# An export stays usable without these.
_OPTIONAL = ("README.md", "evaluation.json", "recipe.yaml", "samples.png", "steps.png", "lora/")


@dataclass(frozen=True)
class Upload:
    """The content of a student's repository on the Hub.

    Attributes:
        folder: the folder of the exported student.
        teacher: the public name of its teacher.
        files: each name in the repository and the local file to upload.
        texts: each name in the repository and the text to upload: the card and the files that it is made from.
        how_to_load: Python code that loads the student from the Hub.
        notes: lines on files that are left out or replaced.
        listed: the digests of the files that the export wrote.
    """

    folder: Path
    teacher: str
    files: dict[str, Path]
    texts: dict[str, str]
    how_to_load: str
    notes: tuple[str, ...]
    listed: dict[str, str]

    @property
    def card(self) -> str:
        """The model card."""
        return self.texts["README.md"]

    def describe(self) -> str:
        """Return each file with its size, the notes, and the card."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes |= {name: len(text.encode()) for name, text in self.texts.items()}
        lines = [f"{size:>13,} bytes  {name}" for name, size in sorted(sizes.items())]
        total = f"{sum(sizes.values()):>13,} bytes  in {len(sizes)} files"
        return "\n".join([*lines, total, *self.notes, "", self.card])


def pack(source: Path, repo: str, branch: str | None = None, steps: tuple[int, ...] | None = None) -> Upload:
    """Collect the files of an export and create the card for the repository; nothing is uploaded.

    Args:
        source: a run, or an exported folder.
        repo: the repository, as owner/name.
        branch: the branch; None: main.
        steps: the numbers of steps whose pipelines are uploaded; None: all.

    Raises:
        UserError: if there is no verified student, its files have changed since the export, or a number of steps was
            not exported.
    """
    check_name(repo)
    folder, notes = _student_of(source)
    manifest = read_manifest(folder)
    listed = _listed(folder)
    _check_verified(folder)
    there = tuple(n for n in manifest.steps if (folder / f"steps-{n}" / "model_index.json").is_file())
    chosen = there if steps is None else tuple(sorted(set(steps)))
    if missing := [n for n in chosen if n not in there]:
        raise UserError(
            f"--steps {missing[0]}: expected one of the exported numbers ({', '.join(map(str, there)) or 'none'}) of "
            f"{folder}; export others with fmm-distill export RUN FOLDER --steps ..."
        )
    left_out = tuple(f"steps-{n}/" for n in manifest.steps if n not in chosen)
    found = changes(folder, left_out)
    _check_whole(folder, found, left_out)
    known = known_paths(folder, manifest)
    texts = _texts(folder, replace(manifest, steps=chosen), known, listed.keys() - set(found.missing))
    made = texts["README.md"] = card(folder, repo, branch, chosen)
    if "README.md" in found.changed:
        texts["README.md"] = _own_card(folder / "README.md", known)
        notes += ("README.md was edited since the export; it is uploaded in place of the generated card",)
    files = {
        name: folder / name
        for name in listed
        if name not in texts and name not in found.missing and not name.startswith(left_out)
    }
    return Upload(
        folder,
        public_manifest(manifest, known).teacher,
        files,
        texts,
        _code_in(made),
        (*notes, *_on_changes(folder, found, there, steps, manifest.steps)),
        listed,
    )


def _student_of(source: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the exported folder of a run or of an export, and notes on it."""
    recover(source)
    if not source.is_dir():
        raise UserError(f"{source}: expected a run or an exported folder, got nothing there; check the path")
    if not marker.is_run(source):
        return source, ()
    folder = source / "student"
    recover(folder)
    if not folder.is_dir():
        raise UserError(
            f"{source}: expected a finished run, got one without a student; run its distillation command to the end"
        )
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder}: expected an export with {MANIFEST}, got one of an earlier version; run fmm-distill export "
            f"{source} FOLDER, then publish FOLDER"
        )
    if (source / "evaluation.json").is_file():
        return folder, ()
    step = read_manifest(folder).training["steps"]
    return folder, (f"{source} is not finished; publishing the student that was exported after step {step}",)


def _listed(folder: Path) -> dict[str, str]:
    if not (folder / CONTENTS).is_file():
        raise UserError(
            f"{folder}: expected an export with {CONTENTS}, got one without (of an earlier version); run fmm-distill "
            "export RUN FOLDER, then publish FOLDER"
        )
    return contents(folder)


def _check_whole(folder: Path, found: Changes, left_out: tuple[str, ...]) -> None:
    """Refuse an export that has changed since its verification; pictures, results, adapters and card may be missing."""
    changed = tuple(name for name in found.changed if name != "README.md" and not name.startswith(left_out))
    if changed:
        raise UserError(
            f"{folder}: expected the exported files, got changed or linked ones ({shown(changed)}); restore them, or "
            "export again into another folder"
        )
    readme = folder / "README.md"
    if readme.is_symlink() or (readme.exists() and not readme.is_file()):
        raise UserError(f"{readme}: expected a file, got a link or a folder; copy the card there, or remove it")
    missing = tuple(name for name in found.missing if not name.startswith((*_OPTIONAL, *left_out)))
    if missing:
        raise UserError(
            f"{folder}: expected all exported files, {shown(missing)} is missing; export again into another folder"
        )


def _on_changes(
    folder: Path, found: Changes, there: tuple[int, ...], steps: tuple[int, ...] | None, exported: tuple[int, ...]
) -> tuple[str, ...]:
    """Return notes on the files that are left out."""
    notes = []
    if found.added:
        notes.append(f"left out (not written by the export): {shown(found.added, most=50)}")
    gone = [f"steps-{n}/" for n in exported if n not in there] if steps is None else []
    gone += [name for name in found.missing if name.startswith(_OPTIONAL) and name != "README.md"]
    if gone:
        notes.append(f"left out (removed from {folder}): {', '.join(gone)}")
    return tuple(notes)


def _texts(folder: Path, manifest: StudentManifest, known: dict[str, str], there: set[str]) -> dict[str, str]:
    """Rewrite the files that name the teacher and the data, without local paths."""
    texts = {MANIFEST: public_manifest(manifest, known).to_json()}
    texts |= {name: public_json(folder / name, known) for name in _FACTS if name in there}
    if "recipe.yaml" in there:
        texts["recipe.yaml"] = public_recipe(folder, manifest, known)
    return texts


def _own_card(readme: Path, known: dict[str, str]) -> str:
    """Return the card that the user has edited, without local paths."""
    try:
        text = str(without_known(readme.read_text(encoding="utf-8"), known))
        ModelCard(text)
    except (OSError, ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{readme}: expected a model card, got another text ({reason}); fix it, or remove it to upload the "
            "generated card"
        ) from error
    return text


def _code_in(text: str) -> str:
    """Return the Python code of a card."""
    blocks = text.split("```python\n")[1:]
    return "\n\n".join(block.split("\n```")[0] for block in blocks)


def _check_verified(folder: Path) -> None:
    report = folder / "verification.json"
    if not report.is_file():
        raise UserError(
            f"{folder}: expected a verified export, got one without verification.json; export the student again"
        )
    todo = "export the student again (fmm-distill export RUN FOLDER)"
    if not read_mapping(report, {"passed": bool}, todo=todo)["passed"]:
        raise UserError(
            f"{folder}: expected pipelines that agree with the student, got a failed verification ({report}); export "
            "the student again"
        )


def _operations(upload: Upload, repo: str, target: Target) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return the operations of the commit: add the files of this student, delete those of the previous one."""
    # The Hub writes .gitattributes itself.
    stale = target.files - {*upload.files, *upload.texts} - {".gitattributes"}
    if target.teacher is None and stale:
        logger.warning(f"{repo}: {len(stale)} files that don't belong to this student stay in the repository")
        stale = frozenset()
    return [
        *(CommitOperationAdd(name, text.encode()) for name, text in upload.texts.items()),
        *(CommitOperationAdd(name, str(path)) for name, path in upload.files.items()),
        *(CommitOperationDelete(name) for name in sorted(stale)),
    ]


def publish(
    upload: Upload,
    repo: str,
    branch: str | None = None,
    *,
    private: bool = False,
    force: bool = False,
) -> str:
    """Upload a student in one commit, and return its address.

    Files of an earlier student that this one lacks are deleted. After an error the repository is as it was, or new and
    empty; files that arrived are not uploaded again.

    Args:
        private: create a new repository as a private one.
        force: overwrite a repository with other content, whose other files stay.

    Raises:
        UserError: with the reason and advice.
    """
    for note in upload.notes:
        logger.warning(note)
    with _unchanged(upload):
        return _send(upload, repo, branch, private=private, force=force)


@contextmanager
def _unchanged(upload: Upload) -> Iterator[None]:
    """Keep an export from replacing the files while they are uploaded.

    Raises:
        UserError: if an export is running, or ran since the files were collected.
    """
    if not os.access(upload.folder.resolve().parent, os.W_OK):
        logger.warning(f"{upload.folder}: the folder above it is not writable, so it is published without a lock")
        yield
        return
    with in_use(upload.folder, "a publication"):
        if contents(upload.folder) != upload.listed:
            raise UserError(f"{upload.folder} was exported again in the meantime; run the same command again")
        yield


def _send(upload: Upload, repo: str, branch: str | None, *, private: bool, force: bool) -> str:
    target = check_target(repo, upload.teacher, branch, force=force)
    if target.there and target.private != private and private:
        logger.warning(f"--private is ignored: {repo} exists and is public; change that in its settings on the Hub")
    names = {*upload.files, *upload.texts}
    operations = _operations(upload, repo, target)
    api = HfApi()
    try:
        # Before the repository is created: the Hub refuses the card of a commit otherwise.
        ModelCard(upload.card).validate()
        if not target.there:
            api.create_repo(repo, private=private)
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        made = api.create_commit(
            repo,
            operations,
            commit_message="A few-step student",
            commit_description=f"Of {upload.teacher}, by fmm_distill.",
            revision=branch,
            # The Hub refuses the commit if the branch has changed since it was checked.
            parent_commit=target.commit,
        )
    except (*HUB_ERRORS, ValueError, RuntimeError) as error:
        ends = "nothing was published"
        if is_unreachable(error):
            ends = "if only the last answer was lost, it is published; run the same command again to check"
        raise UserError(f"{repo}: {hub_reason(error)}; {ends}") from error
    address = f"{api.endpoint}/{repo}" + ("" if branch is None else f"/tree/{branch}")
    if made.oid == target.commit:
        logger.info(f"nothing to upload: {address} has the same {len(names)} files")
    else:
        logger.info(f"published {len(names)} files to {address}")
    return address
