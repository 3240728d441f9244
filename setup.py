"""Only the package mapping lives here; everything else is in pyproject.toml.

`kernels/` at the top level is the package `mopl.kernels`. It must not hold an `__init__.py`: with one,
running Python at the repository root would shadow Hugging Face's package `kernels`.
"""

from setuptools import setup

setup(
    packages=[
        "mopl",
        "mopl.alignment",
        "mopl.clp",
        "mopl.conditioning",
        "mopl.integrations",
        "mopl.kernels",
        "mopl.losses",
        "mopl.ops",
        "mopl.pareto",
        "mopl.ranking",
        "mopl.report",
        "mopl.rewards",
        "mopl.training",
    ],
    package_dir={"mopl": "mopl", "mopl.kernels": "kernels"},
    package_data={
        "mopl": ["py.typed"],
        "mopl.alignment": ["demo_prompts.json"],
        "mopl.report": ["page.html", "page.css", "page.js"],
    },
)
