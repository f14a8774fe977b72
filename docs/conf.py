"""Sphinx settings."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
for source_root in (HERE.parent, HERE.parent / "registry", HERE.parent / "backends"):
    sys.path.insert(0, str(source_root))

project = "moe-routing"
author = "the moe-routing developers"
copyright = "2026, the moe-routing developers"  # noqa: A001 -- Sphinx's name
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "moe-routing"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
nitpicky = False
