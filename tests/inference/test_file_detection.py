import pytest
from saved_detector import build_detector
from tiny import picture

from hf_querydet.inference import PictureFile, detect, detect_in_files, file_detection

SIZES = [(61, 43), (38, 57), (75, 31), (52, 49), (33, 80)]
BAD = 2


@pytest.fixture(scope="module")
def detector():
    return build_detector()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(len(SIZES))]
    for number, (path, size) in enumerate(zip(paths, SIZES, strict=True)):
        picture(*size, seed=number).save(path)
    paths[BAD].write_bytes(paths[BAD].read_bytes()[:700])
    return [PictureFile(path, path.name) for path in paths]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_file_is_reported_among_the_others(detector, files, num_workers):
    results = list(
        detect_in_files(*detector, files, batch_size=3, threshold=0.57, num_workers=num_workers)
    )

    assert [result.name for result in results] == [file.name for file in files]
    assert [bool(result.error) for result in results] == [number == BAD for number in range(5)]
    assert "2.png cannot be read" in results[BAD].error
    # The bad one leaves its batch smaller; the others stay where they were.
    first, second = [files[0].path, files[1].path], [files[3].path, files[4].path]
    expected = [
        *detect(*detector, first, threshold=0.57),
        *detect(*detector, second, threshold=0.57),
    ]
    readable = [result for result in results if not result.error]
    for result, found in zip(readable, expected, strict=True):
        assert list(result.scores) == found["scores"].tolist()
        assert list(result.labels) == found["labels"].tolist()
        assert [list(box) for box in result.boxes_xyxy] == found["boxes"].tolist()
    sizes = [(result.width, result.height) for result in readable]
    assert sizes == [size for number, size in enumerate(SIZES) if number != BAD]


def test_batch_of_bad_files_only_does_not_reach_the_model(files):
    results = list(detect_in_files(None, build_detector()[1], [files[BAD]], batch_size=1))

    assert [bool(result.error) for result in results] == [True]


def test_every_picture_is_handed_on_with_its_detections(detector, files):
    seen = []

    def note(file, pixels, detections):
        seen.append((file.name, tuple(pixels.shape), detections["scores"].tolist()))

    results = list(detect_in_files(*detector, files, threshold=0.57, on_detected=[note, note]))

    expected = [
        (result.name, (3, result.height, result.width), list(result.scores))
        for result in results
        if not result.error
        for _ in range(2)
    ]
    assert seen == expected


def test_no_more_files_are_opened_than_a_batch_holds(detector, files, monkeypatch):
    opened = []
    read = file_detection.read_for
    monkeypatch.setattr(
        file_detection, "read_for", lambda *args: opened.append(args) or read(*args)
    )
    names = (files[0] for _ in range(10_000))
    results = detect_in_files(*detector, names, batch_size=4)

    for _ in range(6):
        next(results)

    assert len(opened) == 8
