"""A hook of mkdocs: one page of the API reference per package, with a section per module.

The pages are generated, so that a new module needs no edit of the documentation. ``validation.nav.omitted_files`` in
``mkdocs.yml`` ends the build where a new package is missing from the navigation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

PACKAGE = "fmm_distill"


def modules(path: Path, name: str) -> Iterator[str]:
    """Yield the dotted names of a module and of everything public below it, packages first."""
    yield name
    if path.is_dir():
        for child in sorted(path.iterdir()):
            public = not child.name.startswith("_")
            if public and (child.suffix == ".py" or (child / "__init__.py").is_file()):
                yield from modules(child, f"{name}.{child.stem}")


def page(names: list[str]) -> str:
    """Return the Markdown of one page: a directive of mkdocstrings for the package, then one per module."""
    sections = [f"::: {name}\n    options:\n      heading_level: {1 if name == names[0] else 2}" for name in names]
    return "\n\n".join(sections) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    root = Path(config.config_file_path).parent / PACKAGE
    for path in sorted(root.iterdir()):
        is_module = path.suffix == ".py" or (path / "__init__.py").is_file()
        if is_module and not path.name.startswith("_"):
            names = list(modules(path, f"{PACKAGE}.{path.stem}"))
            files.append(File.generated(config, f"api/{path.stem}.md", content=page(names)))
    return files
