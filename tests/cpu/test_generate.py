"""tools.generate: greedy text is transformers' own, token for token; sampling is repeatable; the command and its refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cpu.test_fidelity import draw, our_model, reference_model, relative
from tools import export_hf, generate, import_hf
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.write import CheckpointWriter
from zaya.config import ModelConfig
from zaya.data.tokenizer import END_OF_TEXT, train_bpe

NEW = 20


def talkative_model(config: ModelConfig, seed: int) -> Any:
    """A random model that does not repeat itself. With a tied head a token is its own best continuation, unless signs flip between the two;
    and tokens must outweigh the biases."""
    model = reference_model(config, seed)
    signs = torch.randint(2, (config.hidden_size,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    with torch.no_grad():
        model.model.norm.weight *= signs
        model.model.embed_tokens.weight *= config.hidden_size**0.5
    return model


@pytest.mark.parametrize("seed", [1, 9, 15, 16, 49, 58])  # the first that say more than four different tokens, over all patterns
def test_greedy_is_that_of_transformers_with_and_without_cache(seed: int) -> None:
    """Windows are shorter than the text. Their cache carries convolution and value states, which our forward computes again."""
    case = draw(seed)
    reference = talkative_model(case.config, seed)
    model = our_model(reference, case.config)
    prompt = torch.randint(case.config.vocab_size, (1, 7), generator=torch.Generator().manual_seed(seed))
    ours = generate.generate(model, prompt[0].tolist(), generate.greedy, NEW)
    assert len(set(ours)) > 4, "a text of few tokens would prove little"
    text = torch.cat([prompt, torch.tensor([ours])], dim=1)
    with torch.no_grad():
        logits = model.logits(model(text, torch.arange(text.shape[1])[None]).hidden_BTD)[0, prompt.shape[1] - 1: -1]
    for use_cache in (True, False):
        theirs = reference.generate(prompt, max_new_tokens=NEW, do_sample=False, use_cache=use_cache, output_logits=True,
                                    return_dict_in_generate=True)
        assert torch.equal(theirs.sequences, text), f"use_cache={use_cache}"
        assert relative(logits, torch.cat(theirs.logits)) < 1e-5, f"use_cache={use_cache}"


def test_greedy_of_an_exported_model_from_the_disk(tmp_path: Path) -> None:
    """The whole way: their directory, imported, exported, loaded by transformers; ours from the checkpoint. Both stop at the end token."""
    config = draw(58).config
    reference = talkative_model(config, 58)
    for layer in reference.model.layers:
        layer.mlp.gate.balancing_biases[-1] = -1.0  # where from_pretrained puts it, whatever the file says (transformers 5.23)
    prompt = [3, 1, 4, 1, 5]
    free = generate.generate(our_model(reference, config), prompt, generate.greedy, NEW)
    end = free[NEW // 2]
    assert free.index(end) > 2
    reference.config.eos_token_id = reference.generation_config.eos_token_id = end
    reference.save_pretrained(tmp_path / "before")
    assert import_hf.main([str(tmp_path / "before"), str(tmp_path / "checkpoint")]) == 0
    assert export_hf.main([str(tmp_path / "checkpoint"), str(tmp_path / "after")]) == 0

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    theirs = loaded.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt):].tolist()
    model = generate.load_model(Checkpoint.find(tmp_path / "checkpoint"), torch.device("cpu"))
    ours = generate.generate(model, prompt, generate.greedy, NEW, {end})
    assert ours == theirs == free[: free.index(end) + 1]


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    draws = [generate.sampler(temperature=0.5, top_k=3, seed=0) for _ in range(2)]
    first, again = ([choose(logits) for _ in range(4000)] for choose in draws)
    other = [generate.sampler(temperature=0.5, top_k=3, seed=1)(logits) for _ in range(1)]
    assert first == again and set(first) == {0, 1, 4} and set(other) <= {0, 1, 4}
    expected = torch.tensor([4.0, 2.0, 6.0]).softmax(0)  # temperature 0.5 doubles the logits
    shares = torch.tensor([first.count(token) for token in (0, 1, 4)]) / 4000
    assert (shares - expected).abs().max() < 0.02  # three standard deviations are 0.016
    assert generate.sampler(temperature=9.0, top_k=1, seed=0)(logits) == 4
    everything = generate.sampler(temperature=9.0, top_k=0, seed=0)
    assert {everything(logits) for _ in range(200)} == set(range(5))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint of a random model and the tokenizer its recipe names."""
    directory = tmp_path_factory.mktemp("run")
    config = ModelConfig(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=2,
                         moe_intermediate_size=8, router_hidden_size=8)
    train_bpe(iter([Path(__file__).read_text()]), 300).save(str(directory / "tokenizer.json"))
    model = our_model(reference_model(config, 0), config)
    recipe = {"model": dataclasses.asdict(config), "data": {"tokenizer": str(directory / "tokenizer.json")}}
    with CheckpointWriter(directory / "checkpoints/step-00000007", recipe=recipe, step=7) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(f"model.{name}", tensor)
    return directory


def test_command_prints_the_prompt_and_more(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for name, options in {"a": ["--seed=1"], "again": ["--seed=1"], "b": ["--seed=2"], "greedy": ["--greedy"],
                          "checkpoint": ["--greedy"], "cold": ["--temperature=1e-320", f"--top-k={2**70}"],
                          "hot": ["--temperature=5", "--top-k=0"], "hottest": ["--temperature=1e308"]}.items():
        source = run / "checkpoints/step-00000007" if name == "checkpoint" else run
        assert generate.main([str(source), "--prompt", "def run", "--max-new-tokens=12", *options]) == 0
        texts[name] = capsys.readouterr().out
        assert texts[name].startswith("def run") and len(texts[name]) > len("def run\n") and END_OF_TEXT not in texts[name]
    assert texts["a"] == texts["again"] != texts["b"]
    assert texts["greedy"] == texts["checkpoint"] == texts["cold"] and len(set(texts.values())) == 5


@pytest.mark.parametrize("options, words", [
    (["--prompt", ""], "--prompt is empty"),
    (["--prompt", "x", "--temperature", "0"], "--temperature = 0.0 must be above 0 and finite; for the likeliest token use --greedy"),
    *((["--prompt", "x", f"--temperature={value}"], f"--temperature = {float(value)} must") for value in ("nan", "inf", "-1", "-inf")),
    (["--prompt", "x", "--temperature", "hot"], "invalid float value: 'hot'"),
    (["--prompt", "x", "--greedy", "--temperature", "0.8"], "--greedy takes the likeliest token each time and draws none"),
    (["--prompt", "x", "--greedy", "--top-k", "1"], "--greedy takes the likeliest token each time and draws none"),
    (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens = 0 must be at least 1"),
    (["--prompt", "x", "--max-new-tokens", "1.5"], "invalid int value: '1.5'"),
    (["--prompt", "x", "--top-k", "-1"], "--top-k = -1 must be at least 0"),
    (["--prompt", "x", "--seed", str(2**64)], f"--seed = {2**64} must be"),
    (["--prompt", "x", "--seed", "-1"], "--seed = -1 must be"),
    (["--prompt", "\udcff"], "--prompt is not UTF-8 text"),
    (["--prompt", "x", "--tokenizer", "nowhere.json"], "cannot read tokenizer nowhere.json"),
])
def test_command_refuses(options: list[str], words: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = generate.main([str(run), *options])
    except SystemExit as ended:  # argparse's own way out
        code = ended.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("tools.generate: ") and words in captured.err


def test_command_refuses_what_is_no_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def words(path: Path, *options: str) -> str:
        assert generate.main([str(path), "--prompt", "def", *options]) == 2
        return capsys.readouterr().err

    assert "is neither a checkpoint" in words(tmp_path)
    big = tmp_path / "big.json"
    train_bpe(iter([Path(__file__).read_text()]), 310).save(str(big))
    text = train_bpe(iter([Path(__file__).read_text()]), 310).decode([309])
    assert generate.main([str(run), "--prompt", text, "--tokenizer", str(big)]) == 2
    assert "token 309, the model knows 300" in capsys.readouterr().err
    with CheckpointWriter(tmp_path / "bare", recipe={"model": {"vocab_size": 300}}) as writer:
        writer.add("model.x", torch.zeros(1))
    assert "names no tokenizer" in words(tmp_path / "bare")
    with CheckpointWriter(tmp_path / "broken", recipe=Checkpoint.find(run).manifest.recipe) as writer:
        for name, tensor in generate.load_model(Checkpoint.find(run), torch.device("cpu")).state_dict().items():
            writer.add(f"model.{name}", tensor * torch.nan)
    assert words(tmp_path / "broken").startswith("tools.generate: the model's logits are not finite")
    assert "recipe lacks model.hidden_size" in words(tmp_path / "bare", "--tokenizer", str(run / "tokenizer.json"))
