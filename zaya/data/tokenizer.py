"""Tokenizers: read any Hugging Face tokenizer.json, find its end token, or train a byte-level BPE.

Stands before a batch's path, beside documents.py: text to ids, and nothing of files of ids. Needs the library `tokenizers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
"""End token of the tokenizers that train_bpe makes."""
MAX_ENTRIES = 1 << 24
"""Of a vocabulary that train_bpe makes: 64 times the largest in use."""
_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end▁of▁sentence|>", "<|im_end|>", "<|eot_id|>",
               "<end_of_turn>", "[SEP]")
"""End tokens in use, a document's end before a turn's: a chat tokenizer has both."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without the truncation and padding that some carry. ValueError if it is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read tokenizer {path}: {error.strerror}; name a Hugging Face tokenizer.json") from None
    except UnicodeDecodeError:
        raise ValueError(f"tokenizer {path} is not text; name a Hugging Face tokenizer.json") from None
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"tokenizer {path} is not JSON ({error.msg}, line {error.lineno}); name a Hugging Face tokenizer.json") from None
    if not isinstance(parsed, dict) or not isinstance(parsed.get("model"), dict):
        raise ValueError(f"tokenizer {path} has no \"model\": it is not a tokenizer.json (tokenizer_config.json is another file)")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001  # the library raises nothing more specific
        raise ValueError(f"tokenizer {path} is not a valid tokenizer.json: {str(error).splitlines()[0]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One above the largest token id: added tokens may leave holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def end_token_id(tokenizer: Tokenizer, name: str = "") -> int:
    """Id of the end token `name`, or of the first common one that the tokenizer has. ValueError if there is none."""
    for candidate in [name] if name else _END_TOKENS:
        found = tokenizer.token_to_id(candidate)
        if found is not None:
            return found
    if name:
        raise ValueError(f"the tokenizer has no token {name!r} to end documents with; correct --end-token")
    raise ValueError("the tokenizer has none of the common end tokens; name the one that ends a document with --end-token")


def train_bpe(documents: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` entries, <|endoftext|> (id 0) and the 256 bytes included. Same documents, same tokenizer."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"a byte-level vocabulary needs {len(alphabet) + 1} entries at least ({len(alphabet)} bytes and {END_OF_TEXT}), "
                         f"not {vocab_size}")
    if vocab_size > MAX_ENTRIES:
        raise ValueError(f"a vocabulary of {vocab_size} entries is beyond any model; ask for at most {MAX_ENTRIES}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet),
                                  show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text is too small for {vocab_size} entries: merging ends at {tokenizer.get_vocab_size()}; "
                         "give more text or ask for fewer")
    return tokenizer
