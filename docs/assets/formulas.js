// Renders what pymdownx.arithmatex has marked: \( inline \) and \[ display \] formulas.
document.querySelectorAll(".arithmatex").forEach((element) => {
  const source = element.textContent.trim();
  const displayMode = source.startsWith("\\[");
  katex.render(source.slice(2, -2), element, { displayMode, throwOnError: false });
});
