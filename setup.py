"""Packaging. `kernels/` holds the package `ssl_ib_kernels`; `recipes/` travels inside the wheel as `ssl_ib/recipes`."""

from setuptools import find_packages, setup

setup(
    name="ssl-ib",
    version="0.1.0",
    description="Self-supervised vision pretraining seen through the information bottleneck",
    python_requires=">=3.10",
    packages=find_packages(include=["ssl_ib", "ssl_ib.*"]) + ["ssl_ib.recipes", "ssl_ib_kernels"],
    package_dir={"ssl_ib": "ssl_ib", "ssl_ib.recipes": "recipes", "ssl_ib_kernels": "kernels/ssl_ib_kernels"},
    package_data={"ssl_ib.recipes": ["*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "triton; platform_system == 'Linux'",
        "timm>=1.0.20",
        "numpy",
        "pydantic>=2.7",
        "annotated-types",
        "pyyaml",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "scikit-learn",
        "safetensors",
        "torchmetrics",
        "ninja",
        "pybind11",
        "pillow",
    ],
    extras_require={"test": ["pytest"]},
    entry_points={"console_scripts": ["ssl-ib-train = ssl_ib.cli.train:main"]},
)
