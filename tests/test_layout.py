"""The shape of the project itself: what lies at the top, who imports whom, and which packages the product needs to run.

Run: python -m pytest tests/test_layout.py
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = {path.stem for path in ROOT.glob("*.py")} | {"recipe", "data"}
MODEL = {"runtime", "model", "router"}
ALLOWED = {  # module -> (modules of the project, packages) that it may import
    "runtime": (set(), {"torch"}),
    "router": (set(), {"torch", "safetensors"}),
    "model": ({"router"}, {"torch", "safetensors"}),
    "tokenizer": (set(), {"sentencepiece", "tiktoken", "jinja2"}),
    "convert_hf": ({*MODEL, "tokenizer", "recipe"}, {"torch", "safetensors", "numpy"}),
    "data/stream": ({"runtime"}, set()),
    "data/portions": (set(), set()),
    "data/records": ({"tokenizer", "data"}, set()),
    "data/draw": ({"runtime", "data"}, {"numpy", "torch"}),
    "data/store": ({"runtime", "data"}, set()),
    "data/load": ({"runtime", "data"}, {"numpy", "torch"}),
    "data/rows": ({"tokenizer", "data"}, set()),
    "data/tasks": ({"runtime", "data"}, set()),
    "data/fetch": ({"runtime", "data"}, set()),
    **{
        f"recipe/{path.stem}": ({*MODEL, "recipe", "data"}, {"torch", "safetensors"})
        for path in (ROOT / "recipe").glob("*.py")
    },
    "train": ({*MODEL, "tokenizer", "recipe", "data"}, {"torch", "safetensors", "numpy"}),
    "eval": ({*MODEL, "tokenizer", "recipe", "data"}, {"torch", "numpy"}),
    "sample": ({"runtime", "model", "tokenizer", "recipe", "data"}, {"torch"}),
    "bench": ({*MODEL, "recipe", "data"}, {"torch", "numpy"}),
}
ALLOWED = {module: allowed for module, allowed in ALLOWED.items() if (ROOT / f"{module}.py").exists()}


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports_go_one_way(module):
    found = imports(ROOT / f"{module}.py")
    ours, packages = found & PROJECT, found - PROJECT - set(sys.stdlib_module_names)
    assert ours <= ALLOWED[module][0] and packages <= ALLOWED[module][1], f"{module} imports {ours}, {packages}"


def test_data_scripts_need_no_more_than_the_product():
    for path in (ROOT / "data").rglob("*.py"):
        packages = imports(path) - PROJECT - set(sys.stdlib_module_names)
        assert packages <= {"torch", "numpy", "safetensors", "data"}, f"{path.name} imports {packages}"


def test_top_level_holds_only_what_it_should():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked.stdout.splitlines()}
    modules = {f"{module}.py" for module in ALLOWED}
    assert top <= {
        "README.md",
        "LICENSE",
        "requirements.txt",
        "data",
        "tests",
        "recipe",
        "docs",
        ".ci",
        ".gitignore",
        *modules,
    }
    docs = {name for name in tracked.stdout.splitlines() if name.startswith("docs/")}
    assert {name for name in docs if not name.startswith("docs/figures/")} == {"docs/RESULTS.md", "docs/EXTEND.md"}
    assert not [
        name
        for name in tracked.stdout.splitlines()
        if name.endswith((".safetensors", ".gguf", ".pt", ".bin", ".model", ".tiktoken"))
    ]


def test_lines_have_at_most_120_columns():
    files = [file for part in ("*.py", "recipe/*.py", "data/**/*.py", "tests/*.py") for file in ROOT.glob(part)]
    lines = [(file.name, line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    assert not [pair for pair in lines if len(pair[1]) > 120]


def test_runtime_requirements_are_exactly_five():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert sorted(line.split("==")[0] for line in lines) == [
        "numpy",
        "safetensors",
        "sentencepiece",
        "tiktoken",
        "torch",
    ]
    assert "torch==2.13.0" in lines and all("==" in line for line in lines)
