"""Files of token ids, tokenizers, and what all ranks find in the run folder."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from shardgrad.train import corpus, data, tokenizer
from shardgrad.train.config import Data
from shardgrad.train.data import DataError
from shardgrad.train.tokens import check_ids

TEXT = "".join(f"Zeile {i}: größer als {i * i}, kleiner als {i**3}.\n" for i in range(400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.mark.parametrize("kind", ["uint16", "uint32", "npy"])
def test_a_file_of_tokens(tmp_path: Path, kind: str) -> None:
    ids = np.arange(1000) * 61 % 65536
    path = tmp_path / ("ids.npy" if kind == "npy" else "ids.bin")
    if kind == "npy":
        np.save(path, ids)  # int64
    else:
        ids.astype(f"<{kind[0]}{int(kind[4:]) // 8}").tofile(path)
    config = Data(tokens=str(path), tokens_dtype="uint32" if kind == "uint32" else "uint16", vocab=65536, held_out=0.25)
    corpus.check_tokens(config)
    found = corpus.open_corpus(config, 8)
    assert found.tokenizer is None
    assert (found.text.vocab, found.text.unit) == (65536, "token")
    assert found.text.train.tolist() == ids[:750].tolist()
    assert found.text.held_out.tolist() == ids[750:].tolist()
    assert isinstance(found.text.train, np.memmap)
    x, y = data.batch(found.text, 3, 5, 4, 8)
    assert ((x[:, 1:] - x[:, :-1]) % 65536 == 61).all()
    assert (x[:, 1:] == y[:, :-1]).all()


def test_a_long_file_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "ids.bin"
    with path.open("wb") as file:
        file.truncate(2**28)  # zeros that take no room on the disk; 2**27 ids
    tracemalloc.start()
    config = Data(tokens=str(path), vocab=7)
    text = corpus.open_corpus(config, 1024).text
    assert len(text.train) + len(text.held_out) == 2**27
    digest = text.digest
    data.batch(text, 0, 0, 16, 1024)
    next(data.held_out(text, 16, 1024))
    check_ids(text.held_out, 7, path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**24  # bytes
    with path.open("r+b") as file:
        file.seek(2**28 - 2)
        file.write(b"\1")
    assert corpus.open_corpus(config, 1024).text.digest != digest


def test_an_id_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    ids = np.zeros(2**22 + 100, dtype="<u2")
    ids[2**22 + 41] = 512
    ids[2**22 + 50] = 600
    ids.tofile(tmp_path / "ids.bin")
    config = {"tokens": str(tmp_path / "ids.bin")}
    corpus.check_tokens(Data(vocab=601, **config))
    for vocab in (512, 300):
        with pytest.raises(DataError) as error:
            corpus.check_tokens(Data(vocab=vocab, **config))
        assert str(error.value) == (
            f"data.tokens: {tmp_path / 'ids.bin'} holds the id 512 at position {2**22 + 41}; with data.vocab = {vocab} "
            f"ids are 0 to {vocab - 1}"
        )
    with pytest.raises(DataError, match="holds the id -1 at position 2"):
        check_ids(np.array([0, 1, -1]), 5, "some.npy")


def test_files_that_are_no_tokens(tmp_path: Path) -> None:
    (tmp_path / "empty.bin").touch()
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "floats.npy", np.ones(100))
    np.save(tmp_path / "rows.npy", np.ones((3, 4), dtype=int))
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    (tmp_path / "short.bin").write_bytes(bytes(18))
    for name, told in (
        ("none.bin", "cannot read .*: No such file or directory"),
        ("", "cannot read .*: it is a directory"),
        ("empty.bin", "is empty"),
        ("odd.bin", "has 3 bytes, no multiple of the 2 of data.tokens_dtype = uint16"),
        ("empty.npy", "cannot read .* as a .npy file: No data left in file"),
        ("text.npy", "cannot read .* as a .npy file"),
        ("objects.npy", "cannot read .* as a .npy file"),
        ("floats.npy", r"must hold one row of integers, not float64 \[100\]"),
        ("rows.npy", r"must hold one row of integers, not int64 \[3, 4\]"),
        ("short.bin", "too little text: of 9 tokens, data.held_out = 0.5 leaves [45] for the training part"),
    ):
        with pytest.raises(DataError, match=told):
            corpus.open_corpus(Data(tokens=str(tmp_path / name), vocab=9, held_out=0.5), 8)
    with pytest.raises(DataError, match="of 0 bytes"):
        corpus.open_corpus(Data(files=[str(tmp_path / "empty.bin")]), 8)


def test_the_rows_of_a_batch() -> None:
    text = data.part(bytes(i % 251 for i in range(5000)), 0.1, 16)
    ids, targets = data.batch(text, 7, 3, 5, 16)
    for rows in (slice(0, 2), slice(2, 5), slice(1, 1)):
        some = data.batch(text, 7, 3, 5, 16, rows)
        assert (some[0] == ids[rows]).all()
        assert (some[1] == targets[rows]).all()
        assert some[0].shape == ids[rows].shape


def test_a_vocabulary_is_trained_once_and_found_again(text: Path, tmp_path: Path) -> None:
    config = Data(files=[str(text)], tokenizer="bpe", vocab=300, held_out=0.2)
    encoded = corpus.encode(config, 8, None, None)
    assert encoded.vocabulary.vocab == 300
    again = corpus.encode(config, 8, None, None)
    assert again.vocabulary.json == encoded.vocabulary.json
    corpus.write(encoded, tmp_path)
    found = corpus.open_corpus(config, 8, tmp_path)
    assert isinstance(found.text.train, np.memmap)
    assert found.text.train.dtype == np.uint16
    assert found.tokenizer is not None
    parts = [found.tokenizer.decode(some.tolist()) for some in (found.text.train, found.text.held_out)]
    assert "".join(parts) == TEXT  # nothing is lost where the text is cut
    assert len(parts[1].encode()) == pytest.approx(0.2 * len(TEXT.encode()), abs=4)
    assert len(found.text.train) < 0.7 * len(parts[0])  # pairs have been joined
    # Gone on with: neither trained nor encoded again, unless the text is another one.
    kept = corpus.encode(config, 8, tmp_path, tmp_path / corpus.TOKENIZER)
    assert kept.ids is None
    assert kept.vocabulary.json == encoded.vocabulary.json
    text.write_text(TEXT.replace("Zeile", "Reihe"))
    other = corpus.encode(config, 8, tmp_path, tmp_path / corpus.TOKENIZER)
    assert other.ids is not None
    assert other.vocabulary.json == encoded.vocabulary.json
    corpus.write(other, tmp_path)
    assert corpus.open_corpus(config, 8, tmp_path).text.digest != found.text.digest


def test_a_text_is_encoded_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer.train(TEXT, 300)
    whole = words.encode_all(TEXT)
    assert words.decode(whole.tolist()) == TEXT
    monkeypatch.setattr(tokenizer, "_CHUNK", 50)
    assert words.decode(words.encode_all(TEXT).tolist()) == TEXT
    assert words.decode(words.encode_all("no line ends here " * 40).tolist()) == "no line ends here " * 40
    assert words.encode_all("").tolist() == []


def test_a_vocabulary_of_ones_own(text: Path, tmp_path: Path) -> None:
    words = tokenizer.train(TEXT, 280)
    (tmp_path / "words.json").write_text(words.json)
    config = Data(files=[str(text)], tokenizer=str(tmp_path / "words.json"))
    encoded = corpus.encode(config, 8, None, None)
    assert encoded.vocabulary.json == words.json
    ids = words.encode_all(TEXT)
    np.save(tmp_path / "ids.npy", ids)
    found = corpus.open_corpus(Data(tokens=str(tmp_path / "ids.npy"), vocab=280, tokenizer=config.tokenizer), 8)
    assert found.tokenizer is not None
    assert found.tokenizer.decode(found.text.train.tolist()) == TEXT[: len(words.decode(found.text.train.tolist()))]
    with pytest.raises(DataError, match=r"words.json has 280 tokens, more than data.vocab = 279"):
        corpus.open_corpus(Data(tokens=str(tmp_path / "ids.npy"), vocab=279, tokenizer=config.tokenizer), 8)
    for path, told in ((tmp_path / "no.json", "cannot read"), (text, "is no file of the tokenizers library")):
        with pytest.raises(DataError, match=f"data.tokenizer: .*{re.escape(path.name)}.*|{told}"):
            tokenizer.load(path)


def test_bytes() -> None:
    assert tokenizer.Bytes().encode("ö") == [0xC3, 0xB6]
    assert tokenizer.Bytes().decode([0xC3, 0xB6, 0xFF]) == "ö\ufffd"
