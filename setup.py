"""Which packages and files there are; everything else is in pyproject.toml.

`mopl/kernels` is a link to `kernels/`, which must not hold an `__init__.py`: with one, Python at the root of a clone
would find it in place of Hugging Face's package `kernels`. One root for all packages lets setuptools put that root on
the path of an editable install; its other way, a finder behind all paths, loses to a folder named `mopl` (a clone, seen
from the folder above). See tests/package/test_install.py.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=find_namespace_packages(include=["mopl", "mopl.*"], exclude=["*.__pycache__"]),
    package_dir={"": "."},
    package_data={
        "mopl": ["py.typed"],
        "mopl._page": ["look.css", "controls.js"],
        "mopl.language_models": ["demo_prompts.json"],
        "mopl.report": ["page.html", "page.css", "page.js"],
        "mopl.serving": ["page.html", "page.css", "page.js"],
    },
)
