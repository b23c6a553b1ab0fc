"""Tests that a sealed folder tells which of its files has changed."""

from peft_ext import files


def test_a_file_of_a_sealed_folder_that_changes_is_named(tmp_path):
    (tmp_path / "a").write_text("12")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b").write_text("34")
    files.seal(tmp_path)
    assert files.is_sealed(tmp_path) and files.not_whole(tmp_path) is None
    (tmp_path / "c").write_text("new")  # a file that is not in the list
    assert files.not_whole(tmp_path) is None
    for text, wanted in (("35", "sub/b has other content than was written"), ("3", "sub/b has 1 bytes of 2")):
        (tmp_path / "sub/b").write_text(text)
        assert files.not_whole(tmp_path) == wanted
    (tmp_path / "sub/b").unlink()
    assert files.not_whole(tmp_path) == "no sub/b"
