import json

import pytest

from hf_querydet.file_writing import JsonArrayWriter, partial_file, partial_path


def test_file_appears_when_the_block_ends(tmp_path):
    with partial_file(tmp_path / "new" / "a.txt") as file:
        file.write("text")
        assert not (tmp_path / "new" / "a.txt").exists()

    assert (tmp_path / "new" / "a.txt").read_text() == "text"
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_failed_block_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "a.txt").write_text("before")

    def fail():
        with partial_path(tmp_path / "a.txt") as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]


@pytest.mark.parametrize("rows", [[], [{"a": 1}], [1, "zwei", [3]]])
def test_rows_written_one_by_one_are_an_array(tmp_path, rows):
    with partial_file(tmp_path / "a.json") as file:
        writer = JsonArrayWriter(file)
        for row in rows:
            writer.add(row)
        writer.close()

    assert json.loads((tmp_path / "a.json").read_text()) == rows
