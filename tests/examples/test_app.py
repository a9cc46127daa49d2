"""The web page in a real browser, Debian's Chromium without a window."""

import io
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import hf_querydet
from hf_querydet import load_detector
from hf_querydet.demo import ShapeScenes, build_detector
from hf_querydet.visualization import record

ROOT = Path(hf_querydet.__file__).parents[1]
SCRIPT = ROOT / "examples" / "app.py"
SECONDS_TO_START, SECONDS_TO_ANSWER = 180, 120
LOW, HIGH = 0.30, 0.40

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """An untrained detector with a few scores above each of the thresholds."""
    torch.manual_seed(0)
    model, processor = build_detector()
    for head in model.model.heads:
        torch.nn.init.normal_(head.class_head.weight, std=0.1)
        torch.nn.init.constant_(head.class_head.bias, -2.9)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A picture file of 160 x 160 pixels."""
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    ShapeScenes(1, seed=7)[0]["image"].save(path)
    return path


@pytest.fixture(scope="module")
def detections(model_directory, scene):
    """What the library finds in the scene, the best first."""
    model, processor = load_detector(model_directory)
    with torch.inference_mode():
        outputs = model.eval()(**processor(Image.open(scene), return_tensors="pt"))
    (found,) = processor.post_process_object_detection(outputs, 0.0, target_sizes=[(160, 160)])
    return found


class Server:
    """The page, served by a process of its own."""

    def __init__(self, script, *options, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--port", str(self.port), *options],
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment},
            cwd=script.parent,
        )

    def __enter__(self):
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server has stopped"
            try:
                with urllib.request.urlopen(self.url, timeout=5):
                    return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise TimeoutError(f"no page after {SECONDS_TO_START} seconds")

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(model_directory, tmp_path_factory):
    uploads = str(tmp_path_factory.mktemp("uploads"))
    with Server(SCRIPT, "--model", str(model_directory), GRADIO_TEMP_DIR=uploads) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,1500"):
        options.add_argument(f"--{option}")
    # Selenium would look for a driver on the network.
    path = shutil.which("chromedriver")
    assert path, "needs chromedriver: apt-get install chromium chromium-driver"
    driver = webdriver.Chrome(options=options, service=Service(path))
    yield driver
    driver.quit()


class Page:
    """What a visitor sees and does."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get(url)
        self.wait_for(lambda: "Upload a picture" in self.message())

    def wait_for(self, condition):
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        # Elements come and go while the page is drawn anew.
        wait = WebDriverWait(
            self.browser, SECONDS_TO_ANSWER, 0.2, ignored_exceptions=[WebDriverException]
        )
        return wait.until(lambda _: condition(), f"the page says {self.message()!r}")

    def find_all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def message(self):
        return " ".join(element.text for element in self.find_all("#message"))

    def wait_for_message(self, part):
        self.wait_for(lambda: part in self.message())

    def upload(self, path):
        for button in self.find_all("#upload button[aria-label=Clear]"):
            button.click()
            self.wait_for_message("Upload a picture")
        self.find_all("#upload input[type=file]")[0].send_keys(str(path))

    def set_threshold(self, threshold):
        (number,) = self.find_all("#threshold input[type=number]")
        self.browser.execute_script("arguments[0].select()", number)
        number.send_keys(f"{threshold:.2f}\n")

    def name_model(self, name):
        (field,) = self.find_all("#model input, #model textarea")
        field.clear()
        field.send_keys(f"{name}\n")

    def rows(self):
        """Cells of the table, without its header."""
        rows = [
            [cell.text for cell in row.find_elements("css selector", "[role=gridcell]")]
            for row in self.find_all("#table [role=row]")
        ]
        return [row for row in rows if row]

    def picture(self, selector="#detections img"):
        """Pixels of a picture on the page."""
        (image,) = self.find_all(selector)
        with urllib.request.urlopen(image.get_attribute("src"), timeout=30) as answer:
            return Image.open(io.BytesIO(answer.read())).convert("RGB")

    def click_picture(self, x, y):
        """Click at a place of the shown picture, in shares of its width and height."""
        from selenium.webdriver import ActionChains

        (image,) = self.find_all("#detections img")
        width, height = image.size["width"], image.size["height"]
        chain = ActionChains(self.browser)
        chain.move_to_element_with_offset(image, (x - 0.5) * width, (y - 0.5) * height)
        chain.click().perform()


@pytest.fixture
def page(browser, server):
    return Page(browser, server.url)


@pytest.fixture
def page_with_boxes(page, scene):
    page.upload(scene)
    page.wait_for_message(f"detections score above {LOW:.2f}")
    return page


def number_above(detections, threshold):
    return int((detections["scores"] > threshold).sum())


def test_page_loads_without_the_network(page, server):
    assert "EfficientDETRForObjectDetection with 4 labels" in page.message()
    names = page.browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert names
    assert [name for name in names if not name.startswith((server.url, "data:", "blob:"))] == []


def test_upload_shows_the_boxes_that_a_pipeline_finds(page_with_boxes, model_directory, scene):
    found = pipeline("object-detection", model=str(model_directory))(str(scene), threshold=LOW)

    page_with_boxes.wait_for(lambda: len(page_with_boxes.rows()) == len(found))
    rows = page_with_boxes.rows()
    assert page_with_boxes.message().startswith(f"{len(found)} of 100 ")
    assert [row[:2] for row in rows] == [[each["label"], f"{each['score']:.2f}"] for each in found]
    corners = [[int(cell) for cell in row[3:]] for row in rows]
    # The pipeline cuts fractions off, the page rounds.
    expected = [list(each["box"].values()) for each in found]
    np.testing.assert_allclose(corners, expected, atol=1)


def test_boxes_are_drawn_into_the_picture(page_with_boxes, scene, detections):
    drawn = page_with_boxes.wait_for(page_with_boxes.picture)

    plain = Image.open(scene).resize(drawn.size, Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(drawn, dtype=int) - np.asarray(plain)).max(-1)
    zoom = drawn.width / 160
    left, top, _, bottom = (detections["boxes"][0] * zoom).round().int().tolist()
    assert (difference[top + 1 : bottom - 1, left + 1] > 30).mean() > 0.9
    # Most of the picture is as it was, up to the losses of its compression.
    assert np.median(difference) < 15


def test_threshold_changes_the_number_of_boxes(page_with_boxes, detections):
    few, many = (number_above(detections, threshold) for threshold in (HIGH, LOW))
    assert 0 < few < many
    before = page_with_boxes.picture()

    page_with_boxes.set_threshold(HIGH)

    page_with_boxes.wait_for_message(f"{few} of 100 detections score above {HIGH:.2f}")
    page_with_boxes.wait_for(lambda: len(page_with_boxes.rows()) == few)
    page_with_boxes.wait_for(lambda: page_with_boxes.picture().tobytes() != before.tobytes())


def test_click_explains_the_query_of_the_box(page_with_boxes, detections):
    left, top, right, bottom = detections["boxes"][2].tolist()

    page_with_boxes.click_picture((left + right) / 320, (top + bottom) / 320)

    page_with_boxes.wait_for_message(f"Query {detections['queries'][2]}: ")
    figure = page_with_boxes.wait_for(lambda: page_with_boxes.picture("#explanation img"))
    assert len(np.unique(np.asarray(figure).reshape(-1, 3), axis=0)) > 100


def test_click_beside_all_boxes_says_so(page_with_boxes, detections):
    boxes = detections["boxes"][: number_above(detections, LOW)]
    assert (boxes[:, :2] > 20).any(1).all()

    page_with_boxes.click_picture(10 / 160, 10 / 160)

    page_with_boxes.wait_for_message("There is no box at this place.")


def test_row_of_the_table_explains_its_query(page_with_boxes):
    page_with_boxes.wait_for(lambda: len(page_with_boxes.rows()) > 1)
    query = page_with_boxes.rows()[1][2]

    page_with_boxes.find_all("#table [role=gridcell][data-row='1']")[0].click()

    page_with_boxes.wait_for_message(f"Query {query}: ")
    page_with_boxes.wait_for(lambda: page_with_boxes.picture("#explanation img"))


def test_file_that_is_no_picture_gets_a_message_and_no_boxes(page_with_boxes, tmp_path):
    (tmp_path / "notes.png").write_text("milk, bread")

    page_with_boxes.upload(tmp_path / "notes.png")

    page_with_boxes.wait_for_message("The picture notes.png cannot be read")
    page_with_boxes.wait_for(lambda: not page_with_boxes.find_all("#detections img"))
    page_with_boxes.wait_for(lambda: not page_with_boxes.rows())


def test_name_without_a_model_gets_a_message_and_the_next_name_works(page, model_directory):
    page.name_model("no/such-model")
    page.wait_for_message("The model 'no/such-model' cannot be loaded")

    page.name_model(model_directory)
    page.wait_for_message("EfficientDETRForObjectDetection with 4 labels")


@pytest.fixture(scope="module")
def app():
    """What the script defines."""
    return runpy.run_path(str(SCRIPT))


def test_smallest_box_around_a_place_is_clicked(app):
    boxes = torch.tensor([[0.0, 0, 9, 9], [2, 2, 6, 6], [3, 1, 9, 4], [3, 3, 5, 5]])
    places = [(4, 4), (3, 4), (1, 8), (8, 2), (9.5, 2)]
    assert [app["box_at"](boxes, *place) for place in places] == [3, 3, 0, 2, None]


def test_threshold_and_click_do_not_run_the_model(app, detections, scene, model_directory):
    model, processor = load_detector(model_directory)
    (recording,) = record(model.eval(), processor, scene)
    model.forward = None  # cannot be called any more

    _, rows, *_ = app["show"](recording, HIGH)
    figure, _ = app["explain_query"](recording, 3)

    assert len(rows) == number_above(detections, HIGH)
    assert figure.width > 100


def test_space_made_of_the_folders_serves_the_page(browser, model_directory, tmp_path):
    space = tmp_path / "space"
    shutil.copytree(ROOT / "examples" / "space", space)
    shutil.copy(SCRIPT, space)
    for folder in ("hf_querydet", "csrc"):
        shutil.copytree(ROOT / folder, space / folder)

    # The folder's own copy of the package comes before an installed one.
    with Server(space / "app.py", HF_QUERYDET_MODEL=str(model_directory), PYTHONPATH="") as running:
        page = Page(browser, running.url)

    assert "EfficientDETRForObjectDetection with 4 labels" in page.message()
