"""What a user sees after ``import hf_querydet``."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import hf_querydet


def run_python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_every_public_name_exists():
    names = [module.name for module in pkgutil.walk_packages(hf_querydet.__path__, "hf_querydet.")]
    modules = [hf_querydet, *map(importlib.import_module, names)]
    missing = [
        f"{module.__name__}.{name}"
        for module in modules
        for name in getattr(module, "__all__", ())
        if not hasattr(module, name)
    ]
    assert len(modules) > 100
    assert missing == []


def test_import_is_silent_and_needs_no_compiler_and_no_network(tmp_path):
    code = (
        "import socket\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import sys\n"
        "import hf_querydet\n"
        "assert 'torch.utils.cpp_extension' not in sys.modules, 'build'\n"
    )
    result = run_python(code, PATH=str(tmp_path))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_transformers_own_types_stay_its_own():
    from transformers import AutoConfig, DetrConfig

    assert type(AutoConfig.for_model("detr")) is DetrConfig


@pytest.mark.parametrize("variant", hf_querydet.VARIANTS.values())
def test_variant_of_a_configuration_is_its_row(variant):
    assert hf_querydet.variant_of(variant.config()) is variant


def test_configuration_of_no_variant_is_an_error():
    from transformers import ViTConfig

    with pytest.raises(ValueError, match="is a ViTConfig; this library has"):
        hf_querydet.variant_of(ViTConfig())


def test_load_detector_refuses_other_architectures(tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model of type 'vit'; this library has"):
        hf_querydet.load_detector(tmp_path)


def test_load_detector_says_that_there_is_no_configuration(tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json; name the directory or repository"):
        hf_querydet.load_detector(tmp_path)


def test_load_detector_names_what_cannot_be_fetched_without_a_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr("hf_querydet.registration.PreTrainedConfig.get_config_dict", unreachable)
    with pytest.raises(
        OSError, match="demo_x is no directory here, and as a Hub id it could not be"
    ):
        hf_querydet.load_detector("demo_x")


@pytest.mark.parametrize("name", ["deformable-detr", "DeformableDETR", "Deformable DETR"])
def test_a_variant_of_another_spelling_is_no_hub_id(name):
    with pytest.raises(OSError, match="do you mean the variant deformable_detr, a new detector"):
        hf_querydet.load_detector(name)


def test_a_file_of_weights_is_no_directory(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(OSError, match="is a file; name its directory"):
        hf_querydet.load_detector(tmp_path / "model.safetensors")


def test_load_detector_says_that_there_is_no_such_directory(tmp_path):
    with pytest.raises(OSError, match="is not a directory, and not a Hub id, which is NAME or"):
        hf_querydet.load_detector(tmp_path / "absent" / "model")
