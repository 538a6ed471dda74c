"""Sample text from a checkpoint with our own forward pass.

Off the batch's path: shows a person what a run has learned. Every token costs a forward pass over all before it, without a cache, which is
fine for a sample; for serving, export the model (tools.export_hf) and use transformers or what is built on it.

    python -m tools.generate runs/quickstart --prompt "def "
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from zaya.checkpoint.read import Checkpoint
from zaya.cli import Parser
from zaya.config import model_from_tables
from zaya.data.tokenizer import end_token_id, load_tokenizer
from zaya.dtypes import STORED_DTYPES
from zaya.model.transformer import Zaya

TEMPERATURE, TOP_K = 0.8, 50


def load_model(checkpoint: Checkpoint, device: torch.device) -> Zaya:
    """The model in the dtype it is stored in. ValueError if the checkpoint does not hold the model of its recipe."""
    config = model_from_tables(checkpoint.manifest.recipe)
    embedding = checkpoint.manifest.tensors.get("model.embedding.weight")
    with device:
        model = Zaya(config, dtype=STORED_DTYPES[embedding.dtype] if embedding else torch.float32)
    for name, tensor in model.state_dict().items():
        value = checkpoint.read(f"model.{name}")
        if value.shape != tensor.shape:
            raise ValueError(f"{checkpoint.path}: model.{name} has shape {list(value.shape)}, its recipe asks for {list(tensor.shape)}")
        tensor.copy_(value)
    return model.eval()


@torch.no_grad()
def generate(model: Zaya, tokens: Sequence[int], choose: Callable[[Tensor], int], max_new_tokens: int,
             ends: Collection[int] = ()) -> list[int]:
    """The new tokens, up to and with the first of `ends`. `choose` picks one from the logits (V,) of the last position. ValueError: the
    model is broken."""
    device = model.embedding.weight.device
    row = torch.tensor([tokens], device=device)
    for _ in tqdm(range(max_new_tokens), unit="token", disable=None, leave=False, dynamic_ncols=True, desc="generate"):
        hidden_BTD = model(row, torch.arange(row.shape[1], device=device)[None]).hidden_BTD
        logits_V = model.logits(hidden_BTD[:, -1])[0]
        if not logits_V.isfinite().all():
            raise ValueError("the model's logits are not finite: its weights are broken; take an earlier checkpoint")
        token = choose(logits_V)
        row = torch.cat([row, row.new_tensor([[token]])], dim=1)
        if token in ends:
            break
    return row[0, len(tokens):].tolist()


def greedy(logits_V: Tensor) -> int:
    return int(logits_V.argmax())


def sampler(temperature: float, top_k: int, seed: int) -> Callable[[Tensor], int]:
    """Draws from softmax(logits / temperature) over the top_k likeliest tokens (0: over all), on the CPU, so that a seed means the same
    everywhere."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits_V: Tensor) -> int:
        scaled_V = logits_V.double().cpu()
        scaled_V = (scaled_V - scaled_V.max()) / temperature  # 0 stays 0 at any temperature: the likeliest can always be drawn
        values_K, tokens_K = scaled_V.topk(min(top_k, len(scaled_V)) if top_k else len(scaled_V))
        return int(tokens_K[torch.multinomial(values_K.softmax(-1), 1, generator=generator)])

    return choose


def find_tokenizer(checkpoint: Checkpoint, given: Path | None) -> Tokenizer:
    named = given or Path(str(checkpoint.manifest.recipe.get("data", {}).get("tokenizer") or ""))
    if named == Path(""):
        raise ValueError(f"the recipe of {checkpoint.path} names no tokenizer; give one with --tokenizer")
    try:
        return load_tokenizer(named)
    except ValueError as error:
        raise error if given else ValueError(f"{error}; the recipe names it: give another with --tokenizer") from None


def end_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> set[int]:
    """What an imported model's config says, else the tokenizer's end token."""
    ids = checkpoint.manifest.hf_config.get("eos_token_id")
    if ids is not None:
        return set(ids) if isinstance(ids, list) else {ids}
    try:
        return {end_token_id(tokenizer)}
    except ValueError:  # nothing ends the text but max_new_tokens
        return set()


def sample(options: argparse.Namespace) -> str:
    """The prompt and what follows it."""
    if options.greedy and (options.temperature, options.top_k) != (None, None):
        raise ValueError("--greedy takes the likeliest token each time and draws none: leave it out, or --temperature and --top-k")
    temperature = TEMPERATURE if options.temperature is None else options.temperature
    top_k = TOP_K if options.top_k is None else options.top_k
    if not 0 < temperature < math.inf:
        raise ValueError(f"--temperature = {temperature} must be above 0 and finite; for the likeliest token use --greedy")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens = {options.max_new_tokens} must be at least 1")
    if top_k < 0:
        raise ValueError(f"--top-k = {top_k} must be at least 0, which takes all tokens")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed = {options.seed} must be at least 0 and below 2^63")
    if any("\ud800" <= character <= "\udfff" for character in options.prompt):
        raise ValueError("--prompt is not UTF-8 text")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device = cuda, but this machine has no GPU that torch can use; use cpu")
    device = torch.device(options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = Checkpoint.find(options.checkpoint)
    tokenizer = find_tokenizer(checkpoint, options.tokenizer)
    prompt = tokenizer.encode(options.prompt, add_special_tokens=False).ids
    if not prompt:
        raise ValueError("--prompt is empty; a document's first token is never predicted, so give at least one")
    model = load_model(checkpoint, device)
    if max(prompt) >= model.config.vocab_size:
        raise ValueError(f"the tokenizer gives token {max(prompt)}, the model knows {model.config.vocab_size} (0 to "
                         f"{model.config.vocab_size - 1}); give the tokenizer it was trained with")
    choose = greedy if options.greedy else sampler(temperature, top_k, options.seed)
    ends = end_tokens(checkpoint, tokenizer)
    new = generate(model, prompt, choose, options.max_new_tokens, ends)
    return str(tokenizer.decode(prompt + [token for token in new if token not in ends], skip_special_tokens=False))


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.generate", description="Sample text from a checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run (its newest checkpoint)")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="stop after so many tokens (default: 64)")
    parser.add_argument("--temperature", type=float, help=f"below 1 sharpens, above 1 flattens (default: {TEMPERATURE})")
    parser.add_argument("--top-k", type=int, help=f"draw from the likeliest K tokens; 0 = all (default: {TOP_K})")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default: 0)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time: neither --temperature nor --top-k")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: the one the recipe names)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute (default: auto)")
    options = parser.parse_args(argv)
    try:
        print(sample(options))
    except ValueError as error:
        return parser.refused(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
