"""Package metadata: what zaya needs, in layers a machine can pick from. Tool settings live in pyproject.toml.

torch and triton are an extra, not a requirement, on purpose. A ROCm machine brings a torch of its own and a triton under another
distribution name (pytorch-triton-rocm, triton-rocm), which a plain `triton` requirement would overwrite file by file; a
requirement cannot say "unless one is there". tools/setup_env.py asks for the extra only where no torch can be imported.

deepspeed builds from source and imports torch while it does: `pip install --no-build-isolation`, after torch (docs/deepspeed.md).
"""

from setuptools import find_packages, setup

setup(
    name="zaya",
    version="0.1.0",
    description="Pretraining of ZAYA1 mixture-of-experts models",
    license="Apache-2.0",
    packages=find_packages(include=["zaya", "zaya.*"]),
    package_data={"zaya.kernels": ["configs.json", "c/*"]},
    python_requires=">=3.11,<3.14",
    install_requires=["numpy", "safetensors", "xxhash"],
    extras_require={
        "torch": ["torch>=2.9", 'triton>=3.5; platform_system == "Linux"'],
        "train": ["megatron-core==0.16.1", "tokenizers", "tqdm", "pyarrow", "zstandard", "matplotlib"],
        "deepspeed": ["deepspeed==0.19.8"],
        "hf": ["transformers>=5.13", "tokenizers"],
        "dev": ["pytest>=8.1", "pytest-timeout", "hypothesis", "ruff", "mypy", "pre-commit"],
    },
)
