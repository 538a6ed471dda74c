"""Tokenisation: every input format gives the same corpus, any number of processes the same bytes, and bad input one line and no file."""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.processes import processes_of
from tools import tokenize_corpus
from zaya.config import DataConfig
from zaya.data import corpus_writer, stdlib_corpus
from zaya.data.corpus import Corpus
from zaya.data.loader import Loader
from zaya.data.tokenizer import end_token_id, load_tokenizer, train_bpe, vocabulary_size

VOCAB = 300
TEXTS = ["def f(x):\n    return x + 1\n", "Grüße, 世界! 🎉", "a", "", "x = <|endoftext|> y\n" * 20, "def f(y):\n    return y\n" * 300]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(iter(TEXTS), VOCAB).save(str(path))
    return path


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def run(*arguments: object) -> int:
    try:
        return tokenize_corpus.main([str(a) for a in arguments])
    except SystemExit as ended:  # argparse's own way out
        assert isinstance(ended.code, int)
        return ended.code


def documents_of(prefix: Path, vocab_size: int = VOCAB) -> list[list[int]]:
    corpus = Corpus(str(prefix), vocab_size)
    tokens, starts = corpus.tokens(0, corpus.num_tokens), corpus.starts(0, corpus.num_tokens)
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(starts)[1:])]


def write_text_directory(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    for i, text in enumerate(TEXTS[:-1]):
        (path / f"{i}.txt").write_text(text, encoding="utf-8")
    (path / "sub" / "last.py").write_text(TEXTS[-1])
    (path / ".hidden").write_text("not read")
    (path / "sub" / ".git").mkdir()
    (path / "sub" / ".git" / "config").write_text("not read either")
    return path


def write_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS}), path, row_group_size=2)
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "directory": lambda p: write_text_directory(p / "d"),
    "jsonl": lambda p: write_file(p / "d.jsonl", jsonl(TEXTS)),
    "blank lines": lambda p: write_file(p / "d.json", jsonl(TEXTS).replace(b"\n", b"\r\n\n")),
    "gz": lambda p: write_file(p / "d.jsonl.gz", gzip.compress(jsonl(TEXTS[:2])) + gzip.compress(jsonl(TEXTS[2:]))),
    "zst": lambda p: write_file(p / "d.jsonl.zst", zstandard.compress(jsonl(TEXTS[:2])) + zstandard.compress(jsonl(TEXTS[2:]))),
    "parquet": lambda p: write_parquet(p / "d.parquet"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_and_what_is_stored(tmp_path: Path, tokenizer: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each document is the ids of its text and then the end token; empty ones are left out."""
    source = FORMATS[kind](tmp_path)
    (tmp_path / "out").mkdir()
    assert run(source, "--output", tmp_path / "out" / "c", "--tokenizer", tokenizer, "--workers", 1) == 0
    library = Tokenizer.from_file(str(tokenizer))
    expected = [library.encode(text).ids + [0] for text in TEXTS if text]
    assert documents_of(tmp_path / "out" / "c") == expected
    assert [library.decode(ids[:-1], skip_special_tokens=False) for ids in expected] == [text for text in TEXTS if text]
    assert f"5 documents, {sum(map(len, expected))} tokens (1 empty ones left out)" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"c.bin", "c.idx"}


def test_a_link_is_its_file_and_a_hard_link_a_file_of_its_own(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (tmp_path / "d", "--output", tmp_path / "c", "--tokenizer", tokenizer, "--workers", 1)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/hard.txt").hardlink_to(write_file(tmp_path / "d/a.txt", b"a"))
    assert run(*command) == 0 and len(documents_of(tmp_path / "c")) == 2
    (tmp_path / "d/soft.txt").symlink_to("a.txt")
    assert run(*command, "--overwrite") == 2
    assert f"input {tmp_path}/d/soft.txt is named twice ({tmp_path}/d/a.txt is the same file)" in capsys.readouterr().err


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_writer, "_PORTION_CHARS", 100)  # many portions, more than wait at once
    source = write_file(tmp_path / "d.jsonl", jsonl([f"{text} {i}" for i in range(40) for text in TEXTS[:3]]))
    for workers in (1, 2):
        assert run(source, "--output", tmp_path / f"c{workers}", "--tokenizer", tokenizer, "--workers", workers) == 0
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"c1.{suffix}").read_bytes() == (tmp_path / f"c2.{suffix}").read_bytes()
    assert len(documents_of(tmp_path / "c2")) == 120


def test_an_error_behind_running_processes_leaves_nothing(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_writer, "_PORTION_CHARS", 100)
    source = write_file(tmp_path / "d.jsonl", jsonl(TEXTS * 20) + b"{\n")
    assert run(source, "--output", tmp_path / "c", "--tokenizer", tokenizer, "--workers", 2) == 2
    assert "line 121: not valid JSON" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


def test_train_bpe_makes_exactly_the_vocabulary(tmp_path: Path) -> None:
    """Two runs give the same bytes in all three files; the tokenizer is usable as it stands."""
    source = write_text_directory(tmp_path / "d")
    for name in ("a", "b"):
        assert run(source, "--output", tmp_path / name, "--tokenizer", tmp_path / f"{name}.json", "--train-bpe", 300, "--workers", 1) == 0
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    made = load_tokenizer(tmp_path / "a.json")
    assert vocabulary_size(made) == made.get_vocab_size() == 300
    assert made.token_to_id("<|endoftext|>") == end_token_id(made) == 0
    assert made.decode(made.encode(TEXTS[1]).ids) == TEXTS[1]
    assert len(made.encode(TEXTS[-1]).ids) < len(TEXTS[-1]) / 2, "merges are learnt"


def test_special_tokens_inside_text(tmp_path: Path, tokenizer: Path) -> None:
    source = write_file(tmp_path / "d.txt", b"a <|endoftext|> b")
    assert run(source, "--output", tmp_path / "parsed", "--tokenizer", tokenizer, "--workers", 1) == 0
    assert run(source, "--output", tmp_path / "plain", "--tokenizer", tokenizer, "--workers", 1, "--plain-text") == 0
    parsed, plain = documents_of(tmp_path / "parsed"), documents_of(tmp_path / "plain")
    assert len(parsed) == len(plain) == 1, "an end token inside a document is no border"
    assert [ids.count(0) for ids in (*parsed, *plain)] == [2, 1]
    assert Tokenizer.from_file(str(tokenizer)).decode(plain[0][:-1]) == "a <|endoftext|> b"


def word_tokenizer(path: Path, size: int, extra: tuple[str, ...] = ("</s>",)) -> Tokenizer:
    words = [*(f"w{i}" for i in range(size - len(extra))), *extra]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(path))
    return made


@pytest.mark.parametrize(("size", "dtype"), [(65499, np.uint16), (70000, np.int32)])
def test_width_of_the_stored_ids(tmp_path: Path, size: int, dtype: type[np.integer]) -> None:
    word_tokenizer(tmp_path / "t.json", size)
    write_file(tmp_path / "d.txt", f"w1 w{size - 2}".encode())
    assert run(tmp_path / "d.txt", "--output", tmp_path / "c", "--tokenizer", tmp_path / "t.json", "--workers", 1) == 0
    assert np.fromfile(tmp_path / "c.bin", dtype).tolist() == [1, size - 2, size - 1]


def test_templates_truncation_and_padding_of_a_tokenizer(tmp_path: Path) -> None:
    """What the tokenizer's template adds is kept, its end token is not doubled, its cut and its padding are ignored."""
    made = word_tokenizer(tmp_path / "t.json", 20, ("<s>", "</s>"))
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 18), ("</s>", 19)])
    made.enable_truncation(4)
    made.enable_padding(length=8, pad_id=7)
    made.save(str(tmp_path / "t.json"))
    write_file(tmp_path / "d.jsonl", jsonl(["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w1", ""]))
    assert run(tmp_path / "d.jsonl", "--output", tmp_path / "c", "--tokenizer", tmp_path / "t.json", "--workers", 1) == 0
    assert documents_of(tmp_path / "c", 20) == [[18, 1, 2, 3, 4, 5, 6, 7, 8, 9, 19], [18, 1, 19]]


def test_end_token_is_detected_or_named(tmp_path: Path) -> None:
    assert end_token_id(word_tokenizer(tmp_path / "t.json", 9, ("<end_of_turn>", "<eos>"))) == 8, "a document ends, not a turn"
    both = word_tokenizer(tmp_path / "t.json", 9, ("<end_of_turn>", "<eos>"))
    assert end_token_id(both, "<end_of_turn>") == 7
    with pytest.raises(ValueError, match="has no token '<stop>'"):
        end_token_id(both, "<stop>")
    with pytest.raises(ValueError, match="name the one that ends a document with --end-token"):
        end_token_id(word_tokenizer(tmp_path / "t.json", 9, ()))


def test_overwrite_only_when_asked(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_file(tmp_path / "1.txt", b"a"), write_file(tmp_path / "2.txt", b"b b b")
    command = ("--output", tmp_path / "c", "--tokenizer", tokenizer, "--workers", 1)
    assert run(one, *command) == 0
    before = (tmp_path / "c.bin").read_bytes()
    assert run(two, *command) == 2
    assert "c.bin exists; remove it, name another one or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "c.bin").read_bytes() == before
    assert run(two, *command, "--overwrite") == 0
    assert len(documents_of(tmp_path / "c")[0]) > len(before) // 2


GZ, ZST = gzip.compress(jsonl(TEXTS)), zstandard.compress(jsonl(TEXTS))
BAD: dict[str, tuple[str, bytes | None, list[str], str]] = {  # input's name, its content, further arguments, message
    "missing file": ("d.txt", None, [], "d.txt does not exist"),
    "not text": ("d.txt", b"abc\xff\xfe", [], r"d.txt is not UTF-8 text (byte 3)"),
    "invalid json": ("d.jsonl", jsonl(TEXTS[:2]) + b'{"text": \n', [], "d.jsonl, line 3: not valid JSON"),
    "json not utf-8": ("d.jsonl", b'{"text": "\xff"}\n', [], "d.jsonl, line 1: not valid JSON (not UTF-8)"),
    "json list": ("d.jsonl", b'["text"]\n', [], "d.jsonl, line 1: a JSON list, not an object"),
    "missing key": ("d.jsonl", jsonl(TEXTS) + b'{"body": ""}\n', [], "d.jsonl, line 7: no key 'text' among 'body'; set --text-key"),
    "missing column": ("d.parquet", b"(parquet)", ["--text-key", "body"], "no column 'body' among 'id', 'text'"),
    "column of numbers": ("d.parquet", b"(parquet)", ["--text-key", "id"], "d.parquet, row 1: 'id' is of type int, not a string"),
    "null": ("d.jsonl", b'{"text": null}\n', [], "line 1: 'text' is null, not a string"),
    "half a surrogate": ("d.jsonl", b'{"text": "\\ud800"}\n', [], "line 1: 'text' has half of a surrogate pair"),
    "not gz": ("d.jsonl.gz", jsonl(TEXTS), [], "cannot read"),
    "truncated gz": ("d.jsonl.gz", GZ[:-20], [], "cannot read"),
    "corrupt gz": ("d.jsonl.gz", GZ[:60] + bytes(8) + GZ[68:], [], "cannot read"),
    "not zst": ("d.jsonl.zst", jsonl(TEXTS), [], "cannot read"),
    "truncated zst": ("d.jsonl.zst", ZST[:-5], [], "the zstd stream breaks off"),
    "not parquet": ("d.parquet", b"PAR1 or so", [], "cannot read"),
    "empty corpus": ("d.jsonl", b"\n", [], "the corpus would be empty"),
    "empty texts": ("d.jsonl", jsonl(["", ""]), [], "the corpus would be empty: 2 documents and no text in them"),
    "no workers": ("d.txt", b"a", ["--workers", "0"], "--workers = 0 must be at least 1"),
    "unknown flag": ("d.txt", b"a", ["--tokeniser", "x"], "unrecognized arguments"),
    "end token": ("d.txt", b"a", ["--end-token", "<x>"], "no token '<x>'"),
    "tokenizer missing": ("d.txt", b"a", ["--tokenizer", "/nowhere/t.json"], "cannot read tokenizer /nowhere/t.json"),
    "tokenizer not json": ("d.txt", b"a", ["--tokenizer", "{in}"], "is not JSON"),
    "tokenizer_config": ("d.jsonl", b'{"text": "a"}', ["--tokenizer", "{in}"], "it is not a tokenizer.json"),
    "tokenizer broken": ("d.jsonl", b'{"text": "a", "model": {"type": "X"}}', ["--tokenizer", "{in}"], "is not a valid tokenizer.json"),
    "unwritable": ("d.txt", b"a", ["--output", "/proc/c"], "/proc/c.bin: cannot write there"),
    "no directory": ("d.txt", b"a", ["--output", "{dir}/new/c"], "--output {dir}/new/c.bin: there is no directory {dir}/new"),
    "no directory for a tokenizer": ("d.txt", b"a", ["--tokenizer", "{dir}/new/t.json", "--train-bpe", "300"],
                                     "--tokenizer {dir}/new/t.json: there is no directory {dir}/new"),
    "named twice": ("d.txt", b"a", ["{in}"], "input {in} is named twice; its documents would be stored twice: name it once"),
    "spelt otherwise": ("d.txt", b"a", ["./d.txt"], "input d.txt is named twice ({in} is the same file)"),
    "in a directory named too": ("d.txt", b"a", ["{dir}"], "input {in} is named twice"),
    "no name": ("d.txt", b"a", ["--output", "{dir}/new/"], "names a directory"),
    "a directory's name": ("d.txt", b"a", ["--output", "{dir}"], "names a directory"),
    "with its ending": ("d.txt", b"a", ["--output", "{dir}/c.bin"], "leave .bin out, it is added"),
    "empty name": ("d.txt", b"a", ["--output", ""], "names a directory"),
    "this directory": ("d.txt", b"a", ["--output", "."], "names a directory"),
    "the directory above": ("d.txt", b"a", ["--output", "{dir}/.."], "names a directory"),
    "in a file": ("d.txt", b"a", ["--output", "{in}/c"], "there is no directory {in}"),
    "name too long": ("d.txt", b"a", ["--output", "{dir}/" + "c" * 300], "File name too long"),
    "tokenizer to a directory": ("d.txt", b"ab",
                                 ["--tokenizer", "{dir}", "--train-bpe", "300", "--overwrite"], "is a directory; name a file"),
    "vocabulary too large": ("d.txt", b"ab", ["--tokenizer", "{dir}/new.json", "--train-bpe", str(10**20)], "at most 16777216"),
    "no vocabulary": ("d.txt", b"ab", ["--tokenizer", "{dir}/new.json", "--train-bpe", "0"], "needs 257 entries at least"),
    "negative vocabulary": ("d.txt", b"ab", ["--tokenizer", "{dir}/new.json", "--train-bpe", "-3"], "needs 257 entries at least"),
    "a directory for a tokenizer": ("d.txt", b"a", ["--tokenizer", "{dir}"], "Is a directory"),
    "many workers": ("d.txt", b"a", ["--workers", str(10**9)], "--workers = 1000000000 must be at least 1 and at most 1024"),
    "text too small": ("d.txt", b"ab", ["--tokenizer", "{dir}/new.json", "--train-bpe", "400"], "for 400 entries: merging ends at 258"),
    "vocabulary too small": ("d.txt", b"ab", ["--tokenizer", "{dir}/new.json", "--train-bpe", "256"], "needs 257 entries at least"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_no_file(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str], case: str) -> None:
    name, content, arguments, message = BAD[case]
    path = tmp_path / name
    if content == b"(parquet)":
        write_parquet(path)
    elif content is not None:
        path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    further = [a.format(dir=tmp_path, **{"in": path}) for a in arguments]
    assert run("--output", tmp_path / "c", "--tokenizer", tokenizer, "--workers", 1, path, *further) == 2
    error = capsys.readouterr().err
    message = message.format(dir=tmp_path, **{"in": path})
    assert error.startswith("tools.tokenize_corpus: ") and error.count("\n") == 1 and message in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_overwrite_keeps_the_old_corpus(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_file(tmp_path / "d.txt", b"a")
    command = (source, "--output", tmp_path / "c", "--tokenizer", tokenizer, "--workers", 1)
    assert run(*command) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize_corpus, "write_corpus", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*command, "--overwrite")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_ctrl_c_is_one_line_and_leaves_no_process_and_no_file(tmp_path: Path, tokenizer: Path, terminal: None) -> None:
    """A terminal sends it to all processes; those that tokenise have just begun to import."""
    source = write_file(tmp_path / "d.jsonl", jsonl(TEXTS * 1500))
    options = [f"--output={tmp_path / 'c'}", f"--tokenizer={tokenizer}", "--workers=2"]
    command = [sys.executable, "-m", "tools.tokenize_corpus", str(source), *options]
    tool = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 100
    while len(processes_of(tool.pid)) < 4:  # itself, multiprocessing's resource tracker, and the two
        assert time.monotonic() < deadline and tool.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)  # the second has got its orders
    os.killpg(tool.pid, signal.SIGINT)
    _, err = tool.communicate(timeout=60)
    assert (tool.returncode, err) == (130, "tools.tokenize_corpus: interrupted\n")
    while left := processes_of(tool.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


@pytest.mark.parametrize("killed", ["one of its processes", "all by SIGTERM", "the tool"])
def test_a_kill_leaves_no_process_and_no_file(tmp_path: Path, tokenizer: Path, killed: str) -> None:
    """For want of memory, mostly. The files of a tool that is killed itself go at the next start."""
    source = write_file(tmp_path / "d.jsonl", jsonl(TEXTS * 20_000))
    options = [f"--output={tmp_path / 'c'}", f"--tokenizer={tokenizer}", "--workers=2"]
    tool = subprocess.Popen([sys.executable, "-m", "tools.tokenize_corpus", str(source), *options], stderr=subprocess.PIPE, text=True,
                            start_new_session=True)
    deadline = time.monotonic() + 100
    while not (file := tmp_path / f".c.bin.{tool.pid}.tmp").exists() or not file.stat().st_size:
        assert time.monotonic() < deadline and tool.poll() is None
        time.sleep(0.02)
    if killed == "one of its processes":
        os.kill(max(map(int, processes_of(tool.pid))), signal.SIGKILL)
    elif killed == "the tool":
        tool.kill()
    else:
        os.killpg(tool.pid, signal.SIGTERM)
    _, err = tool.communicate(timeout=60)
    while left := processes_of(tool.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    if killed == "one of its processes":
        assert tool.returncode == 1 and "tools.tokenize_corpus: one of its processes was killed" in err, err
    elif killed == "the tool":
        assert tool.returncode == -signal.SIGKILL
    else:
        assert (tool.returncode, err) == (-signal.SIGTERM, "tools.tokenize_corpus: interrupted\n")
    assert killed == "the tool" or [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_two_outputs_are_two_files_and_none_is_an_input(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_file(tmp_path / "c.bin", b"some text")
    write_file(tmp_path / "d.txt", b"other text")
    for arguments, says in (((source, "--output", tmp_path / "c", "--tokenizer", tokenizer), "is one of the inputs"),
                            ((tmp_path / "d.txt", "--output", tmp_path / "c", "--tokenizer", source, "--train-bpe", 300), "for two files")):
        assert run(*arguments, "--overwrite") == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"c.bin": b"some text", "d.txt": b"other text"}


def stdlib_data(folder: Path) -> DataConfig:
    train, valid, tokenizer = (str(folder / name) for name in ("train", "valid", "tokenizer.json"))
    return DataConfig(train=(train,), valid=valid, tokenizer=tokenizer, source="stdlib")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twelfth of the library: the real thing takes 10 s."""
    files = stdlib_corpus.source_files()[::12]
    assert any(stdlib_corpus.is_held_out(name) for name, _ in files)
    monkeypatch.setattr(stdlib_corpus, "source_files", lambda: files)


def test_stdlib_corpus(tmp_path: Path, few_files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same bytes, whatever the threads; one document per file; the held-out files are not in the training corpus."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    stdlib_corpus.build(stdlib_data(tmp_path / "a"), 512)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    stdlib_corpus.build(stdlib_data(tmp_path / "b"), 512)
    made = contents(tmp_path / "a")
    assert made == contents(tmp_path / "b")
    assert set(made) == {"train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.json"}

    tokenizer = load_tokenizer(tmp_path / "a" / "tokenizer.json")
    for split, held_out in (("train", False), ("valid", True)):
        chosen = [path for name, path in stdlib_corpus.source_files() if stdlib_corpus.is_held_out(name) == held_out]
        texts = [path.read_text(encoding="utf-8") for path in chosen]
        documents = documents_of(tmp_path / "a" / split, 512)
        assert [tokenizer.decode(ids[:-1]) for ids in documents] == [text for text in texts if text]
        assert all(ids[-1] == 0 for ids in documents)
    assert Loader(stdlib_data(tmp_path / "a"), seq_len=48, vocab_size=512, seed=0).num_evaluation_rows > 10


def test_stdlib_corpus_makes_both_or_says_what_is_missing(tmp_path: Path, few_files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    data = stdlib_data(tmp_path)
    stdlib_corpus.build(data, 512)
    made = contents(tmp_path)
    mistyped = dataclasses.replace(data, valid=f"{data.valid}d")
    with pytest.raises(ValueError, match=r"there is no corpus .*validd, though there is .*train; "):
        stdlib_corpus.build(mistyped, 512)
    assert contents(tmp_path) == made
    for name in ("valid.idx", "valid.bin"):
        (tmp_path / name).unlink()
    (tmp_path / "train.idx").unlink()
    with pytest.raises(ValueError, match=r"train\.bin is half of a corpus; remove it"):  # it may be the user's own
        stdlib_corpus.build(data, 512)
    (tmp_path / "train.bin").unlink()
    stdlib_corpus.build(data, 512)
    assert contents(tmp_path) == made

    monkeypatch.setattr(stdlib_corpus, "source_files", lambda: pytest.fail("nothing is missing"))
    stdlib_corpus.build(data, 512)
    with pytest.raises(ValueError, match=r"has 512 entries but model\.vocab_size = 640"):
        stdlib_corpus.build(data, 640)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"valid\.bin exists but its tokenizer .* does not"):
        stdlib_corpus.build(data, 512)
    with pytest.raises(ValueError, match="cannot write /proc/none"):
        stdlib_corpus.build(dataclasses.replace(data, tokenizer="/proc/none/t.json", train=("/proc/none/t",), valid="/proc/none/v"), 512)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_leaves_nothing_and_what_a_kill_leaves_goes_at_the_next_start(tmp_path: Path, few_files: None, terminal: None,
                                                                               number: signal.Signals) -> None:
    folder = tmp_path / "new" / "corpora"
    data = stdlib_data(folder)
    text = f"""
import time
from zaya.config import DataConfig
from zaya.data import stdlib_corpus
files = stdlib_corpus.source_files()[::12]
stdlib_corpus.source_files = lambda: files
stdlib_corpus.write_corpus = lambda *_, **__: (print("writing", flush=True), [time.sleep(0.05) for _ in range(1200)])
stdlib_corpus.build({data!r}, 512)
"""
    # Short sleeps: a signal just before one does not end it, and Python's handler waits for its end.
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    left = {path.name for path in folder.iterdir()}
    assert len(left) == 5 and f".train.bin.{process.pid}.tmp" in left
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == -number, "it ends as by the signal"
    if number != signal.SIGKILL:
        assert not list(tmp_path.iterdir())
        return
    assert {path.name for path in folder.iterdir()} == left
    with open(folder / ".train.bin.1.tmp", "wb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)  # another process is making the same
        stdlib_corpus.build(data, 512)
        assert set(contents(folder)) == {"train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.json", ".train.bin.1.tmp"}


def test_stdlib_corpora_are_files_of_their_own(tmp_path: Path, few_files: None) -> None:
    data = dataclasses.replace(stdlib_data(tmp_path), valid=f"{tmp_path}/../{tmp_path.name}/train")
    with pytest.raises(ValueError, match="train.bin is named for two files"):
        stdlib_corpus.build(data, 512)
    assert not list(tmp_path.iterdir())


def test_stdlib_files_are_source_of_the_library_alone() -> None:
    files = stdlib_corpus.source_files()
    names = [name for name, _ in files]
    assert names == sorted(set(names)) and {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages", "encodings"} & set(name.split("/")) or "sysconfigdata" in name]
    size = sum(path.stat().st_size for _, path in files)
    held_out = sum(path.stat().st_size for name, path in files if stdlib_corpus.is_held_out(name))
    assert size > 5e6 and 0.02 < held_out / size < 0.1
