"""The documentation as a site, which `make docs` builds."""

import pathlib
import sys
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

import inertia_jax

sys.path.append(str(pathlib.Path(__file__).parent))  # for `docstrings`

project = "inertia_jax"
author = "The inertia_jax authors"
copyright = "2026, The inertia_jax authors"
version = release = inertia_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings"]
exclude_patterns = ["_build"]
html_theme = "sphinx_book_theme"
html_title = f"inertia_jax {release}"
html_theme_options = {"navbar_persistent": []}
html_math_renderer = "mathml"

# References to what is not there are errors. The pages of Python, JAX and Flax are not
# looked up, since the build needs no network: their types are no links.
nitpicky = True
nitpick_ignore_regex = [("py:class", r"(?!inertia_jax).*")]

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
# As a list like that of arguments; types stand in the signature.
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_attr_annotations = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 600  # seconds, for a cell
nb_execution_raise_on_error = True
nb_merge_streams = True


def setup(app: Sphinx) -> None:
    """Has formulas set as MathML, which browsers show without a network."""

    def formula(translator: Any, node: nodes.Element) -> None:
        is_block = isinstance(node, nodes.math_block)
        found = latex2mathml.tex2mathml(node.astext(), as_block=is_block)
        translator.body.append(f"<div>{found}</div>" if is_block else found)
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
