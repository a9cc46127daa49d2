import datasets
import pytest
from detection_data import write_image_folder

from hf_querydet.image_processing_utils import DetectionImageProcessor


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(
        datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path_factory.mktemp("downloads"))
    )
    datasets.disable_progress_bars()


@pytest.fixture
def processor():
    return DetectionImageProcessor(size={"shortest_edge": 32, "longest_edge": 60})


@pytest.fixture
def image_folder(tmp_path):
    return write_image_folder(tmp_path / "pets")
