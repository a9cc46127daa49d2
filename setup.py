"""Packaging of hf_querydet.

``csrc/`` lies beside the package and is shipped inside it as ``hf_querydet._csrc``, so that the
deformable attention can be compiled on first use wherever the wheel was installed.

``HF_QUERYDET_BUILD_EXT=1 pip install --no-build-isolation .`` compiles it now instead, for the CPU
of this machine and, where nvcc is found, for its GPUs or those in TORCH_CUDA_ARCH_LIST.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# The bounds of torch, torchvision and transformers are the oldest that are supported;
# `.ci/lower-bounds` runs the tests with them.
REQUIREMENTS = [
    "torch>=2.11",
    "torchvision>=0.26",
    "transformers>=5.20.2",
    "datasets>=4.0",
    "accelerate>=1.10",
    "safetensors>=0.6",
    "timm>=1.0.20",
    "ninja>=1.11",
    "scipy>=1.13",
    "faster-coco-eval>=1.6.5",
    "huggingface_hub>=1.31",
    "pillow>=10.1",
    "typer>=0.12",
    "rich>=13",
]
EXTRAS = {
    "plots": ["matplotlib>=3.8"],
    "demo": ["gradio>=6.0,<7"],  # a new major version renames what a page is made of
    "browser": ["selenium>=4.30"],
    "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "pycocotools>=2.0.8",
        "ruff>=0.12",
        "tensorboard>=2.16",
    ],
}
EXTRAS["dev"] += EXTRAS["export"] + EXTRAS["plots"]
EXTRAS["demo"] += EXTRAS["plots"]
# For the tests of the page, which need Chromium and its driver beside it.
EXTRAS["browser"] += EXTRAS["demo"]


def kernel_extensions() -> dict:
    """Arguments of setup() that compile the kernels; the only place that needs torch here."""
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    # By path: the package itself imports more than a build environment need have.
    path = ROOT / "hf_querydet" / "ops" / "extension.py"
    spec = importlib.util.spec_from_file_location("extension", path)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)

    def sources(device_type: str) -> list[str]:
        return [f"csrc/{source}" for source in extension.SOURCES[device_type]]

    extensions = [
        CppExtension(
            f"hf_querydet.{extension.packaged_library_name('cpu')}",
            sources("cpu"),
            extra_compile_args=extension.compiler_flags("cpu"),
        )
    ]
    if CUDA_HOME is not None and extension.gpu_codes():
        flags = {
            "cxx": list(extension.CUDA_HOST_FLAGS),
            "nvcc": extension.compiler_flags("cuda"),
        }
        name = f"hf_querydet.{extension.packaged_library_name('cuda')}"
        extensions.append(CUDAExtension(name, sources("cuda"), extra_compile_args=flags))
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension}}


setup(
    name="hf_querydet",
    version="0.1.0",
    description="Query-based object detectors (DETR and its family) for the Hugging Face ecosystem",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["hf_querydet", "hf_querydet.*"]), "hf_querydet._csrc"],
    package_dir={"hf_querydet._csrc": "csrc"},
    package_data={"hf_querydet._csrc": ["*.h", "*.cpp", "cpu/*.cpp", "cpu/*.h", "cuda/*.cu*"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    **(kernel_extensions() if os.environ.get("HF_QUERYDET_BUILD_EXT") == "1" else {}),
    entry_points={"console_scripts": ["hf-querydet = hf_querydet.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
