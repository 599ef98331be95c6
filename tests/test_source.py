"""Which files are the user's: every message names a line of theirs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import einops
import pytest
import torch
from einops import einops as einops_code

import funcmodels
from funcmodels.source import is_users

MODEL = """
import {library}
import funcmodels as fm
from funcmodels.source import is_users
from tests import tiny_llama

assert {library}.__file__.startswith({folder!r}), {library}.__file__
assert not is_users({library}.__file__)
fm.compile_to_vllm(tiny_llama.tiny())
"""


@pytest.mark.parametrize(
    "library", [torch, torch.nn.functional, einops, einops_code, funcmodels], ids=str
)
def test_libraries_are_not_the_users(library):
    assert not is_users(library.__file__)


def test_a_users_file_beside_a_library_is_theirs():
    packages = Path(torch.__file__).parents[1]
    assert is_users(str(packages / "torch_of_mine" / "model.py"))
    assert is_users(str(packages / "my_funcmodels" / "torch" / "model.py"))
    assert is_users(str(Path(funcmodels.__file__).parent / "models" / "llama.py"))


@pytest.mark.parametrize("library", ["torch", "einops"])
def test_a_library_may_be_installed_elsewhere(tmp_path, library):
    """Debian's dist-packages, a checkout, a folder on PYTHONPATH."""
    spec = importlib.util.find_spec(library)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (tmp_path / library).symlink_to(spec.submodule_search_locations[0])
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(tmp_path), str(root), os.environ.get("PYTHONPATH", "")])
    code = MODEL.format(library=library, folder=str(tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()
