"""Who may import whom: the layers and fences of the project, read from the source without running it, and that breaches are caught."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Low to high. A name covers the module or the whole package; the most specific name of a module counts. Within one name all is free;
# otherwise a module imports lower layers only, and a tool no other, but for a file that is its second part (tools.x_part of tools.x). A new
# module joins a line here, or starts one.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("zaya",),  # the package's own __init__, which everything imports
    ("zaya.cli", "zaya.preemption", "zaya.runtime", "zaya.shares", "zaya.tables"),
    ("zaya.config",),
    ("zaya.shard", "zaya.dtypes"),
    ("zaya.plan",),
    ("zaya.schedule",),
    ("zaya.kernels",),
    ("zaya.optim",),
    ("zaya.model", "zaya.data", "zaya.metrics", "zaya.checkpoint", "zaya.parallel"),  # siblings: strangers to one another
    ("zaya.parallel.parallelize", "zaya.resilience"),
    ("zaya.state",),
    ("zaya.tiers", "zaya.step"),
    ("zaya.resume", "zaya.saving"),
    ("zaya.trainer",),
    ("zaya.train", "tools"),
)
STDLIB_ONLY = ("zaya", "zaya.cli", "zaya.config", "zaya.preemption", "zaya.runtime", "zaya.shares", "zaya.tables", "zaya.shard",
               "zaya.plan", "zaya.schedule", "zaya.metrics", "tools.setup_env")
NOTHING_OF_ZAYA = ("zaya.kernels", "tools.setup_env")
FENCES = {
    "triton": ("zaya.kernels",),
    "megatron": ("zaya.parallel", "zaya.data"),
    "deepspeed": ("zaya.parallel.deepspeed_engine", "zaya.checkpoint.convert"),
    "transformers": ("zaya.model.hf", "tools"),
}
# The model knows no rank and no group: not even as part of a name (local_rank, num_ranks, tp_world_size).
DISTRIBUTED_WORDS = re.compile(r"(^|_)(ranks?|world_size|process_groups?|distributed)(_|$)")


def covers(name: str, module: str) -> bool:
    return module == name or module.startswith(name + ".")


def owner(module: str) -> str | None:
    """The most specific name of the table that covers a module. "zaya" covers itself only: it is no layer for strays."""
    names = [name for layer in LAYERS for name in layer if covers(name, module) and (name != "zaya" or module == "zaya")]
    return max(names, key=len, default=None)


def height(name: str) -> int:
    return next(level for level, layer in enumerate(LAYERS) if name in layer)


def imports(module: str, source: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, wherever it stands; `from a import b` is a.b, since b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*package, base] if base else package)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def breaches(module: str, source: str, is_package: bool = False) -> list[str]:
    """What a file of this name and content does that the table forbids."""
    mine = owner(module)
    if mine is None:
        return [f"{module} is in no layer: give it one in LAYERS"]
    found = []
    for line, name in imports(module, source, is_package):
        where, top = f"{module}:{line} imports {name}", name.partition(".")[0]
        if top in ("zaya", "tools", "tests"):
            theirs = owner(name)
            if theirs is None and "." in name:
                theirs = owner(name.rpartition(".")[0])  # `from zaya import __version__`
            if top == "tests" or theirs is None:
                found.append(f"{where}, which is in no layer")
            elif (theirs == "tools" and not name.startswith(f"{module}_")) or (theirs != mine and height(theirs) >= height(mine)):
                found.append(f"{where}, which is not below it")
            elif any(covers(closed, module) and not covers(closed, name) for closed in NOTHING_OF_ZAYA):
                found.append(f"{where}: nothing of zaya here")
        elif module in STDLIB_ONLY and top not in sys.stdlib_module_names:
            found.append(f"{where}: the standard library only")
        elif top in FENCES and not any(covers(yard, module) for yard in FENCES[top]):
            found.append(f"{where}: {top} belongs to {', '.join(FENCES[top])}")
    if covers("zaya.model", module):
        found += [f"{module}:{line} says {word}: the model knows nothing distributed" for line, word in distributed_words(source)]
    return found


def distributed_words(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        words: list[str | None] = []
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.keyword(arg=word) | ast.alias(name=word):
                words = [word]
            case ast.FunctionDef(name=word) | ast.ClassDef(name=word):
                words = [word]
            case ast.ImportFrom():
                words = [node.module]
        for word in words:
            if word and any(DISTRIBUTED_WORDS.search(part) for part in word.split(".")):
                yield getattr(node, "lineno", 0), word


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files() -> list[Path]:
    return sorted([*(ROOT / "zaya").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])


@pytest.mark.parametrize("path", files(), ids=lambda path: module_name(path))
def test_every_file_keeps_to_its_layer(path: Path) -> None:
    assert breaches(module_name(path), path.read_text(), is_package=path.name == "__init__.py") == []


def test_the_files_are_found() -> None:
    assert {"zaya.config", "zaya.plan", "tools.setup_env"} <= {module_name(path) for path in files()}


PLANTED = [
    ("zaya.plan", "from zaya.schedule import learning_rate", "not below"),
    ("zaya.config", "import zaya.plan", "not below"),
    ("zaya.config", "import torch", "standard library only"),
    ("zaya.schedule", "def f():\n    import numpy", "standard library only"),
    ("zaya.kernels.reference", "from zaya.config import ModelConfig", "nothing of zaya"),
    ("zaya.kernels.reference", "from .. import config", "nothing of zaya"),
    ("zaya.model.attention", "from zaya.parallel.mesh import Mesh", "not below"),
    ("zaya.model.attention", "from ..parallel import mesh", "not below"),
    ("zaya.parallel.mesh", "from zaya.model.transformer import Transformer", "not below"),
    ("zaya.data.loader", "import zaya.checkpoint.read", "not below"),
    ("zaya.optim", "from zaya import metrics", "not below"),
    ("zaya.parallel.data_parallel", "from zaya.parallel.parallelize import install", "not below"),
    ("zaya.parallel.parallelize", "from zaya.resilience import guard", "not below"),
    ("zaya.trainer", "from zaya.train import main", "not below"),
    ("zaya.trainer", "import tools.plot_run", "not below"),
    ("tools.generate", "from tools.export_hf import main", "not below"),
    ("zaya.data.loader", "from tests.dist.pool import WorkerPool", "in no layer"),
    ("zaya.data.loader", "from zaya.helpers import chunk", "in no layer"),
    ("zaya.helpers", "", "in no layer"),
    ("zaya.trainer", "import triton", "triton belongs to"),
    ("zaya.optim", "import triton.language as tl", "triton belongs to"),
    ("zaya.checkpoint.read", "from megatron.core import parallel_state", "megatron belongs to"),
    ("zaya.parallel.mesh", "import deepspeed", "deepspeed belongs to"),
    ("zaya.model.transformer", "from transformers import ZayaConfig", "transformers belongs to"),
    ("zaya.model.moe", "import torch.distributed as dist", "says torch.distributed"),
    ("zaya.model.moe", "from torch import distributed", "says distributed"),
    ("zaya.model.moe", "from torch.distributed import all_reduce", "says torch.distributed"),
    ("zaya.model.moe", "import torch\nx = torch.distributed.get_rank()", "says get_rank"),
    ("zaya.model.moe", "def f(rank): ...", "says rank"),
    ("zaya.model.moe", "f(world_size=2)", "says world_size"),
    ("zaya.model.moe", "self.tp_process_group = None", "says tp_process_group"),
]


@pytest.mark.parametrize(("module", "source", "message"), PLANTED)
def test_a_planted_breach_is_caught(module: str, source: str, message: str) -> None:
    found = breaches(module, source)
    assert any(message in breach for breach in found), found


@pytest.mark.parametrize(("module", "source", "is_package"), [
    ("zaya.plan", "import math\nfrom zaya.config import ModelConfig", False),
    ("zaya.kernels.rmsnorm", "import torch, triton\nfrom zaya.kernels import reference", False),
    ("zaya.model.attention", "from .layers import Linear\nfrom zaya.kernels.reference import attend", False),
    ("zaya.model", "from .transformer import Transformer", True),
    ("zaya.model.hf", "import transformers", False),
    ("zaya.model.moe", "'''Knows no rank.'''\nranking = franked = 1", False),
    ("zaya.parallel.mesh", "import torch.distributed as dist\nfrom megatron.core import parallel_state\nrank = dist.get_rank()", False),
    ("zaya.parallel.parallelize", "from zaya.model.transformer import Transformer\nfrom zaya.parallel.mesh import Mesh", False),
    ("zaya.trainer", "from zaya import data, model\nfrom zaya.metrics import MetricsWriter", False),
    ("tools.import_hf", "import transformers\nfrom zaya.model import hf\nimport zaya", False),
])
def test_what_is_allowed_stays_allowed(module: str, source: str, is_package: bool) -> None:
    assert breaches(module, source, is_package) == []
