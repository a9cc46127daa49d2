"""Splits that turn out to be the same pictures."""

import pytest

from hf_querydet.data import check_splits_differ, has_one_split

SPLITS = {"train_split": "train", "eval_split": "validation"}


def touch(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("pets", "pets/metadata.jsonl"),
        ("pets", "pets/instances.json"),
        ("pets.json", "pets.json"),
    ],
)
def test_one_folder_or_json_is_not_two_splits(tmp_path, source, file):
    touch(tmp_path / file)
    expected = f"{source} has one split: 'train' and 'validation' would both be read from"
    with pytest.raises(
        ValueError, match=f"{expected} .*put {{split}} in the path, .*--eval-fraction"
    ):
        check_splits_differ(tmp_path / source, **SPLITS)


def test_folders_below_one_metadata_file_are_two_splits(tmp_path):
    names = ["train/a.jpg", "validation/b.jpg"]
    (tmp_path / "metadata.jsonl").write_text("".join(f'{{"file_name": "{n}"}}\n' for n in names))
    check_splits_differ(tmp_path, **SPLITS)


def test_a_single_folder_has_one_split(tmp_path):
    touch(tmp_path / "one" / "metadata.jsonl", tmp_path / "two" / "train" / "metadata.jsonl")
    touch(tmp_path / "two" / "validation" / "metadata.jsonl")
    assert has_one_split(tmp_path / "one")
    assert not has_one_split(tmp_path / "two")
    assert not has_one_split("someone/pets")


def test_folder_of_another_split_alone_is_not_one_split_for_all(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "test/a.jpg"}')
    assert not has_one_split(tmp_path)
    assert not has_one_split(tmp_path / "{split}.json")


def test_split_within_the_other_is_refused(tmp_path):
    touch(tmp_path / "metadata.jsonl", tmp_path / "holdout" / "metadata.jsonl")
    with pytest.raises(ValueError, match=r"pictures of .*holdout would be read with those of"):
        check_splits_differ(tmp_path, train_split="train", eval_split="holdout")
    with pytest.raises(ValueError, match=r"'holdout' and 'train' would share them"):
        check_splits_differ(tmp_path, train_split="holdout", eval_split="train")


def test_same_name_is_a_choice(tmp_path):
    touch(tmp_path / "instances.json")
    check_splits_differ(tmp_path, train_split="train", eval_split="train")


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("pets", ["pets/train/metadata.jsonl", "pets/validation/metadata.jsonl"]),
        ("pets", ["pets/train/instances.json", "pets/validation/instances.json"]),
        ("{split}.json", ["train.json", "validation.json"]),
        # What neither is, datasets knows the splits of.
        ("pets", ["pets/data.parquet"]),
        ("someone/pets", []),
    ],
)
def test_data_of_their_own_are_two_splits(tmp_path, monkeypatch, source, files):
    monkeypatch.chdir(tmp_path)
    touch(*(tmp_path / file for file in files))
    check_splits_differ(source, **SPLITS)
