"""The documentation site; the command stands in CONTRIBUTING.md.

The theme is the Sphinx book theme, and pages are MyST Markdown: what JAX, Flax and optax have, so
that a reader of theirs knows the way, and the same pages read well on GitHub.
"""

import pathlib
import re
import shutil
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import saflex_jax  # noqa: E402

project = "saflex_jax"
author = copyright = "The saflex_jax authors"
release = version = saflex_jax.__version__
repository = re.search(r"https://github.com/[\w./-]+", (ROOT / "CITATION.cff").read_text())[0]

# Notebooks are pages too, and Sphinx reads nothing outside of its folder. Their dates stay, so that
# a second build skips them.
shutil.rmtree(ROOT / "docs" / "colabs", ignore_errors=True)
(ROOT / "docs" / "colabs").mkdir()
for notebook in (ROOT / "colabs").glob("*.ipynb"):
    shutil.copy2(notebook, ROOT / "docs" / "colabs")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "saflex_pages",
]
html_theme = "sphinx_book_theme"
html_title = "saflex_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "repository_url": repository,
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "show_toc_level": 2,
}
html_show_sourcelink = html_copy_source = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
highlight_language = "text"  # fences without a language are commands and diagrams
nb_execution_mode = "off"  # CI runs the notebooks; the site shows the outputs that they hold
smartquotes_action = "D"  # dashes; "jit" is what one types
copybutton_exclude = ".linenos, .gp, .go"

# Signatures stay short; types stand beside the meaning of each argument.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autosummary_generate = False
toc_object_entries_show_parents = "hide"

# Nothing is fetched while the site is built, so names of other packages are no links.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(jax|jaxlib|numpy|np|optax|flax|nn|nnx|orbax|etils|epath|tokenizers)\..*"),
    ("py:.*", r"(collections|os|signal|typing)\..*"),
    ("py:class", r"saflex_jax\.[\w.]*\b[A-Z]"),  # type variables
]
nitpick_ignore = [  # shared by the project's own modules; without a page, see public_names.py
    ("py:class", "saflex_jax.rules.scoring.Result"),
    ("py:class", "saflex_jax.train.loop.Stream"),
]

# Needs a network, so it is a command of its own: python -m sphinx -b linkcheck docs build/links
linkcheck_timeout = 10
linkcheck_ignore = [r".*/OWNER/.*"]  # until the repository has an address (.ci/address)
