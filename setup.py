"""Packaging. The version stands in torchreid_snloss/__init__.py alone, the repository's address in pyproject.toml."""

import re
import shutil
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"', (here / "torchreid_snloss/__init__.py").read_text(), re.MULTILINE)
assert version is not None
setting = re.search(r'^repository = "(.*)"', (here / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
assert setting is not None
repository = setting[1].rstrip("/")


def absolute(readme: str) -> str:
    """Makes the README's relative links and pictures absolute, since a package index shows it alone."""

    def target(match: re.Match[str]) -> str:
        kind = "raw" if match[1].endswith((".jpg", ".png", ".svg")) else "blob"
        return f"]({repository}/{kind}/main/{match[1]})"

    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", target, readme)


def published() -> dict[str, Any]:
    """What depends on the repository's address: nothing where there is none yet."""
    if not repository:
        return {}
    pages = {
        "Documentation": "tree/main/docs",
        "Changelog": "blob/main/CHANGELOG.md",
        "Issues": "issues",
    }
    return {"url": repository, "project_urls": {name: f"{repository}/{path}" for name, path in pages.items()}}


def long_description() -> str:
    """The README. With an address, its links are absolute, and the badge of the tests stands below the title."""
    readme = (here / "README.md").read_text(encoding="utf-8")
    if not repository:
        return readme
    tests = f"{repository}/actions/workflows/tests.yml"
    return absolute(readme.replace("\n[![", f"\n[![Tests]({tests}/badge.svg)]({tests})\n[![", 1))


# PyPI's torchreid imports these and declares none of them. The oldest versions are those that the tests ran with.
torchreid_needs = [
    "numpy>=1.24",
    "scipy>=1.9",
    "h5py>=3.7",
    "Pillow>=9.2",
    "opencv-python-headless>=4.6",
    "matplotlib>=3.7",
    "tensorboard>=2.11",
    "six>=1.16",
]


class BuildWithConfigs(build_py):
    """Puts configs/ into the installed package, where ``--config-file configs/small.yaml`` finds it without a clone."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "torchreid_snloss/configs")
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree(here / "configs", target)


setup(
    cmdclass={"build_py": BuildWithConfigs},
    name="torchreid-snloss",
    version=version.group(1),
    description="SN, HAP2S and FIDI loss for person re-identification with torchreid",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="the torchreid-snloss developers",
    keywords=["person re-identification", "metric learning", "torchreid", "SN loss", "HAP2S loss", "FIDI loss"],
    **published(),
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["torchreid_snloss", "torchreid_snloss.*"]),
    package_data={"torchreid_snloss": ["py.typed", "compare/report.html"]},
    install_requires=[
        "torchreid>=0.2.5",
        "torch>=2.2",
        "torchvision>=0.17",
        "Jinja2>=3.0",
        "gdown>=5",
        "yacs>=0.1.8",
        "PyYAML>=6.0",
        "tqdm>=4.64",
        "scikit-learn>=1.2",
        *torchreid_needs,
    ],
    extras_require={
        "onnx": ["onnx", "onnxruntime"],
        "timm": ["timm>=1.0.16"],
        "tune": ["optuna>=4"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "pytorch-metric-learning",
            "onnx",
            "onnxruntime",
            "optuna>=4",
            "timm>=1.0.31",
        ],
        "bench": ["pytest", "pytest-xdist", "pytorch-metric-learning"],
        "docs": ["latex2mathml", "mkdocs-material", "mkdocstrings[python]", "ruff"],
        "dev": ["build", "mypy", "pre-commit", "ruff", "twine", "types-PyYAML", "types-tqdm"],
    },
    entry_points={
        "console_scripts": [
            "torchreid-snloss = torchreid_snloss.cli:main",
            "torchreid-snloss-compare = torchreid_snloss.compare:main",
            "torchreid-snloss-export = torchreid_snloss.inference.export:main",
            "torchreid-snloss-features = torchreid_snloss.inference.features:main",
        ]
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
