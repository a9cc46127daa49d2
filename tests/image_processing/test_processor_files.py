"""Settings of image processors in files: ours, and those of several versions of transformers."""

import json

import pytest
from transformers import DetrImageProcessor

from hf_querydet.image_processing_utils import DetectionImageProcessor


def test_saved_processor_comes_back_equal(tmp_path):
    processor = DetectionImageProcessor(
        size={"shortest_edge": 480, "longest_edge": 801},
        pad_size={"height": 801, "width": 802},
        image_mean=[0.1, 0.2, 0.3],
        do_convert_annotations=False,
        resample=3,
    )
    processor.save_pretrained(tmp_path)

    assert DetectionImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_saved_file_names_its_class_and_defaults(tmp_path):
    DetectionImageProcessor().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())

    expected = {
        "image_processor_type": "DetectionImageProcessor",
        "size": {"shortest_edge": 800, "longest_edge": 1333},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "format": "coco_detection",
    }
    assert {name: saved[name] for name in expected} == expected


def test_arguments_of_loading_win(tmp_path):
    DetectionImageProcessor().save_pretrained(tmp_path)
    size = {"shortest_edge": 96, "longest_edge": 160}

    assert DetectionImageProcessor.from_pretrained(tmp_path, size=size).size == size
    limited = DetectionImageProcessor.from_pretrained(tmp_path, max_size=900)
    assert limited.size == {"shortest_edge": 800, "longest_edge": 900}
    limited = DetectionImageProcessor.from_pretrained(tmp_path, size=300, max_size=500)
    assert limited.size == {"shortest_edge": 300, "longest_edge": 500}


# Written by transformers 4.x before image processors had their name.
OLDEST_FILE = {
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "DetrFeatureExtractor",
    "format": "coco_detection",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "max_size": 1300,
    "size": 750,
}
OLDER_FILE = {
    "do_convert_annotations": None,
    "do_pad": None,
    "do_rescale": True,
    "image_processor_type": "DetrImageProcessor",
    "pad_and_return_pixel_mask": False,
    "rescale_factor": 0.00392156862745098,
    "resample": 2,
    "size": {"longest_edge": 1333, "shortest_edge": 640},
}


def load(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    return DetectionImageProcessor.from_pretrained(tmp_path)


def test_oldest_files_give_their_size(tmp_path):
    assert load(tmp_path, OLDEST_FILE).size == {"shortest_edge": 750, "longest_edge": 1300}


def test_old_names_are_not_saved_again(tmp_path):
    processor = load(tmp_path, OLDEST_FILE)

    assert {"max_size", "feature_extractor_type"}.isdisjoint(processor.to_dict())


def test_older_files_give_their_settings(tmp_path):
    processor = load(tmp_path, OLDER_FILE)

    assert processor.size == {"shortest_edge": 640, "longest_edge": 1333}
    assert processor.do_pad is False
    assert processor.do_convert_annotations is True


def test_old_name_of_padding_yields_to_the_new_one(tmp_path):
    assert load(tmp_path, {**OLDER_FILE, "do_pad": True}).do_pad is True


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"size": 750}, {"shortest_edge": 750, "longest_edge": 1333}),
        ({"max_size": 1000}, {"shortest_edge": 800, "longest_edge": 1000}),
        (
            {"size": {"shortest_edge": 600}, "max_size": 1000},
            {"shortest_edge": 600, "longest_edge": 1000},
        ),
        (
            {"size": {"shortest_edge": 600, "longest_edge": 900}, "max_size": 1000},
            {"shortest_edge": 600, "longest_edge": 900},
        ),
        ({"size": {"height": 5, "width": 7}, "max_size": 9}, {"height": 5, "width": 7}),
    ],
)
def test_size_and_max_size_join(content, expected):
    assert DetectionImageProcessor(**content).size == expected


def test_file_of_transformers_loads_with_its_settings(tmp_path):
    DetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(tmp_path)

    theirs, ours = (
        kind.from_pretrained(tmp_path) for kind in (DetrImageProcessor, DetectionImageProcessor)
    )

    shared = set(theirs.to_dict()) & set(ours.to_dict()) - {"image_processor_type"}
    assert {name: theirs.to_dict()[name] for name in shared} == {
        name: ours.to_dict()[name] for name in shared
    }
