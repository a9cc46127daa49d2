"""Packaging of hf_querydet.

``csrc/`` lies beside the package and is shipped inside it as ``hf_querydet._csrc``, so that the
deformable attention can be compiled on first use wherever the wheel was installed.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Lower bounds are the oldest releases that the test suite passes with.
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
    "huggingface_hub>=1.0",
    "pillow>=10",
    "typer>=0.12",
    "rich>=13",
]
EXTRAS = {
    "plots": ["matplotlib>=3.8"],
    "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
    "dev": ["pytest>=8", "pycocotools>=2.0.8", "ruff>=0.12", "tensorboard>=2.16"],
}


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
    entry_points={"console_scripts": ["hf-querydet = hf_querydet.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
