"""Sphinx settings: the user guide, and the reference made from the docstrings."""

from __future__ import annotations

import inspect
import re
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
    "special-members": "__call__",
}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"PyTree": "PyTree", "Array": "Array"}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autosummary_generate = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "metalstm"
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True}
html_show_sourcelink = False
html_copy_source = False


def fields_of_a_named_tuple(app, what, name, obj, options, lines):
    """List a NamedTuple's fields with the comments that follow them in the source."""
    del app, name, options
    if what != "class" or not hasattr(obj, "_fields"):
        return
    comments = re.findall(
        r"^    (\w+):[^#\n]*(?:  # (.*))?$", inspect.getsource(obj), re.MULTILINE
    )
    comments = [(field, text) for field, text in comments if field in obj._fields]
    if any(text for _, text in comments):
        lines.append("")
        for field, text in comments:
            escaped = text.replace("*", r"\*").replace("|", r"\|")
            lines.append(f"- **{field}**" + (f": {escaped}" if text else ""))
        lines.append("")


def skip_fields(app, what, name, obj, skip, options):
    """Leave out "Alias for field number 0": the list above says more."""
    del app, what, name, options
    alias = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    return True if alias else skip


def setup(app):
    app.connect("autodoc-process-docstring", fields_of_a_named_tuple)
    app.connect("autodoc-skip-member", skip_fields)
