"""Sphinx's configuration of the documentation, which `make docs` builds. The pages are plain Markdown too, for GitHub.

The package is imported from the working tree. The compiled module may be absent, because no docstring is in it, and
the packages that only data and training need are mocked, so that torch is the only large package to install.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "docs" / "_sphinx")]

project = "mfwm"
author = "the mfwm contributors"
copyright = author
release = version = re.search(r'__version__ = "(.+)"', (ROOT / "mfwm_kernels" / "__init__.py").read_text())[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "options", "pages"]
exclude_patterns = ["_sphinx", "_static", "notebooks"]

html_theme = "furo"
html_title = f"mfwm {release}"
html_static_path = ["_static"]
html_css_files = ["mfwm.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = html_show_sourcelink = False

# Headings get the anchors that GitHub gives them, down to this level, and a link to a missing one is an error.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_mock_imports = ["fsspec", "imageio", "matplotlib", "numcodecs", "PIL", "safetensors", "tqdm", "tyro", "zarr"]
# Docstrings give shapes, dtypes and units, which annotations do not.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
# Otherwise each forward would have the text of nn.Module.
autodoc_inherit_docstrings = False
add_module_names = False
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_param = napoleon_use_rtype = False
napoleon_custom_sections = [("Fields", "params_style")]
