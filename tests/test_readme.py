"""The README keeps its promises: its commands parse, its Python runs, its files exist, and CI runs what it says.

Run: python -m pytest tests/test_readme.py
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import model as model_module
import runtime
from model import Transformer
from router import RouterConfig, RouterMeta, save_routers
from test_train import base  # noqa: F401  the tiny checkpoint with a tokenizer that the training tests use

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
SHELL = [text for page in PAGES for language, text in re.findall(r"```(\w*)\n(.*?)```", page, re.S) if language == ""]
COMMANDS = [line for text in SHELL for line in text.splitlines() if re.match(r"(python|torchrun|pip) ", line)]
CONFIGS = {"train.py": ("train", "TrainConfig"), "eval.py": ("eval", "EvalConfig"), "bench.py": ("bench", "BenchConfig")}


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_names_a_file_and_settings_that_exist(command):
    words = shlex.split(command)
    if words[0] == "pip" or words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.endswith(".txt"))
        return
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    if script in CONFIGS:
        module, name = CONFIGS[script]
        arguments = words[words.index(script) + 1:]
        settings = runtime.cli(getattr(importlib.import_module(module), name), arguments)  # exits with status 2 for an unknown name
        assert settings is not None


def test_python_example_runs(base, tmp_path):
    """The example, with a tiny random model in the place of the real one: same calls, same names, same shapes."""
    tiny = model_module.load_model(base)
    tiny.add_routers(RouterConfig.of("attn_sequence", (0, 1)))
    table = {"budgets": [0.0, 0.5, 1.0], "thresholds": [[1.0, 1.0], [0.5, 0.5], [0.0, 0.0]]}
    save_routers(tmp_path / "routers.safetensors", tiny, RouterMeta(tiny.routing, [0.5, 0.5], tiny.fingerprint, table))
    example = next(text for language, text in BLOCKS if language == "python")
    example = example.replace("checkpoints/smollm2-135m-instruct", str(base)).replace("out/demo/routers.safetensors", str(tmp_path / "routers.safetensors"))
    names: dict = {}
    exec(example, names)
    assert names["gates"].shape == (2, 1) and names["logits"].shape[:2] == (1, len(names["prompt"]))
    assert 1 <= len(names["answer"]) <= 40 and isinstance(names["model"], Transformer) and torch.isfinite(names["logits"]).all()


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"^\| `(\w+(?:\.py|/))` \|", README, re.M):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!http)([\w./]+)\)", README):
        assert (ROOT / name).exists(), name


def test_ci_runs_the_readmes_commands():
    script = (ROOT / ".ci" / "run").read_text()
    for pattern in re.findall(r"grep -m1 '([^']+)'", script):
        assert re.search(pattern, README, re.M), pattern


def test_no_gap_was_left_in_the_readme():
    assert "@@" not in README and "TODO" not in README
