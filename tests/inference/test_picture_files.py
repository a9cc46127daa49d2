import os

import pytest

from hf_querydet.inference import PictureFile, list_pictures


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    for name in ("b.png", "a.JPG", "c.txt", ".hidden.png", "c/a.png", "b/z.tiff", "b/d/x.webp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / ".cache").mkdir()
    (root / ".cache" / "y.png").touch()
    return root


def names(*args, **kwargs):
    return [file.name for file in list_pictures(*args, **kwargs)]


def test_pictures_are_listed_by_name_the_files_of_a_folder_first(folder):
    assert names(folder) == ["a.JPG", "b.png", "b/z.tiff", "b/d/x.webp", "c/a.png"]


def test_file_is_where_its_name_says(folder):
    assert all(file.path == folder / file.name for file in list_pictures(folder))


def test_excluded_folder_is_left_out(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert names(".", exclude=folder / "b") == ["a.JPG", "b.png", "c/a.png"]


def test_folder_itself_is_never_excluded(folder):
    assert names(folder, exclude=folder) == names(folder)


def test_link_to_a_folder_is_not_followed(folder):
    os.symlink(folder, folder / "c" / "loop.png")
    assert names(folder) == [*names(folder, exclude=folder / "c"), "c/a.png"]


def test_one_picture_may_have_any_extension(tmp_path):
    (tmp_path / "scan.picture").touch()
    assert list(list_pictures(tmp_path / "scan.picture")) == [
        PictureFile(tmp_path / "scan.picture", "scan.picture")
    ]


def test_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; name a picture or a fol"):
        list_pictures(tmp_path / "nowhere")


def test_only_one_folder_is_read_at_a_time(folder, monkeypatch):
    read = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: read.append(path) or scandir(path))

    next(list_pictures(folder))

    assert read == [folder]
