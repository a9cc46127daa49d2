import json

import pytest
from pycocotools.coco import COCO

from hf_querydet.inference import FileDetections, result_writer

ID2LABEL = {0: "dog", 1: "ant", 5: "cat"}
BOXES = ((1.234567, 2, 30, 25.5), (0, 0, 8, 9))
RESULTS = [
    FileDetections("a.png", 40, 30, (0.987654321, 0.5), (5, 0), BOXES),
    FileDetections("sub/a.png", 64, 48),
    FileDetections("b.png", 20, 10, (0.25,), (1,), ((-3.5, 1.0, 21.0, 9.0),)),
]


def write(output_format, folder, results=RESULTS):
    with result_writer(output_format, folder, ID2LABEL) as add:
        for result in results:
            add(result)


def test_json_has_a_line_per_picture(tmp_path):
    write("json", tmp_path / "new" / "out")

    lines = (tmp_path / "new" / "out" / "detections.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "file_name": "a.png",
            "width": 40,
            "height": 30,
            "detections": [
                {"label": "cat", "score": 0.98765, "box": [1.23, 2, 30, 25.5]},
                {"label": "dog", "score": 0.5, "box": [0, 0, 8, 9]},
            ],
        },
        {"file_name": "sub/a.png", "width": 64, "height": 48, "detections": []},
        {
            "file_name": "b.png",
            "width": 20,
            "height": 10,
            "detections": [{"label": "ant", "score": 0.25, "box": [-3.5, 1.0, 21.0, 9.0]}],
        },
    ]


def test_coco_files_are_read_by_pycocotools(tmp_path, capsys):
    write("coco", tmp_path)

    images = COCO(str(tmp_path / "images.json"))
    loaded = images.loadRes(str(tmp_path / "detections.json"))

    assert loaded.imgs == {
        1: {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
        2: {"id": 2, "file_name": "sub/a.png", "width": 64, "height": 48},
        3: {"id": 3, "file_name": "b.png", "width": 20, "height": 10},
    }
    assert {each["id"]: each["name"] for each in loaded.cats.values()} == ID2LABEL
    found = [
        (each["image_id"], each["category_id"], each["bbox"], each["score"])
        for each in loaded.anns.values()
    ]
    assert found == [
        (1, 5, [1.23, 2, 28.77, 23.5], 0.98765),
        (1, 0, [0, 0, 8, 9], 0.5),
        (3, 1, [-3.5, 1.0, 24.5, 8.0], 0.25),
    ]


def test_nothing_found_is_valid_json(tmp_path):
    write("coco", tmp_path, results=[])

    assert json.loads((tmp_path / "detections.json").read_text()) == []
    assert json.loads((tmp_path / "images.json").read_text())["images"] == []


@pytest.mark.parametrize("output_format", ["json", "coco"])
def test_interrupted_writing_leaves_earlier_results_as_they_were(tmp_path, output_format):
    write(output_format, tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def interrupted():
        yield RESULTS[2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(output_format, tmp_path, interrupted())

    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_unknown_format_is_named(tmp_path):
    with pytest.raises(ValueError, match="output_format must be one of json, coco, got 'xml'"):
        result_writer("xml", tmp_path, ID2LABEL)
