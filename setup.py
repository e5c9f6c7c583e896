"""Packaging. The version stands in torchreid_snloss/__init__.py alone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"', (here / "torchreid_snloss/__init__.py").read_text(), re.MULTILINE)
assert version is not None

# PyPI's torchreid imports these and declares none of them.
torchreid_needs = ["numpy", "scipy", "h5py", "Pillow", "opencv-python-headless", "matplotlib", "tensorboard", "six"]

setup(
    name="torchreid-snloss",
    version=version.group(1),
    description="SN, HAP2S and FIDI loss for person re-identification with torchreid",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["torchreid_snloss", "torchreid_snloss.*"]),
    package_data={"torchreid_snloss": ["py.typed"]},
    install_requires=["torchreid", "torch>=2.2", "torchvision", "gdown>=5", "yacs", "PyYAML", "tqdm", *torchreid_needs],
    extras_require={
        "test": ["pytest", "pytest-xdist", "hypothesis", "pytorch-metric-learning", "onnx", "onnxruntime"],
        "bench": ["pytest", "pytest-xdist", "pytorch-metric-learning"],
        "dev": ["mypy", "ruff", "types-PyYAML", "types-tqdm"],
    },
    entry_points={"console_scripts": ["torchreid-snloss = torchreid_snloss.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
