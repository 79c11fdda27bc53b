"""Sources of data: the kind of a path or a name, and its rows as ``datasets`` returns them."""

from __future__ import annotations

import contextlib
import difflib
import glob
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from fmm_distill.data import records, splits
from fmm_distill.errors import UserError, first_line
from fmm_distill.teachers.hub.errors import HUB_ERRORS, hub_reason, is_unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fmm_distill.data.image_files import Listing

__all__ = [
    "Source",
    "datasets_library",
    "from_hub",
    "from_parquet",
    "from_saved",
    "is_saved",
    "load_parquet",
    "refuse_file",
]

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_ARRAYS = (".npz", ".npy", ".pt", ".pth", ".pkl", ".pickle", ".h5", ".hdf5", ".mat", ".safetensors")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# Endings that a name on the Hub has not, so that a path with a typo is not looked for there.
_FILES = (*_ARCHIVES, *_ARRAYS, *records.KINDS, *_IMAGES, ".parquet", ".arrow", ".txt")


@dataclass(frozen=True)
class Source:
    """A source of a recipe.

    Attributes:
        what: the option or setting and its value, for messages.
        expected: what can be given there.
        words: values of the setting that are no source.
    """

    what: str
    name: str
    expected: str
    words: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Return the source as a path."""
        return Path(self.name).expanduser()

    def refuse(self, problem: str, error: Exception | None = None) -> UserError:
        """Return the error of this source with the problem."""
        return UserError(f"{self.what}: {problem}" + ("" if error is None else f" ({first_line(error)})"))


def datasets_library(what: str) -> Any:  # noqa: ANN401 a module
    """Return the module ``datasets``; its absence is an error with the package to install."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{what}: reading it needs `pip install fmm-distill[data]`") from error
    # The progress bar of the run is the only one on stderr.
    datasets.disable_progress_bars()
    return datasets


@contextlib.contextmanager
def _silent(datasets: Any) -> Iterator[None]:  # noqa: ANN401 a module
    """Silence the library's own log lines: a failure is one line of ours."""
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def from_parquet(listing: Listing, source: Source, split: str) -> tuple[Any, list[str]]:
    """The rows of the parquet files of a split, and lines on what was left out.

    Either every file's name, or that of a folder around it, states a split, or all files are used.

    Raises:
        UserError: if there is no such split, or the files are of several datasets.
    """
    files, base = listing.parquet, splits.base_of(split)
    of = {file: splits.of_file(file.stem) or _split_above(file) for file in files}
    notes: list[str] = []
    named = {file: name for file, name in of.items() if name is not None}
    if not named and base != "train":
        raise source.refuse(
            f"no split {split}: no parquet file's name states a split; expected such as {split}-0.parquet, or train "
            "to use all"
        )
    if named and len(named) < len(files):
        plain = next(file for file in files if file not in named)
        split_file = next(iter(named))
        raise source.refuse(
            f"{split_file} states a split and {plain} does not; expected all names to, or none: give one file or "
            "rename them"
        )
    if named:
        _refuse_several(files, source)
        if base not in named.values():
            there = ", ".join(sorted(set(named.values())))
            raise source.refuse(f"no split {split}: its parquet files are of {there}; expected one of these")
        chosen = [file for file in files if named[file] == base]
        if len(chosen) < len(files):
            others = ", ".join(sorted({name for name in named.values() if name != base}))
            notes.append(
                f"data: {source.name}: {len(chosen)} of {len(files)} parquet files are used; the rest are of other "
                f"splits ({others})"
            )
        files = chosen
    return load_parquet([listing.root / file for file in files], source), notes


def _split_above(file: Path) -> str | None:
    return next((name for name in map(splits.of_folder, reversed(file.parent.parts)) if name is not None), None)


def _refuse_several(files: list[Path], source: Source) -> None:
    """Refuse the configurations of a Hub dataset in one folder: their rows don't belong together."""
    groups = {tuple(part for part in file.parent.parts if splits.of_folder(part) is None) for file in files}
    if len(groups) > 1:
        shown = ", ".join(sorted("/".join(group) or "." for group in groups))
        raise source.refuse(
            f"its parquet files are of several datasets ({shown}); expected one: give one of the folders"
        )


def load_parquet(files: list[Path], source: Source) -> Any:  # noqa: ANN401 a datasets class
    """The rows of parquet files.

    Raises:
        UserError: if one of them is none, or they have different columns.
    """
    datasets = datasets_library(source.what)
    for file in files:
        try:
            with file.open("rb") as opened:
                begins = opened.read(4)
        except OSError as error:
            raise source.refuse(f"{file} can't be read", error) from error
        if begins != b"PAR1":
            raise source.refuse(
                f"{file.name} is no parquet file (it does not begin with PAR1); expected {source.expected}"
            )
    import pyarrow.parquet

    try:
        if not sum(pyarrow.parquet.read_metadata(file).num_rows for file in files):
            raise source.refuse("no rows in its parquet; expected at least one")
    except (OSError, pyarrow.ArrowException) as error:
        raise source.refuse("its parquet can't be read; expected complete files", error) from error
    # A name with a star or a bracket is a pattern for the library.
    patterns = [glob.escape(str(file.resolve())) for file in files]
    try:
        with _silent(datasets):
            return datasets.load_dataset("parquet", data_files=patterns, split="train")
    except Exception as error:
        raise source.refuse(
            f"its parquet can't be read ({_cause(error)}); expected files with the same columns"
        ) from error


def _cause(error: BaseException) -> str:
    """The first line of what an error was raised from."""
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__ or error
    return str(error).strip().split("\n")[0] or type(error).__name__


def is_saved(path: Path) -> bool:
    """Return whether a folder was written by ``save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def from_saved(source: Source, split: str) -> Any:  # noqa: ANN401 a datasets class
    """The rows of a folder of ``save_to_disk``, or of one of its files (``*.arrow``).

    Raises:
        UserError: if it can't be read or has no such split.
    """
    datasets, path = datasets_library(source.what), source.path
    try:
        with _silent(datasets):
            rows = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_file(str(path))
    except Exception as error:
        raise source.refuse(f"it can't be read ({_cause(error)}); expected what save_to_disk wrote") from error
    base = splits.base_of(split)
    if isinstance(rows, datasets.DatasetDict):
        found = next((rows[name] for name in rows if splits.base_of(name) == base), None)
        if found is None:
            raise source.refuse(f"no split {split}: it has {', '.join(rows)}; expected one of these")
        return found
    saved = None if rows.split is None else splits.base_of(str(rows.split))
    if base not in ("train", saved):
        raise source.refuse(f"no split {split}: it was saved without splits; expected train, for all of it")
    return rows


def refuse_file(source: Source) -> UserError:
    """The error on a file of a kind that is not read."""
    kind = source.path.suffix.lower()
    if kind in _ARCHIVES:
        problem = f"it is an archive ({kind}); unpack it and give the folder"
    elif kind in _ARRAYS:
        problem = f"it is a file of arrays ({kind}); save the images as PNG files in a folder"
    elif kind in _IMAGES:
        problem = "it is one image; give its folder"
    else:
        problem = f"it is a file of another kind ({kind or 'without an extension'}); expected {source.expected}"
    return source.refuse(problem)


def from_hub(source: Source, config: str | None, split: str) -> Any:  # noqa: ANN401 a datasets class
    """The rows of a dataset on the Hub; of the cache, where the Hub does not answer.

    Raises:
        UserError: if there is none, or no such configuration or split.
    """
    _refuse_typos(source)
    datasets = datasets_library(source.what)
    # The library would read every file of the current folder in this format.
    if source.name in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", {}):
        raise source.refuse(f"it is the name of a format, not of a dataset; expected {source.expected}")
    offline: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    try:
        # The library would ask six times, and wait in between.
        HfApi().dataset_info(source.name, timeout=10)
    except HFValidationError as error:
        raise source.refuse(f"no such file or folder, and no name on the Hub; expected {source.expected}") from error
    except HUB_ERRORS as error:
        if not is_unreachable(error):
            raise source.refuse(
                f"no such file or folder, and on the Hub: {hub_reason(error)}; expected {source.expected}"
            ) from error
        reason, offline = hub_reason(error), _offline(datasets)
    else:
        reason = ""
    try:
        with _silent(datasets), offline:
            return datasets.load_dataset(source.name, config, split=split)
    except Exception as error:
        if reason:
            raise source.refuse(
                f"no such file or folder, and on the Hub: {reason}; expected {source.expected}"
            ) from error
        raise source.refuse(
            f"the Hub's dataset can't be read ({_of_library(error, source)}); expected {source.expected}"
        ) from error


def _of_library(error: Exception, source: Source) -> str:
    line = first_line(error)
    if "Config name is missing" in str(error):
        names = str(error).partition("[")[2].partition("]")[0].replace("'", "")
        # Of the two sources only --data has a setting for it.
        return f"it has the configurations {names}" + (": set data.config to one of them" if source.words else "")
    return line


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:  # noqa: ANN401 a module
    """Let the library use its cache, without a call to the Hub."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _refuse_typos(source: Source) -> None:
    """Check that a name can be one on the Hub, before the Hub is called."""
    name = source.name
    if name.lower() in ("", "no", "off", "false", "null", "nil", "~") and "none" in source.words:
        raise source.refuse(f"no such file or folder; for no data give none; expected {source.expected}")
    near = difflib.get_close_matches(name.lower(), source.words, 1, 0.7)
    if near and "/" not in name:
        raise source.refuse(f"no such file or folder, did you mean {near[0]}?; expected {source.expected}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or source.path.suffix.lower() in _FILES:
        there = _neighbor(source.path)
        raise source.refuse(f"no such file or folder{there}; expected {source.expected}")


def _neighbor(path: Path) -> str:
    """A file or folder with nearly this name, if there is one."""
    try:
        # At most 10,000 names: a similar name is a courtesy, and folders of images are large.
        names = [entry.name for entry in itertools.islice(path.parent.iterdir(), 10_000)]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, 1, 0.7)
    return f", did you mean {path.parent / near[0]}?" if near else ""
