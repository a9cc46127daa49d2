"""A web page: what a detector finds in a picture, and why.

    pip install '.[demo]'
    python examples/app.py --model demo

Upload a picture, move the threshold, click a box. The model runs once per picture: thresholds and
clicks only choose among what was recorded then.
"""

import argparse
import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

# Read by gradio when it is imported, which would report its use over the network.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from hf_querydet.inference import load_for_inference
from hf_querydet.visualization import PictureRecording, draw_detections, record

DEFAULT_MODEL = "facebook/detr-resnet-50"
FIRST_THRESHOLD = 0.3
LONGEST_SIDE = 1600  # of what is sent to the browser, pixels
LARGEST_UPLOAD = "30mb"
SECONDS_KEPT = 3600  # uploads, and what was recorded of them
EXPIRED = "This picture is no longer kept; upload it again."
# What the library raises on purpose, and torch for weights that do not fit a configuration.
ERRORS = (OSError, ValueError, ImportError, RuntimeError)
# All that runs the model queues up together: it is one model on one machine.
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}
# Without the label, which would lie on the picture, and the button that would upload it elsewhere.
STATIC_IMAGE = {
    "interactive": False,
    "show_label": False,
    "buttons": ["download", "fullscreen"],
}
COLUMNS = ["label", "score", "query", "left", "top", "right", "bottom"]
INTRODUCTION = """# Query-based object detection
Upload a picture, move the threshold, and click a box (or its row) to see why its query fired."""
CSS = """
#detections img { cursor: crosshair; }
#message { min-height: 1.5em; }
"""


@lru_cache(maxsize=1)
def load(model_name: str) -> tuple[Any, Any]:
    """A detector and its image processor; the last one stays in memory."""
    if not model_name:
        raise ValueError("Name a model: a directory, or an id on the Hub.")
    return load_for_inference(model_name)


def analyse(path: str | None, model_name: str, threshold: float) -> tuple[Any, ...]:
    """Load the model and, if there is an upload, run it once.

    Returns:
        What was recorded, or None, and what the page shows of it, see :func:`show`.
    """
    try:
        model, processor = load(model_name.strip())
    except ERRORS as error:
        return None, *_nothing(f"**The model {model_name!r} cannot be loaded.** {error}")
    if path is None:
        kind, num_labels = type(model).__name__, model.config.num_labels
        return None, *_nothing(f"{kind} with {num_labels} labels. Upload a picture.")
    try:
        (recording,) = record(model, processor, path)
    except ERRORS as error:
        # Visitors know the name of their file, not where it lies here.
        text = str(error).replace(path, Path(path).name)
        return None, *_nothing(f"**Nothing can be detected.** {text}")
    return recording, *show(recording, threshold)


def above(recording: PictureRecording, threshold: float) -> dict[str, Tensor]:
    """The detections with a score above the threshold, the best first."""
    keep = recording.detections["scores"] > threshold
    return {name: values[keep] for name, values in recording.detections.items()}


def show(recording: PictureRecording | None, threshold: float) -> tuple[Any, ...]:
    """What the page shows at a threshold; the model does not run.

    Returns:
        The picture with boxes, rows of the table, a line of text, and no explanation.
    """
    if recording is None:
        return (gr.skip(),) * 4
    found = above(recording, threshold)
    drawn = draw_detections(recording.picture, found, id2label=recording.id2label)
    drawn.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    columns = (found[name].tolist() for name in ("labels", "scores", "queries", "boxes"))
    rows = [
        [recording.id2label[label], f"{score:.2f}", query, *(round(side) for side in box)]
        for label, score, query, box in zip(*columns, strict=True)
    ]
    num_all = len(recording.detections["scores"])
    return drawn, rows, f"{len(rows)} of {num_all} detections score above {threshold:.2f}.", None


def box_at(boxes: Tensor, x: float, y: float) -> int | None:
    """Index of the smallest of boxes (n, 4), xyxy, that holds a point; None if none does."""
    left, top, right, bottom = boxes.unbind(1)
    holds = (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
    if not holds.any():
        return None
    areas = (right - left) * (bottom - top)
    return int(areas.masked_fill(~holds, torch.inf).argmin())


def explain_click(
    recording: PictureRecording | None, threshold: float, shown: Image.Image, event: gr.SelectData
) -> tuple[Any, str]:
    """The figure about the smallest box at the pixel of the shown picture that was clicked."""
    if recording is None:
        return gr.skip(), EXPIRED
    zoom = shown.width / recording.picture.width
    # The middle of the pixel.
    x, y = ((side + 0.5) / zoom for side in event.index)
    found = above(recording, threshold)
    index = box_at(found["boxes"], x, y)
    if index is None:
        return gr.skip(), "There is no box at this place."
    return explain_query(recording, int(found["queries"][index]))


def explain_row(recording: PictureRecording | None, event: gr.SelectData) -> tuple[Any, str]:
    """The figure about the box in the row of the table that was clicked."""
    if recording is None:
        return gr.skip(), EXPIRED
    return explain_query(recording, int(event.row_value[COLUMNS.index("query")]))


def explain_query(recording: PictureRecording, query: int) -> tuple[Image.Image, str]:
    """The figure about one query, and a line of text."""
    explanation = recording.explain(query)
    buffer = io.BytesIO()
    explanation.figure().savefig(buffer, format="png")
    last = explanation.layers[-1]
    return Image.open(buffer), f"Query {query}: {last.label} with score {last.score:.2f}."


def build_page(model_name: str) -> gr.Blocks:
    """The page, with the model that it begins with."""
    with gr.Blocks(
        title="Query-based object detection",
        analytics_enabled=False,
        delete_cache=(SECONDS_KEPT, SECONDS_KEPT),
    ) as page:
        recording = gr.State(time_to_live=SECONDS_KEPT)
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=2):
                model = gr.Textbox(
                    model_name,
                    label="Model",
                    info="A directory or a Hub id",
                    submit_btn="Load",
                    elem_id="model",
                )
                upload = gr.File(label="Picture", height=140, elem_id="upload")
                slider = gr.Slider(
                    0.01, 0.99, FIRST_THRESHOLD, step=0.01, label="Threshold", elem_id="threshold"
                )
                message = gr.Markdown(elem_id="message")
            with gr.Column(scale=3):
                shown = gr.Image(
                    label="Detections", type="pil", elem_id="detections", **STATIC_IMAGE
                )
        gr.Markdown("### Why it fired")
        figure = gr.Image(label="Why it fired", format="png", elem_id="explanation", **STATIC_IMAGE)
        table = gr.Dataframe(
            headers=COLUMNS, label="Detections", interactive=False, max_height=300, elem_id="table"
        )

        results = [shown, table, message, figure]
        analysing = {
            "fn": analyse,
            "inputs": [upload, model, slider],
            "outputs": [recording, *results],
            **ONE_AT_A_TIME,
        }
        page.load(**analysing)
        gr.on([upload.change, model.submit], **analysing)
        slider.change(
            show, [recording, slider], results, trigger_mode="always_last", show_progress="hidden"
        )
        explained = [figure, message]
        shown.select(explain_click, [recording, slider, shown], explained)
        table.select(explain_row, [recording], explained)
    return page


def _nothing(message: str) -> tuple[Any, ...]:
    """What :func:`show` returns where there is only something to say."""
    return None, None, message, None


def main() -> None:
    """Read the options and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        default=os.environ.get("HF_QUERYDET_MODEL", DEFAULT_MODEL),
        help=f"directory or Hub id; by default what HF_QUERYDET_MODEL names, else {DEFAULT_MODEL}",
    )
    parser.add_argument("--host", help="address to listen on, by default this machine alone")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    options = parser.parse_args()
    build_page(options.model).launch(
        server_name=options.host,
        server_port=options.port,
        max_file_size=LARGEST_UPLOAD,
        css=CSS,
        footer_links=[],
    )


if __name__ == "__main__":
    main()
