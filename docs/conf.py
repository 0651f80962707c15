"""How the documentation is built: Sphinx, MyST and furo; the pages of the norms are written from the registry."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import normzoo

project = "normzoo"
author = "The normzoo authors"
copyright = "the normzoo authors, Apache-2.0"
release = version = normzoo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "zoo"]
html_theme = "furo"
html_title = "normzoo"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["formulas.css"]
exclude_patterns = ["_build", "CONTRIBUTING.md"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_custom_sections = ["Shape", "Source", "Reference", "Deviations"]
nitpicky = False
