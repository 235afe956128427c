import hashlib
import sys
import types
from dataclasses import replace

import pytest

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.workload import DataConfig
from fisher_lab.workload import text


def file(path, **more):
    return DataConfig(type="text_file", path=str(path), **more)


def test_the_embedded_text_is_the_documentation_of_this_python():
    from pydoc_data import topics

    loaded = text.load(DataConfig())
    assert dict(loaded.documents) == topics.topics
    assert loaded.characters > 400_000
    assert loaded.sha256 == text.load(DataConfig(vocab_size=300)).sha256
    assert len(loaded.sha256) == hashlib.sha256().digest_size * 2


def test_the_hash_is_of_the_content_and_not_of_the_place(tmp_path):
    def write(name, *contents):
        (tmp_path / name).mkdir()
        for number, content in enumerate(contents):
            (tmp_path / name / f"{number}.txt").write_text(content, encoding="utf-8")
        return text.load(file(tmp_path / name)).sha256

    one = write("one", "ab", "c")
    assert write("again", "ab", "c") == one
    assert write("cut elsewhere", "a", "bc") != one
    assert write("edited", "ab", "d") != one


def test_a_file_and_a_directory_with_a_pattern(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first ä\n", encoding="utf-8")
    (tmp_path / "sub" / "c.md").write_text("third\n")
    (tmp_path / "empty.txt").write_text(" \n")
    names = [name for name, _ in text.load(file(tmp_path)).documents]
    assert names == ["a.txt", "b.txt"]
    assert text.load(file(tmp_path, pattern="*.md")).documents == (("sub/c.md", "third\n"),)
    assert text.load(file(tmp_path / "a.txt")).documents == (("a.txt", "first ä\n"),)


def one_line(data):
    with pytest.raises(ConfigError) as caught:
        text.load(data)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_bad_paths_are_named_in_one_line(tmp_path):
    assert one_line(file(tmp_path / "no.txt")) == (
        f"data.path={tmp_path}/no.txt is not allowed: "
        "data.path must be a file or directory that exists"
    )
    (tmp_path / "bad.txt").write_bytes(b"ok\xff\xfe")
    assert "bad.txt is not UTF-8 text (byte 2" in one_line(file(tmp_path / "bad.txt"))
    assert "data.pattern=*.rst" in one_line(file(tmp_path, pattern="*.rst"))
    (tmp_path / "void.txt").write_text("\n\n")
    assert "some text" in one_line(file(tmp_path / "void.txt"))
    assert "data.path=null" in one_line(DataConfig(type="text_file"))


def test_a_data_set_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = one_line(DataConfig(type="hf", path="wikitext"))
    assert "pip install 'fisher-lab[hf]'" in message


class Rows:
    """What the library gives for one split."""

    column_names = ("id", "text")

    def __getitem__(self, column):
        return {"id": [7, 8], "text": ["one", "two"]}[column]


def test_a_data_set_from_disk_and_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, subset, *, split, revision):
        asked.append((path, subset, split, revision))
        if path == "missing":
            raise FileNotFoundError("no such data set\non the hub")
        return Rows()

    library = types.ModuleType("datasets")
    library.load_from_disk = lambda path: {"train": Rows()}  # type: ignore[attr-defined]
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    saved = DataConfig(type="hf", path=str(tmp_path))
    hub = DataConfig(type="hf", path="wikitext", subset="v2", split="test", revision="abc")
    assert [content for _, content in text.load(saved).documents] == ["one", "two"]
    assert text.load(hub).sha256 == text.load(saved).sha256
    assert asked == [("wikitext", "v2", "test", "abc")]
    assert "data.column=body is not allowed" in one_line(replace(hub, column="body"))
    assert "one of id, text" in one_line(replace(hub, column="body"))
    assert "no such data set on the hub" in one_line(replace(hub, path="missing"))
    assert "a directory that exists" in one_line(replace(hub, path="./missing"))


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_the_split_shares_the_text_out_in_full_and_evenly(fraction):
    loaded = text.load(DataConfig())
    train, heldout = text.split(loaded, fraction)
    assert text.split(loaded, fraction) == (train, heldout)
    share = sum(len(p.content) for p in heldout) / loaded.characters
    assert share == pytest.approx(fraction, rel=0.1)
    for index, (_, content) in enumerate(loaded.documents):
        ours = [p.content for p in train + heldout if p.document == index]
        assert sum(map(len, ours)) == len(content)
        assert all(part in content for part in ours)
    long = {i for i, (_, content) in enumerate(loaded.documents) if len(content) > 5e4}
    assert long
    assert long <= {p.document for p in heldout}


def test_a_text_without_line_ends_is_split_as_well(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 2000)
    train, heldout = text.split(text.load(file(tmp_path / "a.txt")), 0.2)
    assert train
    assert heldout
    assert sum(len(p.content) for p in train + heldout) == 10_000
