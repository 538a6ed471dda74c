"""README's file map is the tree: every file it names is there, and every module, tool and recipe is in it, once, with its job."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "DEBUGGING.md")


def file_map() -> list[tuple[str, str]]:
    """(path, job) of the rows of README's section "File map"."""
    section = (ROOT / "README.md").read_text().partition("\n## File map\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| \[[^]]+\]\(([^)]+)\) \| (.*) \|$", section, flags=re.MULTILINE)


def test_every_file_of_the_map_exists() -> None:
    assert [path for path, _ in file_map() if not (ROOT / path).is_file()] == []


def test_every_module_tool_and_recipe_is_in_the_map_once() -> None:
    files = [*(ROOT / "zaya").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *(ROOT / "recipes").glob("*.toml")]
    there = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    named = Counter(path for path, _ in file_map())
    assert sorted(there - named.keys()) == []
    assert [path for path, times in named.items() if times > 1] == []


def test_every_job_is_one_line_of_words() -> None:
    assert file_map() and all(job.strip() for _, job in file_map())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / document).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_ci_runs_the_readmes_test_command() -> None:
    assert (ROOT / ".ci/run").read_text().rstrip().splitlines()[-1] == "make test"
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), flags=re.MULTILINE)


def test_every_make_target_of_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", (ROOT / document).read_text(), flags=re.MULTILINE))
        assert named - targets == set(), document
