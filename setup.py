"""Packaging. The version stands in torchreid_snloss/__init__.py alone."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"', (here / "torchreid_snloss/__init__.py").read_text(), re.MULTILINE)
assert version is not None

# PyPI's torchreid imports these and declares none of them.
torchreid_needs = [
    "numpy",
    "scipy",
    "h5py",
    "Pillow",
    "opencv-python-headless",
    "matplotlib>=3.7",
    "tensorboard",
    "six",
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
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["torchreid_snloss", "torchreid_snloss.*"]),
    package_data={"torchreid_snloss": ["py.typed", "compare/report.html"]},
    install_requires=[
        "torchreid",
        "torch>=2.2",
        "torchvision",
        "Jinja2>=3.0",
        "gdown>=5",
        "yacs",
        "PyYAML",
        "tqdm",
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
        "dev": ["build", "mypy", "ruff", "twine", "types-PyYAML", "types-tqdm"],
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
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
