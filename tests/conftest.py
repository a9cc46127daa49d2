"""Settings of every test: no network, one seed, a device that can be chosen."""

import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from hub_server import HubServer

# Read by the hub clients when they are imported, so it comes before all else. What is cached on
# this machine must not decide a test.
CACHE = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Of the processes that tests start; the tensors are tiny, more threads only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests with the fixture `device` run")


def pytest_configure(config):
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # As for the processes above.
    torch.set_num_threads(1)
    _use_given_kernels()


def _use_given_kernels():
    """Take the kernels of HF_QUERYDET_TEST_LIBRARY, which `.ci/sanitize` builds."""
    library = os.environ.get("HF_QUERYDET_TEST_LIBRARY")
    if library is not None:
        from hf_querydet.ops import extension

        torch.ops.load_library(library)
        extension._states["cpu"].status = "loaded"


def pytest_unconfigure():
    CACHE.cleanup()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch sees none"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def hub():
    """A Hub on this machine, for processes that are started with its `environment`."""
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory):
    """Calls functions, those of hub_client.py, in one process that knows the local Hub."""
    import hub_client

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in hub.environment(tmp_path_factory.mktemp("home")).items():
                patch.setenv(name, value)
            # Trainer switches the bars while it pushes; with this set, that is a warning.
            patch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
            pool.submit(hub_client.start).result()
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
