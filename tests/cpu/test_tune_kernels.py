"""tools.tune_kernels: which candidates it tries, which one wins, what it writes. In a Python of its own, which can compile kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_candidates_scores_and_file(tmp_path: Path) -> None:
    result = run("-c", textwrap.dedent(f"""
        import pathlib
        from tools import tune_kernels as tune

        entry = {{"arch": "gfx942", "blocks": {{"BLOCK_M": 64, "GROUP": 1}}, "num_warps": 16, "num_stages": 1, "figures": "old"}}
        found = [(c["blocks"]["BLOCK_M"], c["blocks"]["GROUP"], c["num_warps"], c["num_stages"]) for c in tune.neighbours(entry)]
        assert found == [(64, 1, 16, 1), (32, 1, 16, 1), (128, 1, 16, 1), (64, 2, 16, 1), (64, 1, 8, 1), (64, 1, 16, 2)], found
        space = tune.parse_space(["BLOCK_M=64,128", "num_warps=4,16", "BLOCK_OTHER=1,2"])
        found = [(c["blocks"], c["num_warps"]) for c in tune.products(entry, space)]
        assert found == [(entry["blocks"], 16), ({{"BLOCK_M": 64, "GROUP": 1}}, 4), ({{"BLOCK_M": 128, "GROUP": 1}}, 4),
                         ({{"BLOCK_M": 128, "GROUP": 1}}, 16)], found

        assert tune.is_better((1.0, 2.0, 0.90), (1.0, 2.0, 0.80)) and not tune.is_better((0.0, 2.0, 0.99), (1.0, 2.0, 0.10))
        assert not tune.is_better((-1.0,), (-1.01,)) and tune.is_better((-1.0,), (-1.1,))  # 1 % faster is noise, 10 % is not
        assert not tune.is_better((-float("inf"),), (-5.0,)) and not tune.is_better((1.0, 1.0), (1.0, 1.0))

        tune.TABLE = pathlib.Path({str(tmp_path)!r}, "configs.json")
        tune.TABLE.write_text('{{"_a_kernel": [{{"arch": "gfx942"}}, {{"arch": "sm_90"}}], "_b_kernel": []}}')
        tune.write({{("_a_kernel", 1): entry}})
        lines = tune.TABLE.read_text().splitlines()
        assert lines[:3] == ["{{", '  "_a_kernel": [', '    {{"arch": "gfx942"}},'] and '"GROUP": 1' in lines[3], lines
        assert [path.name for path in tune.TABLE.parent.iterdir()] == ["configs.json"]
    """))
    assert result.returncode == 0, result.stderr


def test_the_table_is_written_as_it_stands() -> None:
    """So that a change of one entry is a change of one line."""
    result = run("-c", "import pathlib, tempfile\nfrom tools import tune_kernels as tune\ntext = tune.TABLE.read_text()\n"
                       "tune.TABLE = pathlib.Path(tempfile.mkdtemp(), 'configs.json')\ntune.TABLE.write_text(text)\ntune.write({})\n"
                       "assert tune.TABLE.read_text() == text")
    assert result.returncode == 0, result.stderr


def test_an_op_is_ranked_by_its_machine_code() -> None:
    before = (ROOT / "zaya/kernels/configs.json").read_bytes()
    result = run("-m", "tools.tune_kernels", "--op", "adamw 8b embedding shard ragged", "--arch", "gfx942", "--space", "num_warps=2,4",
                 "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "_adamw_kernel gfx942" in result.stdout and "warps 2" in result.stdout and "VGPRs" in result.stdout
    assert result.stdout.count("\n * ") == 1 and (ROOT / "zaya/kernels/configs.json").read_bytes() == before


def test_wrong_calls_are_one_line() -> None:
    for words, message in ((["--op", "nonsense"], "no chip case"), (["--op", "adamw", "--space", "BLOCK"], "NAME=NUMBER"),
                           (["--op", "adamw", "--arch", "gfx90a"], "gfx90a"), (["--op", "adamw", "--kernel", "_x_kernel"], "_x_kernel")):
        result = run("-m", "tools.tune_kernels", *words)
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
