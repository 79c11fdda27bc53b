"""An exported student to the Hub: looked at here, asked for there, then sent in one commit."""

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

# Made of the teacher's and the data's names, besides the facts, the recipe and the card.
_FACTS = ("evaluation.json", "verification.json")
# An export without these is a student all the same.
_OPTIONAL = ("README.md", "evaluation.json", "recipe.yaml", "samples.png", "steps.png", "lora/")


@dataclass(frozen=True)
class Upload:
    """The files and texts that are sent to a repository of the Hub.

    Attributes:
        folder: the exported student.
        teacher: the public name of its teacher.
        files: name in the repository to the file here.
        texts: name in the repository to what is written for it: the card and the facts it is made of.
        notes: lines on what is left out or sent otherwise than one might expect.
        listed: the digests of what the export wrote.
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
        """The model card for that repository."""
        return self.texts["README.md"]

    def describe(self) -> str:
        """Every file with its size, the notes, and the card."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        sizes |= {name: len(text.encode()) for name, text in self.texts.items()}
        lines = [f"{size:>13,} bytes  {name}" for name, size in sorted(sizes.items())]
        total = f"{sum(sizes.values()):>13,} bytes  in {len(sizes)} files"
        return "\n".join([*lines, total, *self.notes, "", self.card])


def pack(source: Path, repo: str, branch: str | None = None, steps: tuple[int, ...] | None = None) -> Upload:
    """Collect what an export wrote, and make the card for the repository; nothing is sent.

    Args:
        source: a run, or an exported folder.
        steps: the folded pipelines that are sent; None: all.

    Raises:
        UserError: if there is no student that was opened and compared and is as it was exported, or the steps were not
            exported.
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
            f"--steps {missing[0]}: {folder} has {', '.join(map(str, there)) or 'none'}; export the others first "
            "(fmm-distill export RUN FOLDER --steps ...)"
        )
    left_out = tuple(f"steps-{n}/" for n in manifest.steps if n not in chosen)
    found = changes(folder, left_out)
    _check_whole(folder, found, left_out)
    known = known_paths(folder, manifest)
    texts = _texts(folder, replace(manifest, steps=chosen), known, listed.keys() - set(found.missing))
    made = texts["README.md"] = card(folder, repo, branch, chosen)
    if "README.md" in found.changed:
        texts["README.md"] = _own_card(folder / "README.md", known)
        notes += ("README.md was edited since the export: it is sent in place of the generated card",)
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
    """The exported folder of a run or of an export, and what has to be said of it."""
    recover(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; expected a run, or a folder that fmm-distill export wrote")
    if not marker.is_run(source):
        return source, ()
    folder = source / "student"
    recover(folder)
    if not folder.is_dir():
        raise UserError(f"{source} has no student yet; run the same distillation command to its end")
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} was exported by an earlier version; run fmm-distill export {source} FOLDER, then publish FOLDER"
        )
    if (source / "evaluation.json").is_file():
        return folder, ()
    step = read_manifest(folder).training["steps"]
    return folder, (f"{source} is not finished: its student is the one exported after step {step}",)


def _listed(folder: Path) -> dict[str, str]:
    if not (folder / CONTENTS).is_file():
        raise UserError(
            f"{folder} has no list of what the export wrote ({CONTENTS}), as earlier versions have none; run "
            "fmm-distill export RUN FOLDER, then publish FOLDER"
        )
    return contents(folder)


def _check_whole(folder: Path, found: Changes, left_out: tuple[str, ...]) -> None:
    """Refuse an export that is not as it was verified; pictures, numbers, adapters and the card may be missing."""
    changed = tuple(name for name in found.changed if name != "README.md" and not name.startswith(left_out))
    if changed:
        raise UserError(
            f"{folder}: {shown(changed)} changed since the export, or behind a link; put the exported files back, or "
            "export again into another folder"
        )
    readme = folder / "README.md"
    if readme.is_symlink() or (readme.exists() and not readme.is_file()):
        raise UserError(f"{readme} is not a file of this folder; copy it to its place, or remove it")
    missing = tuple(name for name in found.missing if not name.startswith((*_OPTIONAL, *left_out)))
    if missing:
        raise UserError(f"{folder}: {shown(missing)} is missing; export again into another folder")


def _on_changes(
    folder: Path, found: Changes, there: tuple[int, ...], steps: tuple[int, ...] | None, exported: tuple[int, ...]
) -> tuple[str, ...]:
    """The lines on what is left out of a folder."""
    notes = []
    if found.added:
        notes.append(f"left out, as the export did not write it: {shown(found.added, most=50)}")
    gone = [f"steps-{n}/" for n in exported if n not in there] if steps is None else []
    gone += [name for name in found.missing if name.startswith(_OPTIONAL) and name != "README.md"]
    if gone:
        notes.append(f"left out, as it is not in {folder} any more: {', '.join(gone)}")
    return tuple(notes)


def _texts(folder: Path, manifest: StudentManifest, known: dict[str, str], there: set[str]) -> dict[str, str]:
    """What is written anew for the repository: everything that names the teacher and the data, without paths."""
    texts = {MANIFEST: public_manifest(manifest, known).to_json()}
    texts |= {name: public_json(folder / name, known) for name in _FACTS if name in there}
    if "recipe.yaml" in there:
        texts["recipe.yaml"] = public_recipe(folder, manifest, known)
    return texts


def _own_card(readme: Path, known: dict[str, str]) -> str:
    """The card that a user has edited."""
    try:
        text = str(without_known(readme.read_text(encoding="utf-8"), known))
        ModelCard(text)
    except (OSError, ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{readme}: no model card ({reason}); repair it, or remove it to send the generated one"
        ) from error
    return text


def _code_in(text: str) -> str:
    """The blocks of Python in a card."""
    blocks = text.split("```python\n")[1:]
    return "\n\n".join(block.split("\n```")[0] for block in blocks)


def _check_verified(folder: Path) -> None:
    report = folder / "verification.json"
    if not report.is_file():
        raise UserError(f"{folder} was not opened and compared (no verification.json); export the student again")
    todo = "export the student again (fmm-distill export RUN FOLDER)"
    if not read_mapping(report, {"passed": bool}, todo=todo)["passed"]:
        raise UserError(f"{folder}: its pipelines differ from the student ({report}); it is not published")


def _operations(upload: Upload, repo: str, target: Target) -> list[CommitOperationAdd | CommitOperationDelete]:
    """The one commit: the files of this student, without those of the one that is there."""
    stale = target.files - {*upload.files, *upload.texts} - {".gitattributes"}
    if target.teacher is None and stale:
        logger.warning(f"{repo}: {len(stale)} files that are not of this student stay there")
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
    """Send it in one commit, and give the address. What came there before stays there if the rest does not come.

    Files of an earlier student that this one has not are removed; with ``force`` files of something else stay.

    Raises:
        UserError: with what went wrong and what to do; the repository is then as it was before, or empty.
    """
    for note in upload.notes:
        logger.warning(note)
    with _unchanged(upload):
        return _send(upload, repo, branch, private=private, force=force)


@contextmanager
def _unchanged(upload: Upload) -> Iterator[None]:
    """Keep an export into the folder from replacing its files while they are sent.

    Raises:
        UserError: if one is running, or ran since the files were collected.
    """
    if not os.access(upload.folder.resolve().parent, os.W_OK):
        logger.warning(f"{upload.folder} is in a folder that can't be written to: it is published without a lock")
        yield
        return
    with in_use(upload.folder, "a publication"):
        if contents(upload.folder) != upload.listed:
            raise UserError(f"{upload.folder} was exported again in the meantime; run the same command again")
        yield


def _send(upload: Upload, repo: str, branch: str | None, *, private: bool, force: bool) -> str:
    target = check_target(repo, upload.teacher, branch, force=force)
    if target.there and target.private != private and private:
        logger.warning(
            f"{repo} is there already and public: --private makes new ones private; change it in its settings"
        )
    names = {*upload.files, *upload.texts}
    operations = _operations(upload, repo, target)
    api = HfApi()
    try:
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
            parent_commit=target.commit,
        )
    except (*HUB_ERRORS, ValueError, RuntimeError) as error:
        ends = "nothing of it was published"
        if is_unreachable(error):
            ends = "if it was the last answer that was lost, it is published: run the same command again to see"
        raise UserError(f"{repo}: {hub_reason(error)}; {ends}") from error
    address = f"{api.endpoint}/{repo}" + ("" if branch is None else f"/tree/{branch}")
    if made.oid == target.commit:
        logger.info(f"nothing new: {address} holds all {len(names)} files as they are here")
    else:
        logger.info(f"published {len(names)} files at {address}")
    return address
