"""A hook of mkdocs: the pages of the API reference, one per package, with a section per module.

The pages are generated, so that a new module needs no edit of the documentation. ``validation.nav.omitted_files`` in
``mkdocs.yml`` ends the build where a new package is missing from the navigation.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

PACKAGE = "fmm_distill"
# A page with this comment gets the table of the package's own names in its place.
NAMES = "<!-- names of the package -->"
DOCUMENTED = (ast.ClassDef, ast.FunctionDef)


def modules(path: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the file of a module and of everything public below it, packages first."""
    yield name, path / "__init__.py" if path.is_dir() else path
    if path.is_dir():
        for child in sorted(path.iterdir()):
            public = not child.name.startswith("_")
            if public and (child.suffix == ".py" or (child / "__init__.py").is_file()):
                yield from modules(child, f"{name}.{child.stem}")


def page(found: list[tuple[str, Path]]) -> str:
    """Return the Markdown of one page: a directive of mkdocstrings for the package, then one per module.

    Names that a package imports from its modules are documented with the modules, not a second time.
    """
    sections = []
    for index, (name, file) in enumerate(found):
        lines = [f"::: {name}", "    options:", f"      heading_level: {2 if index else 1}"]
        if file.name == "__init__.py":
            lines.append(f"      members: {defined(file) or 'false'}")
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def defined(file: Path) -> list[str]:
    """Return the public classes and functions that a file defines."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, DOCUMENTED) and not node.name.startswith("_")]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    root = Path(config.config_file_path).parent / PACKAGE
    for path in sorted(root.iterdir()):
        is_module = path.suffix == ".py" or (path / "__init__.py").is_file()
        if is_module and not path.name.startswith("_"):
            found = list(modules(path, f"{PACKAGE}.{path.stem}"))
            files.append(File.generated(config, f"api/{path.stem}.md", content=page(found)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the table of the package's own names where a page asks for it."""
    del page, files
    return markdown.replace(NAMES, table(Path(config.config_file_path).parent)) if NAMES in markdown else markdown


def table(root: Path) -> str:
    """Return a row per name that ``fmm_distill/__init__.py`` exports: a link, and the docstring's first line."""
    tree = ast.parse((root / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    exported, homes = assigned(tree, "__all__"), dict(assigned(tree, "_HOMES"))
    rows = []
    for name in sorted(set(exported) - {"__version__"}):
        # A name without a home is a package.
        link = f"{homes[name]}.{name}" if name in homes else f"{PACKAGE}.{name}"
        rows.append(f"| [`{name}`][{link}] | {summary(root, homes.get(name), name)} |")
    return "\n".join(["| name | what it is |", "|---|---|", *rows])


def assigned(tree: ast.Module, name: str) -> list[str] | dict[str, str]:
    """Return the list or the dictionary of strings that a module assigns to a name."""
    return next(ast.literal_eval(node.value) for node in tree.body if is_assignment(node, name))


def is_assignment(node: ast.stmt, name: str) -> bool:
    """Return whether a statement assigns to a name."""
    return isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets)


def summary(root: Path, home: str | None, name: str) -> str:
    """Return the first line of the docstring of a class or function, or of a package if there is no home."""
    file = f"{home.replace('.', '/')}.py" if home else f"{PACKAGE}/{name}/__init__.py"
    tree = ast.parse((root / file).read_text(encoding="utf-8"))
    found = (node for node in tree.body if isinstance(node, DOCUMENTED) and node.name == name)
    return (ast.get_docstring(next(found) if home else tree) or "").split("\n")[0]
