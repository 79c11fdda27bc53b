"""The files of an earlier student that a run starts from: of a run's newest checkpoint, or of an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fmm_distill.errors import UserError
from fmm_distill.export.load import ADAPTERS, components_of
from fmm_distill.export.manifest import MANIFEST
from fmm_distill.io.reading import check_keys, read_mapping
from fmm_distill.run.marker import is_run
from fmm_distill.training import checkpoint

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["RECIPE", "StudentFiles", "files_of"]

RECIPE = "recipe.yaml"
_TODO = "restore it, or choose another student.init"


@dataclass(frozen=True)
class StudentFiles:
    """The files of an earlier student.

    Attributes:
        folder: of the run, or of the export.
        components: the names of the networks' folders in an export, mostly one; empty: it is a run.
        weights: the weights of the networks; of a run those that were trained.
        adapters: the files of an export's adapters, by their stems.
        described: the position in the run, in words; empty: it is an export.
    """

    folder: Path
    components: tuple[str, ...]
    weights: tuple[Path, ...]
    adapters: dict[str, Path]
    described: str = ""

    @property
    def read(self) -> dict[str, Path]:
        """The files that decide about the weights, by their paths within the folder."""
        paths = [*self.weights, *self.adapters.values()]
        return {path.relative_to(self.folder).as_posix(): path for path in paths}


def files_of(folder: Path, source: str) -> StudentFiles:
    """Return the files of the student in a run folder or an exported folder.

    Args:
        source: the name of the student, for messages.

    Raises:
        UserError: if there is none.
    """
    if is_run(folder):
        newest = checkpoint.newest_state(folder / "checkpoints")
        if newest is not None:
            return _files_of_run(folder, newest)
        if not (folder / "student" / MANIFEST).is_file():
            raise UserError(
                f"student.init {source}: expected a run with a checkpoint, got one without; run its distillation "
                "command first"
            )
        folder = folder / "student"
    if not (folder / MANIFEST).is_file():
        found = f"a folder without {MANIFEST}" if folder.is_dir() else "nothing there"
        raise UserError(
            f"student.init {source}: expected a run folder, an exported folder or a Hub id, got {found}; check the path"
        )
    components = components_of(folder)
    weights = tuple(path for name in components for path in sorted((folder / name).glob("*.safetensors")))
    if missing := [name for name in components if not any(path.parent.name == name for path in weights)]:
        raise UserError(f"student.init {source}: expected weights in {missing[0]}/, got none; export the student again")
    paths = {stem: folder / "lora" / f"{stem}.safetensors" for stem in ADAPTERS}
    return StudentFiles(folder, components, weights, {stem: path for stem, path in paths.items() if path.is_file()})


def _files_of_run(folder: Path, newest: checkpoint.State) -> StudentFiles:
    """Return the file of a run's average: the one that its evaluation chose or, without an evaluation, the first."""
    measured = folder / "evaluation.json"
    if measured.is_file():
        rate: Any = read_mapping(measured, {"protocol": dict}, todo=_TODO)["protocol"].get("ema")
    else:
        training = read_mapping(folder / RECIPE, {"training": dict}, todo=_TODO)["training"]
        check_keys(f"{folder / RECIPE}: training", training, {"ema": list}, todo=_TODO)
        rate = training["ema"][0]
    path = newest.path / f"{checkpoint.average_name(rate)}.safetensors"
    described = f"average {rate:g} at step {newest.step:,}"
    return StudentFiles(folder, (), (path,), {}, described)
