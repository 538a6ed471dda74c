"""make setup on machines that are not this one: what tools.setup_env decides, and that an inherited torch survives pip. No network."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tools import setup_env
from tools.setup_env import SetupError, decide, install, make_venv, probe_torch, reusable, verify

ROOT = Path(__file__).resolve().parents[2]
ROCM_TORCH = "2.9.1+rocm7.1.0.git351ff442"
ROCM_TRITON = "3.5.1+rocm7.1.0"

# A pip that writes down how it was called, constraints included, and then does what a careless one would: SABOTAGE.
FAKE_PIP = """
import os, pathlib, sys
words = sys.argv[1:]
constraints = pathlib.Path(words[words.index("--constraint") + 1]).read_text()
pathlib.Path(os.environ["PIP_LOG"]).write_text("\\n".join(words) + "\\n---\\n" + constraints)
if os.environ.get("PIP_SABOTAGE"):
    (site,) = pathlib.Path(sys.prefix, "lib").glob("python3.*/site-packages")
    (site / "torch").mkdir()
    (site / "torch/__init__.py").write_text("from . import version\\n__version__ = '2.13.0'")
    (site / "torch/version.py").write_text("hip = None")
sys.exit(int(os.environ.get("PIP_EXIT", "0")))
"""


def add_distribution(site: Path, name: str, version: str, package: str, files: dict[str, str]) -> None:
    """Lay an installed distribution into `site`, as pip would have."""
    for path, text in files.items():
        (site / package / path).parent.mkdir(parents=True, exist_ok=True)
        (site / package / path).write_text(text)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("".join(f"{package}/{path},,\n" for path in files))


@pytest.fixture(scope="module")
def rocm_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an image with a ROCm torch in a virtual environment of its own, and a fake pip."""
    image = tmp_path_factory.mktemp("image") / "opt-venv"
    make_venv(sys.executable, image, None, with_pip=False)
    (site,) = (image / "lib").glob("python3.*/site-packages")
    add_distribution(site, "torch", ROCM_TORCH, "torch", {
        "__init__.py": f"from . import version\n__version__ = {ROCM_TORCH!r}\n", "version.py": "hip = '7.1.25424'\n"})
    add_distribution(site, "pytorch-triton-rocm", ROCM_TRITON, "triton", {"__init__.py": ""})
    add_distribution(site, "pip", "99.0", "pip", {"__init__.py": "", "__main__.py": FAKE_PIP})
    return str(image / "bin/python")


def test_only_an_environment_is_ever_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(python: str) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(setup_env, "probe_torch", probe)
    (tmp_path / "mine").write_text("keep")
    for place, message in ((tmp_path, "is not empty and no virtual environment"), (tmp_path / "mine", "is not a directory")):
        with pytest.raises(SetupError, match=message):
            setup_env.setup(place)
    (tmp_path / "pyvenv.cfg").touch()
    for place in (tmp_path, tmp_path / "new"):
        with pytest.raises(AssertionError, match="too late"):
            setup_env.setup(place)


@pytest.mark.parametrize(("version", "has_ensurepip", "message"), [
    ((3, 10), True, "Python 3.10 is too old.*PYTHON="),
    ((3, 14), True, "Python 3.14 is too new.*PYTHON="),
    ((3, 12), False, "sudo apt-get install -y python3.12-venv"),
])
def test_an_unusable_python_gets_one_line(version: tuple[int, int], has_ensurepip: bool, message: str) -> None:
    with pytest.raises(SetupError, match=message) as caught:
        setup_env.check_python(version, has_ensurepip)
    assert "\n" not in str(caught.value)


def test_supported_pythons_pass() -> None:
    for minor in (11, 12, 13):
        setup_env.check_python((3, minor), has_ensurepip=True)


def test_an_old_python_can_parse_the_file_that_refuses_it() -> None:
    ast.parse(Path(setup_env.__file__).read_text(), feature_version=(3, 7))


def test_without_torch_the_pinned_one_is_asked_for() -> None:
    decision = decide(None)
    assert not decision.inherit and decision.constraints == []
    assert decision.requirements == ["torch==2.13.0", "-e", ".[torch,train,hf,dev]"]


def found(version: str, owners: dict[str, dict[str, str]]) -> dict[str, Any]:
    return {"version": version, "hip": None, "owners": owners, "sites": []}


def test_a_torch_that_is_there_is_pinned_with_its_triton_and_not_asked_for() -> None:
    decision = decide(found(ROCM_TORCH, {"torch": {"torch": ROCM_TORCH}, "triton": {"triton": "3.5.1"}}))
    assert decision.inherit and decision.requirements == ["-e", ".[train,hf,dev]"]
    assert decision.constraints == [f"torch=={ROCM_TORCH}", "triton==3.5.1"]


def test_a_triton_or_torch_under_another_name_blocks_the_usual_one() -> None:
    decision = decide(found(ROCM_TORCH, {"torch": {}, "triton": {"triton-rocm": "3.6.0"}}))
    assert decision.constraints == ["torch<0", "triton-rocm==3.6.0", "triton<0"]


def test_torch_before_2_9_is_an_error_and_a_source_build_of_2_9_is_not() -> None:
    with pytest.raises(SetupError, match=r"2\.8\.0\+rocm6\.4, is older than 2\.9"):
        decide(found("2.8.0+rocm6.4", {"torch": {"torch": "2.8.0+rocm6.4"}}))
    assert decide(found("2.9.0a0+git123", {"torch": {"torch": "2.9.0a0+git123"}})).constraints == ["torch==2.9.0a0+git123"]


def test_setup_inherits_the_images_torch_through_a_second_environment(
        rocm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "pip.log"
    monkeypatch.setenv("PIP_LOG", str(log))
    before = probe_torch(rocm_python)
    assert before is not None and (before["version"], before["hip"]) == (ROCM_TORCH, "7.1.25424")
    venv = tmp_path / ".venv"
    decision = decide(before)
    make_venv(rocm_python, venv, before, with_pip=False)
    install(venv, decision)
    assert verify(venv, before)["version"] == ROCM_TORCH
    words, constraints = log.read_text().split("\n---\n")
    assert words.splitlines()[-2:] == ["-e", ".[train,hf,dev]"] and "-qq" in words.splitlines()
    assert constraints.splitlines() == [f"torch=={ROCM_TORCH}", f"pytorch-triton-rocm=={ROCM_TRITON}", "triton<0"]
    assert reusable(venv, inherit=True) and not reusable(venv, inherit=False)


def test_a_changed_torch_and_a_failed_pip_stop_the_setup(rocm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_LOG", str(tmp_path / "pip.log"))
    before = probe_torch(rocm_python)
    make_venv(rocm_python, tmp_path / ".venv", before, with_pip=False)
    monkeypatch.setenv("PIP_EXIT", "3")
    with pytest.raises(SetupError, match="pip failed with exit code 3"):
        install(tmp_path / ".venv", decide(before))
    monkeypatch.setenv("PIP_EXIT", "0")
    monkeypatch.setenv("PIP_SABOTAGE", "1")
    install(tmp_path / ".venv", decide(before))
    with pytest.raises(SetupError, match=rf"version changed from {ROCM_TORCH.replace('+', '.')} to 2\.13\.0"):
        verify(tmp_path / ".venv", before)


def test_ctrl_c_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_env, "install", interrupted)
    monkeypatch.setattr(setup_env, "make_venv", lambda *_: None)
    assert setup_env.main(["--venv", str(tmp_path / "venv")]) == 130
    assert capsys.readouterr().err == "tools.setup_env: interrupted; make setup goes on from here\n"


def test_a_torch_that_does_not_import_is_not_taken_for_none(tmp_path: Path) -> None:
    make_venv(sys.executable, tmp_path / "image", None, with_pip=False)
    (site,) = (tmp_path / "image/lib").glob("python3.*/site-packages")
    add_distribution(site, "torch", "2.9.1", "torch", {"__init__.py": "raise ImportError('libamdhip64.so: cannot open')"})
    with pytest.raises(SetupError, match="does not import .*libamdhip64"):
        probe_torch(str(tmp_path / "image/bin/python"))


def wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    """The smallest wheel that pip accepts."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        requirement = f"Requires-Dist: {requires}\n" if requires else ""
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requirement}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def pip_plans(python: str, shop: Path, constraints: list[str], requirement: str) -> str:
    """What the real pip would install into `python`'s environment from the wheels in `shop`; "refused" if it would not."""
    (shop / "constraints.txt").write_text("".join(f"{line}\n" for line in constraints))
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--dry-run", "--no-index", "--no-cache-dir"]
    where = ["--find-links", str(shop), "--constraint", str(shop / "constraints.txt")]
    # This machine's own settings, such as constraints on torch, would decide instead of ours.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | {"PIP_CONFIG_FILE": os.devnull}
    result = subprocess.run([*command, *where, requirement], capture_output=True, text=True, env=environment)
    if result.returncode:
        assert "onflict" in result.stderr, result.stderr
        return "refused"
    return next((line for line in result.stdout.splitlines() if line.startswith("Would install")), "nothing")


def test_the_real_pip_obeys_the_constraints(rocm_python: str, tmp_path: Path) -> None:
    before = probe_torch(rocm_python)
    make_venv(rocm_python, tmp_path / ".venv", before, with_pip=False)
    python, constraints = str(tmp_path / ".venv/bin/python"), decide(before).constraints
    shop = tmp_path / "shop"
    shop.mkdir()
    for name, version, requires in (("torch", "99.0", ""), ("triton", "99.0", ""), ("content", "1.0", "torch>=2.6"),
                                    ("greedy", "1.0", "torch>=3"), ("triton_user", "1.0", "triton")):
        wheel(shop, name, version, requires)
    assert pip_plans(python, shop, constraints, "content") == "Would install content-1.0"
    # Each of these would replace what the image brought, and without the constraints does.
    for requirement, harm in (("greedy", "torch-99.0"), ("triton_user", "triton-99.0")):
        assert harm in pip_plans(python, shop, [], requirement)
        assert pip_plans(python, shop, constraints, requirement) == "refused"


def test_make_says_that_no_interpreter_is_named() -> None:
    # A make that runs these tests (make test) must not make this one its child: that one would name its directory on stdout.
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "--dry-run", "setup", "PYTHON="], capture_output=True, text=True, cwd=ROOT, env=alone)
    assert done.returncode == 2 and "PYTHON= names no interpreter" in done.stderr and not done.stdout
