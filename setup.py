"""Packaging. `kernels/` holds the package `ssl_ib_kernels`; `recipes/` and `csrc/` travel inside the wheel, as
`ssl_ib/recipes` and `ssl_ib/csrc`: the CUDA kernels are built from there at first use.

`SSL_IB_BUILD_CSRC=1 pip install --no-build-isolation .` builds them at once, for the architectures of
`TORCH_CUDA_ARCH_LIST` (default: sm_80, which newer GPUs can run too, and sm_90a). It takes nvcc, but no GPU.
"""

import os
import re
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
#: Read, not imported: nothing that the package needs is there yet.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "ssl_ib" / "__init__.py").read_text(), re.MULTILINE)[1]


def cuda_extension() -> dict:
    """What `setup` needs to build the CUDA kernels: torch and the package itself are imported for it alone."""
    if os.environ.get("SSL_IB_BUILD_CSRC") != "1":
        return {}
    sys.path.insert(0, str(ROOT))
    from ssl_ib.ops import extension

    if (nvcc := extension.find_nvcc()) is None:
        sys.exit("SSL_IB_BUILD_CSRC=1: nvcc, CUDA's compiler, is neither on the PATH nor under CUDA_HOME")
    os.environ["CUDA_HOME"] = extension.cuda_home(nvcc)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    module = CUDAExtension(
        extension.AHEAD_OF_TIME,
        sorted(glob("csrc/bindings/*.cpp") + glob("csrc/cuda/*.cu")),
        depends=sorted(glob("csrc/*/*.h")),
        extra_compile_args={"cxx": extension.CXX_FLAGS, "nvcc": extension.NVCC_FLAGS},
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="ssl-ib",
    version=VERSION,
    description="Self-supervised vision pretraining seen through the information bottleneck",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="ssl_ib contributors",
    license="MIT",
    license_files=["LICENSE"],
    keywords="self-supervised learning, information bottleneck, mutual information, computer vision, pytorch",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["ssl_ib", "ssl_ib.*"]) + ["ssl_ib.recipes", "ssl_ib.csrc", "ssl_ib_kernels"],
    package_dir={
        "ssl_ib": "ssl_ib",
        "ssl_ib.recipes": "recipes",
        "ssl_ib.csrc": "csrc",
        "ssl_ib_kernels": "kernels/ssl_ib_kernels",
    },
    package_data={
        "ssl_ib": ["py.typed"],
        "ssl_ib.recipes": ["*.yaml"],
        "ssl_ib.csrc": ["*/*.h", "*/*.cpp", "*/*.cu"],
        "ssl_ib.report": ["templates/*", "static/*", "vendor/*"],
    },
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
        "scipy",
        "jinja2",
        "markupsafe",
        "npeet-plus",
        "safetensors",
        "torchmetrics",
        "ninja",
        "pybind11",
        "pillow",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-xdist",
            "mypy",
            "scikit-image",
            "segmentation-models-pytorch>=0.5",
            "faster-coco-eval",
            "selenium",
            "webdataset",
            "datasets",
            "axe-core-python",
            "hypothesis",
            "submitit>=1.5",
        ],
        "wandb": ["wandb"],
        "embed": ["pyarrow"],
        "stream": ["webdataset", "datasets>=4"],
        "slurm": ["submitit>=1.5"],
        "dense": ["segmentation-models-pytorch>=0.5", "faster-coco-eval"],
        "export": ["onnx", "onnxscript", "onnxruntime", "transformers"],
    },
    entry_points={
        "console_scripts": [
            "ssl-ib-train = ssl_ib.cli.train:main",
            "ssl-ib-bench = ssl_ib.cli.bench:main",
            "ssl-ib-sweep = ssl_ib.cli.sweep:main",
            "ssl-ib-embed = ssl_ib.cli.embed:main",
            "ssl-ib-export = ssl_ib.cli.export:main",
            "ssl-ib-eval = ssl_ib.cli.eval:main",
            "ssl-ib-info = ssl_ib.cli.info:main",
            "ssl-ib-report = ssl_ib.cli.report:main",
            "ssl-ib-data = ssl_ib.cli.data:main",
            "ssl-ib-doctor = ssl_ib.cli.doctor:main",
        ]
    },
    **cuda_extension(),
)
