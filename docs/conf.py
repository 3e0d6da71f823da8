"""Sphinx settings: the user guide, and the reference made from the docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "metalstm"
author = "The metalstm authors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["**.ipynb_checkpoints"]

# Markdown and notebooks. The tests execute the notebooks and the pages' code blocks;
# the site shows the outputs that are stored.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings: Google style; single backticks name Python objects where they can.
default_role = "py:obj"
autodoc_default_options = {
    "members": True,
    "imported-members": True,
    "undoc-members": True,
    "exclude-members": "Array, PyTree",
    "special-members": "__call__",
}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"PyTree": "PyTree", "Array": "Array"}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a field is not documented twice
autosummary_generate = False
add_module_names = False
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "metalstm"
html_theme_options = {
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search is in the sidebar
    "use_download_button": False,
}
html_static_path = ["_static"]
html_css_files = ["metalstm.css"]
html_show_sourcelink = False
html_copy_source = False


def fields_of_a_named_tuple(app, what, name, obj, options, lines):
    """List a NamedTuple's fields with what the source says after each."""
    del app, name, options
    if what != "class" or not hasattr(obj, "_fields"):
        return
    source = textwrap.dedent(inspect.getsource(obj))
    rows, body = source.splitlines(), ast.parse(source).body[0].body
    said = {}
    for field, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        if isinstance(after, ast.Expr):  # a string literal below the field
            said[field.target.id] = " ".join(
                inspect.cleandoc(after.value.value).split()
            )
        else:
            _, _, comment = rows[field.end_lineno - 1].partition("  # ")
            said[field.target.id] = re.sub(r"([*|])", r"\\\1", comment)
    if any(said.values()):
        rows = [f"- **{field}**: {said.get(field, '')}" for field in obj._fields]
        lines.extend(["", *(row.removesuffix(": ") for row in rows), ""])


def tidy_signature(app, what, name, obj, options, signature, returns):
    """No constructor for a Protocol; the plain names of aliases."""
    del app, what, name, options
    if getattr(obj, "_is_protocol", False):
        return "", None
    alias = r"TypeAliasForwardRef\('(\w+)'\)"
    plain = [text and re.sub(alias, r"\1", text) for text in (signature, returns)]
    return tuple(plain)


def copy_notebooks(app):
    """Put the notebooks inside the site, with their links to it."""
    folder = Path(app.srcdir) / "notebooks"
    folder.mkdir(exist_ok=True)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        text = path.read_text().replace("](../docs/", "](../")
        (folder / path.name).write_text(text)


def link_notebooks(app, docname, source):
    """Links that are right in the repository, made right in the site."""
    del app
    if not docname.startswith("notebooks/"):
        source[0] = source[0].replace("](../notebooks/", "](notebooks/")


def skip_fields(app, what, name, obj, skip, options):
    """Leave out a NamedTuple's fields: the list above has them."""
    del app, what, name, options
    return True if type(obj).__name__ == "_tuplegetter" else skip


def setup(app):
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", link_notebooks)
    app.connect("autodoc-process-docstring", fields_of_a_named_tuple)
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("autodoc-skip-member", skip_fields)
