"""Tokenise text into a corpus: text files, .jsonl(.gz, .zst), .parquet or directories of them in, PREFIX.bin and PREFIX.idx out.

    python -m tools.tokenize_corpus docs/*.jsonl.gz --output data/docs --tokenizer tokenizer.json --workers 8
    python -m tools.tokenize_corpus text/ --output data/text --tokenizer data/tokenizer.json --train-bpe 32000

A thin shell over zaya.data.documents, tokenizer and corpus_writer. Exit code 2 and one line on stderr for bad input; nothing half-written.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from zaya.cli import Parser
from zaya.data.corpus_writer import Written, staged, write_corpus
from zaya.data.documents import list_files, read_documents
from zaya.data.tokenizer import end_token_id, load_tokenizer, train_bpe

MAX_WORKERS = 1024  # more than any machine has use for; a slip of the finger must not start a million processes


def main(argv: list[str] | None = None) -> int:
    try:
        args = _parse(argv)
        written = _run(args)
    except ValueError as error:
        print(f"tools.tokenize_corpus: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tools.tokenize_corpus: {error.filename or args.output}: {error.strerror}", file=sys.stderr)
        return 2
    empty = f" ({written.num_empty} empty ones left out)" if written.num_empty else ""
    count = f"{written.num_documents} document{'' if written.num_documents == 1 else 's'}"
    print(f"{args.output}.bin, {args.output}.idx: {count}, {written.num_tokens} tokens{empty}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="tools.tokenize_corpus", description="Tokenise text into a corpus in Megatron's format (PREFIX.bin, PREFIX.idx).")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT",
                        help="text file (one document), .jsonl or .json (both are read as JSON lines; also .gz, .zst), .parquet, or a "
                             "directory of them")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx, in a directory that exists")
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="FILE", help="a Hugging Face tokenizer.json")
    parser.add_argument("--train-bpe", type=int, metavar="VOCAB_SIZE",
                        help="first train a byte-level BPE of exactly this many entries on the inputs and write it to --tokenizer")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="field or column that holds the text (default: text)")
    parser.add_argument("--end-token", default="", metavar="TOKEN",
                        help="token stored at the end of every document (default: the first common one that the tokenizer has)")
    parser.add_argument("--plain-text", action="store_true",
                        help="read a special token's spelling inside a document as ordinary text (default: as the token)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per CPU)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    args = parser.parse_args(argv)
    if not 1 <= args.workers <= MAX_WORKERS:
        raise ValueError(f"--workers = {args.workers} must be at least 1 and at most {MAX_WORKERS}")
    if args.output.rpartition("/")[2] in ("", ".", ".."):
        raise ValueError(f"--output = {args.output!r} names a directory; add the corpus' name, {os.path.join(args.output, 'NAME')}")
    if args.output.endswith((".bin", ".idx")):
        raise ValueError(f"--output = {args.output!r}: leave {args.output[-4:]} out, it is added")
    if os.path.isdir(args.output):
        raise ValueError(f"--output = {args.output!r} names a directory; add the corpus' name, {os.path.join(args.output, 'NAME')}")
    parser.check_output("--output", Path(f"{args.output}.bin"))
    if args.train_bpe is not None:
        parser.check_output("--tokenizer", args.tokenizer)
    return args


def _run(args: argparse.Namespace) -> Written:
    files = list_files(args.inputs)
    _check_once(files)
    outputs = [Path(f"{args.output}.bin"), Path(f"{args.output}.idx")]
    if args.train_bpe is None:
        tokenizer = load_tokenizer(args.tokenizer)
        end_id = end_token_id(tokenizer, args.end_token)
    else:
        outputs.insert(0, args.tokenizer)
    for path in outputs:
        if path.resolve() in {file.resolve() for file in files}:
            raise ValueError(f"output {path} is one of the inputs; name another")
    with staged(outputs, overwrite=args.overwrite) as temporary:
        if args.train_bpe is not None:
            with _bar("training the tokenizer", files) as bar:
                tokenizer = train_bpe(read_documents(files, args.text_key, bar.update), args.train_bpe)
            end_id = end_token_id(tokenizer, args.end_token)
            temporary[0].write_text(tokenizer.to_str(pretty=True), encoding="utf-8")  # not save, whose errors are no OSError
        with _bar("tokenizing", files) as bar:
            return write_corpus(temporary[-2], temporary[-1], read_documents(files, args.text_key, bar.update), tokenizer, end_id,
                                workers=args.workers, plain_text=args.plain_text)


def _check_once(files: list[Path]) -> None:
    """ValueError: two of them are one file, whose documents would be stored twice. A hard link is a file of its own."""
    names: dict[Path, Path] = {}
    for path in files:
        if (first := names.setdefault(path.resolve(), path)) is not path:
            also = "" if str(first) == str(path) else f" ({first} is the same file)"
            raise ValueError(f"input {path} is named twice{also}; its documents would be stored twice: name it once")


def _bar(task: str, files: list[Path]) -> tqdm:
    return tqdm(total=sum(path.stat().st_size for path in files), desc=task, unit="B", unit_scale=True, disable=None, leave=False)


if __name__ == "__main__":
    sys.exit(main())
