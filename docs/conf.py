"""The settings of the site; `make docs` builds it."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
# The local extensions, what fetches packages of npm, and the faulty implementations that a table lists.
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent / "benchmarks"), str(HERE.parent / "conformance/tests/meta")]

import nonlocal_core  # noqa: E402

project = "nonlocal-core"
project_copyright = "its authors, under the Apache licence 2.0"
version = release = nonlocal_core.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.katex",
    "docstrings",
    "figures",
    "formulas",
    "guides",
    "links",
    "names",
    "report",
    "tables",
]
exclude_patterns = ["extensions", "figures", "tests", "guides/*.ipynb", "guides/*.py"]
nitpicky = True
# What belongs to others has no page here. In docstrings single backticks are code, and a link where they can be.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|flax|jax|keras|matplotlib|nnx|np|numpy|os|pathlib|tensorflow|torch|typing)(\..*)?"),
    # Types of arguments
    ("py:class", r"nonlocal_core\.spec\.options\.\w+|nonlocal_tensorflow\.layers\.\w+|nonlocal_conformance\.driver\.T"),
    ("py:obj", r"(?s).*"),
]
default_role = "py:obj"
smartquotes_action = "D"  # dashes alone: quotes are those of code
show_warning_types = True

# Pages

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

katex_css_path = "katex/katex.min.css"
katex_prerender = True

# The reference

autodoc_default_options = {"members": True, "member-order": "bysource"}
autosummary_generate = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = False
viewcode_line_numbers = True

# The guides

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "guides",
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"__init__\.py",
    "within_subsection_order": "guides.Order",
    "abort_on_example_error": True,
    "write_computation_times": False,  # its page takes scripts from other hosts
    "parallel": 2,
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "remove_config_comments": True,
    "min_reported_time": 1,
    "default_thumb_file": str(HERE / "_static" / "logo.svg"),
    "doc_module": ("nonlocal_core", "nonlocal_torch", "nonlocal_tensorflow", "nonlocal_jax", "nonlocal_conformance"),
    "reference_url": {"nonlocal_core": None},
    "inspect_global_variables": False,
}

# The look

html_theme = "pydata_sphinx_theme"
html_title = "nonlocal-core"
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "logo": {"text": "nonlocal-core", "alt_text": "nonlocal-core"},
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
    "back_to_top_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
# A page that stands alone in its part of the site needs no list of the pages around it.
html_sidebars = {page: [] for page in ("index", "specification", "methods", "benchmarks", "search", "genindex")}
