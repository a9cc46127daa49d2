import os

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def pytest_configure():
    """Take the kernels of HF_QUERYDET_TEST_LIBRARY, which `.ci/sanitize` builds."""
    library = os.environ.get("HF_QUERYDET_TEST_LIBRARY")
    if library is not None:
        from hf_querydet.ops import extension

        torch.ops.load_library(library)
        extension._states["cpu"].status = "loaded"
