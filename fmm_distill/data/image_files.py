"""Folders of image files: which of them are a split's, their classes, and the tables that belong to them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from fmm_distill.data import splits
from fmm_distill.data.records import integers, read_records
from fmm_distill.errors import UserError

__all__ = ["Listing", "Rows", "list_files", "read_folder", "read_list"]

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# What archivers and systems put next to images.
_HIDDEN = ("__MACOSX", "__pycache__")
# Files that Pillow registers and that hold no photographs.
_NO_IMAGES = {".pdf", ".eps", ".ps", ".h5", ".hdf", ".mpg", ".mpeg", ".wmf", ".emf", ".grib", ".bufr"}


@dataclass
class Listing:
    """The files under a folder, as paths relative to it, in order.

    Attributes:
        others: how many files of other kinds there are, by extension.
        hidden: images whose names, or whose folders', begin with a dot.
        repeated: folders that are links to folders that are listed already.
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    parquet: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    repeated: int = 0


@dataclass
class Rows:
    """Columns of equal length, one of them of image files.

    Attributes:
        columns: values by name.
        images: the columns that hold paths of images.
        classes: names of the classes that the column ``label`` counts; empty: it has none.
        notes: lines on what was left out, and why.
        digest: of the files' names, sizes and times.
    """

    columns: dict[str, list[Any]]
    images: tuple[str, ...] = ("image",)
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str = ""


def list_files(root: Path) -> Listing:
    """Every file under a folder; links are followed.

    Raises:
        UserError: if one of its folders can't be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); expected a folder that can") from error

    found = Listing(root)
    Image.init()
    extensions = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN} - _NO_IMAGES
    seen: set[str] = set()
    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            found.repeated += 1
            # In place: ``os.walk`` goes no deeper, which ends circles of links.
            below.clear()
            continue
        seen.add(real)
        # In place: ``os.walk`` visits the folders in this order, on every file system the same one.
        below.sort()
        place = Path(folder).relative_to(root)
        unseen = any(part.startswith(".") or part in _HIDDEN for part in place.parts)
        for name in sorted(names):
            _sort_in(found, place / name, extensions, hidden=unseen or name.startswith("."))
    for paths in (found.images, found.parquet, found.metadata):
        paths.sort()
    return found


def _sort_in(found: Listing, path: Path, extensions: set[str], *, hidden: bool) -> None:
    ending = path.suffix.lower()
    if hidden:
        found.hidden += ending in extensions
    elif path.name.lower() in _METADATA:
        found.metadata.append(path)
    elif ending == ".parquet":
        found.parquet.append(path)
    elif ending in extensions:
        found.images.append(path)
    else:
        found.others[ending] += 1


def read_folder(listing: Listing, source: str, split: str) -> Rows:
    """The images of a split with their classes, or with the columns of the metadata files next to them.

    Every image is used unless the folders at the top all have names of splits.

    Raises:
        UserError: if there is no such split, or the metadata don't fit the images.
    """
    layout = _layout(listing)
    layout.check(source, split)
    chosen = [path for path in listing.images if layout.has(path, split)]
    notes = layout.left_out(listing, split, len(listing.images) - len(chosen))
    if listing.metadata:
        rows = _with_metadata(listing, layout, split, source)
        left = len(set(chosen).difference(rows.columns.pop("")))
        if left:
            notes.append(f"images without a row in {listing.metadata[0].name}: {left}")
    else:
        rows = _with_classes(listing, layout, chosen)
    if listing.hidden:
        notes.append(f"hidden images: {listing.hidden}")
    if listing.repeated:
        notes.append(f"folders that are links to others of it: {listing.repeated}")
    others = sum(listing.others.values())
    if others:
        kinds = ", ".join(f"{number} {ending or 'without one'}" for ending, number in listing.others.most_common(5))
        notes.append(f"files with other extensions: {others} ({kinds})")
    count = len(next(iter(rows.columns.values())))
    if notes:
        rows.notes += (f"data: {source}: images used: {count}; left out: {'; '.join(notes)}",)
    taken = layout.named_like_splits()
    if taken:
        rows.notes += (
            f"data: {source}: {', '.join(taken)}: used like the other folders, not as a split; for a split give its "
            "folder",
        )
    return rows


@dataclass(frozen=True)
class _Layout:
    """The order of images in folders.

    Attributes:
        top: the folder whose own folders may be splits.
        folders: those folders.
        splits: the split of each of them; None if they are not splits.
    """

    top: Path
    folders: tuple[str, ...]
    splits: dict[str, str] | None

    def has(self, path: Path, split: str) -> bool:
        """Return whether a file is of a split."""
        if self.splits is None:
            return True
        inside = path.is_relative_to(self.top)
        return inside and self.splits.get(path.relative_to(self.top).parts[0]) == splits.base_of(split)

    def depth(self, path: Path) -> int:
        """Return the number of folders above an image, without the one of its split."""
        return len(path.relative_to(self.top).parts) - (1 if self.splits is None else 2)

    def check(self, source: str, split: str) -> None:
        """Check that the split exists."""
        base = splits.base_of(split)
        if self.splits is None and base != "train":
            raise UserError(
                f"data.split {split}: {source} has no splits; expected folders with the names of splits alone (train, "
                "validation, test) at the top: leave data.split out to use every image"
            )
        if self.splits is not None and base not in self.splits.values():
            raise UserError(
                f"data.split {split}: {source} has {', '.join(self.folders)}; expected one of them, e.g. --set "
                f"data.split={self.folders[0]}"
            )

    def left_out(self, listing: Listing, split: str, count: int) -> list[str]:
        """Return a line on the images of other splits, if there are any."""
        others = [name for name in self.folders if not self.has(self.top / name, split)]
        return [f"images of other splits ({', '.join(others)}): {count}"] if count else []

    def named_like_splits(self) -> list[str]:
        """Return the folders with names of splits that are not splits, because others at the top are not."""
        return [name for name in self.folders if splits.of_folder(name)] if self.splits is None else []


def _layout(listing: Listing) -> _Layout:
    top, paths = Path(), listing.images + listing.metadata
    while True:
        parts = [path.relative_to(top).parts for path in paths]
        names = {each[0] for each in parts}
        # A folder that holds nothing but one folder separates nothing.
        if len(names) > 1 or any(len(each) == 1 for each in parts) or splits.of_folder(min(names)) is not None:
            break
        top /= min(names)
    parts = [path.relative_to(top).parts for path in listing.images]
    folders = tuple(sorted({each[0] for each in parts if len(each) > 1}))
    loose = any(len(each) == 1 for each in parts)
    return _Layout(top, folders, None if loose else splits.splits_of_folders(folders))


def _with_classes(listing: Listing, layout: _Layout, chosen: list[Path]) -> Rows:
    """Images with the number of their folder's name as ``label``, where all are in folders of one depth."""
    depths = {layout.depth(path) for path in listing.images}
    columns: dict[str, list[Any]] = {"image": [str(listing.root / path) for path in chosen]}
    rows = Rows(columns, digest=_digest(listing.root, chosen))
    if len(depths) > 1:
        low, high = min(depths), max(depths)
        rows.notes = (f"data: images are in folders of different depth ({low} to {high}) and have no column label",)
    elif depths != {0}:
        # Over all splits: a class has the same number in each.
        rows.classes = tuple(sorted({path.parent.name for path in listing.images}))
        number = {name: i for i, name in enumerate(rows.classes)}
        columns["label"] = [number[path.parent.name] for path in chosen]
    return rows


def _with_metadata(listing: Listing, layout: _Layout, split: str, source: str) -> Rows:
    """The rows of all metadata files whose images are of a split; the column "" has the images' paths."""
    columns: dict[str, list[Any]] = {"": []}
    images: tuple[str, ...] = ()
    for file in listing.metadata:
        twins = [other for other in listing.metadata if other.parent == file.parent]
        if len(twins) > 1:
            raise UserError(f"--data {source}: {' and '.join(map(str, twins))}; expected one metadata file per folder")
        table, images = _image_columns(listing.root / file, f"--data {listing.root / file}", inside=True)
        count, before = len(table[images[0]]), len(columns[""])
        places = [None if path is None else Path(path).relative_to(listing.root) for path in table[images[0]]]
        # A row of a missing image stays: it is an unreadable image, and counted as such.
        rows = [i for i, place in enumerate(places) if place is None or layout.has(place, split)]
        for name in [name for name in table if name not in columns]:
            columns[name] = [None] * before
        for name, values in columns.items():
            new = places if name == "" else table.get(name, [None] * count)
            values.extend(new[i] for i in rows)
    ordered = sorted(path for path in columns[""] if path is not None)
    return Rows(columns, images, digest=_digest(listing.root, ordered, listing.metadata))


def read_list(path: Path, source: str, image: str | None) -> Rows:
    """The rows of a table of image files: a CSV, TSV, JSON or JSON-lines file; paths are relative to it.

    Args:
        image: the column of paths; None: ``file_name``, or one that ends in ``_file_name``.

    Raises:
        UserError: if it has no column of paths.
    """
    columns, images = _image_columns(path, f"--data {source}", inside=False, image=image)
    files = [Path(file) for file in columns[images[0]] if file is not None]
    return Rows(columns, images, digest=_digest(path.parent, files, [Path(path.name)]))


def _image_columns(
    path: Path, what: str, *, inside: bool, image: str | None = None
) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
    """The columns of a table, its names of files as paths, and which columns these are.

    Args:
        inside: refuse paths that lead out of the table's folder.
    """
    table = _read(path, what)
    columns: dict[str, list[Any]] = {}
    images: list[str] = []
    for name, values in table.items():
        if name == image:
            new = name
        elif image is None and (name == "file_name" or name.endswith("_file_name")):
            new = name.removesuffix("file_name").removesuffix("_") or "image"
        else:
            columns[name] = integers(values)
            continue
        columns[new] = [_resolve(path, value, f"{what}: {name}", inside=inside) for value in values]
        images.append(new)
    if not images:
        known = ", ".join(table) or "no column"
        raise UserError(f"{what}: it has {known}; expected a column file_name with the images' paths relative to it")
    if not columns[images[0]]:
        raise UserError(f"{what}: no row in it; expected one row per image")
    return columns, tuple(images)


def _read(path: Path, what: str) -> dict[str, list[Any]]:
    if path.suffix.lower() != ".parquet":
        return read_records(path, what)
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{what}: can't be read ({error}); expected a parquet file") from error


def _resolve(path: Path, value: Any, what: str, *, inside: bool) -> str | None:  # noqa: ANN401 of a user's table
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{what} has {value!r}; expected a path")
    place = os.path.normpath(value)
    if inside and (Path(place).is_absolute() or place.startswith("..")):
        raise UserError(f"{what} has {value!r}; expected a path below {path.parent}")
    return str(path.parent / place)


def _digest(root: Path, files: list[Path], tables: list[Path] | None = None) -> str:
    """A digest of files' names, sizes and times; one that is missing counts as such."""
    digest = hashlib.sha256()
    for file in [*files, *(tables or [])]:
        try:
            # Sizes and times instead of contents: to read every file would take as long as an epoch.
            state = (root / file).stat()
            digest.update(f"{file}\0{state.st_size}\0{state.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        except OSError:
            digest.update(f"{file}\0missing\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
