"""The README and docs keep their promises: commands parse, the Python runs, links lead somewhere, CI runs what it says.

Run: python -m pytest tests/test_readme.py
"""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import model as model_module
import runtime
from model import Transformer
from router import RouterConfig, RouterMeta, save_routers
from tiny import write_base

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
README = PAGES[Path("README.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
COMMAND = re.compile(r"(python|torchrun|pip) ")
PROSE = {page: BLOCK.sub("", text) for page, text in PAGES.items()}
SCRIPTS = [path for pattern in ("*.py", "data/*.py", "data/demo/*.py", "tests/*.py") for path in ROOT.glob(pattern)]


def commands() -> list[tuple[str, str | None]]:
    """Every command of a shell block, with the commit whose code it is for (None: today's)."""
    data = (ROOT / "data" / "README.md").read_text().replace("\\\n", "")
    found = {(re.sub(r"[][]", "", line), None): None for line in re.findall(r"^    (python .*)", data, re.M)}
    for text in PAGES.values():
        for language, block in BLOCK.findall(text):
            commit = re.match(r"git checkout (\w+)\n", block)
            lines = [line for line in block.splitlines() if COMMAND.match(line) and not language]
            found |= dict.fromkeys((line, commit and commit[1]) for line in lines)
    return list(found)


def settings_name(script: Path) -> str | None:
    """The name of the dataclass that a script gives to runtime.cli; None: it is no script."""
    used = re.search(r"= runtime\.cli\((\w+)(, about=__doc__)?\)$", script.read_text(), re.M)
    return used and used[1]


@cache
def names_of(script: Path, kind: str | None = None) -> set[str]:
    """Its settings, read from the source: some scripts import packages that are not there."""
    kind = kind or settings_name(script)
    for node in ast.parse(script.read_text()).body if kind else ():
        if isinstance(node, ast.ImportFrom) and kind in [name.name for name in node.names]:
            return names_of(ROOT / f"{node.module.replace('.', '/')}.py", kind)
        if isinstance(node, ast.ClassDef) and node.name == kind:
            fields = [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
            bases = [base for base in node.bases if isinstance(base, ast.Attribute)]  # settings of a script
            inherited = [names_of(ROOT / f"{base.value.id}.py", base.attr) for base in bases]
            return {"help", *(name.rstrip("_") for name in fields)}.union(*inherited)
    return set()


def parse(script: Path, arguments: list[str]):
    """The settings that a script would make of its arguments. Raises ValueError as it would."""
    spec = importlib.util.spec_from_file_location(f"readme_{script.stem}", script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return runtime.cli(getattr(module, settings_name(script)), arguments)


def git(*words: str) -> str | None:
    """What git prints; None where it fails, or is not there."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


@pytest.mark.parametrize(("command", "commit"), commands(), ids=lambda word: word and word[:60])
def test_every_command_names_a_file_and_settings_that_exist(command, commit):
    words = shlex.split(command)
    if words[0] == "pip" or words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.endswith(".txt"))
        return
    script = next(word for word in words if word.endswith(".py"))
    arguments = words[words.index(script) + 1 :]
    given = re.findall(r"^--(\w+)", "\n".join(arguments), re.M)
    if commit is None:
        assert (ROOT / script).is_file() and set(given) <= names_of(ROOT / script)
        if not script.startswith("tests/"):
            parse(ROOT / script, arguments)  # raises for a value that cannot be
        return
    if git("cat-file", "-e", commit) is None:
        pytest.skip(f"no history here that reaches back to {commit}")
    there = git("show", f"{commit}:{script}") or ""
    assert there, f"{commit} has no {script}"
    if script == "train.py":  # whose settings stand in a file of their own
        there += git("show", f"{commit}:recipe/settings.py") or ""
    for name in given:
        assert re.search(rf"\b{name}\b", there), f"{script} of {commit} knows no --{name}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_setting_named_in_prose_exists(page):
    """`script.py --name=...` is a setting of that script, a bare `--name=...` one of some script."""
    known = {script: names_of(script) for script in SCRIPTS}
    everywhere = set().union(*known.values())
    quoted = [code for code in re.findall(r"`([^`]+)`", PROSE[page]) if not code.startswith(("git ", "pip ", "hf "))]
    for code in quoted:
        script = re.search(r"([\w/]+\.py) ", code)
        names = known[ROOT / script[1]] if script else everywhere
        for name in re.findall(r"(?:^|\s)--([a-z]\w*)", code):
            assert name in names, f"{page}: {code}"


def anchors(page: Path) -> set[str]:
    """What a link may point to within a page, as GitHub derives it from headings."""
    heads = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_file_names_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PROSE[page]):
        name, _, anchor = target.partition("#")
        file = (ROOT / page.parent / name).resolve() if name else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page} links to {target}"
    for name in re.findall(r"`((?:\w+/)*[\w*]+\.(?:py|md|txt|patch))`", PROSE[page]):
        assert list(ROOT.glob(name)), f"{page} names {name}"


def test_python_example_runs(tmp_path):
    """The example, with a tiny random model in the place of the real one: same calls, same names, same shapes."""
    base, routers = write_base(tmp_path / "base"), tmp_path / "routers.safetensors"
    tiny = model_module.load_model(base)
    tiny.add_routers(RouterConfig.of("attn_sequence", (0, 1)))
    table = {"budgets": [0.0, 0.5, 1.0], "thresholds": [[1.0, 1.0], [0.5, 0.5], [0.0, 0.0]]}
    save_routers(routers, tiny, RouterMeta(tiny.routing, [0.5, 0.5], tiny.fingerprint, table))
    example = next(text for language, text in BLOCK.findall(README) if language == "python")
    example = example.replace("checkpoints/smollm2-135m-instruct", str(base))
    example = example.replace("out/demo/routers.safetensors", str(routers))
    names: dict = {}
    exec(example, names)
    assert names["gates"].shape == (2, 1) and names["logits"].shape[:2] == (1, len(names["prompt"]))
    assert 1 <= len(names["answer"]) <= 40 and isinstance(names["model"], Transformer)
    assert torch.isfinite(names["logits"]).all()


def test_file_map_is_whole():
    """Every module and folder of the product stands in the README's list of files, and every entry exists."""
    listed = set(re.findall(r"^\| `([\w.]+/?)` \|", README, re.M)) & {*re.findall(r"`([\w.]+(?:/|\.py))`", README)}
    modules = {path.name for path in ROOT.glob("*.py")}
    assert modules <= listed and {"recipe/", "data/", "docs/", "tests/"} <= listed
    assert all((ROOT / name).exists() for name in listed)


def test_ci_runs_the_readmes_commands():
    script = (ROOT / ".ci" / "run").read_text()
    patterns = re.findall(r"grep -m1 '([^']+)'", script)
    assert len(patterns) == 2
    for pattern in patterns:
        assert re.search(pattern, README, re.M), pattern


def test_readme_is_short_and_calls_one_act_by_one_word():
    assert len(README.encode()) <= 11_000
    for page in (Path("README.md"), Path("docs/EXTEND.md")):
        assert not re.search(r"\b(dropp?e?d?|drops|closed gate|switched off)\b", PROSE.get(page, "")), page
    for page, text in PAGES.items():
        wide = [line for line in PROSE[page].splitlines() if len(line) > 120 and not line.startswith("|")]
        assert not wide, f"{page}: {wide[0]}"
        assert "@@" not in BLOCK.sub("", text) and "TODO" not in text


def test_every_table_of_results_names_commit_and_processor():
    lines = [line for line in PAGES[Path("docs/RESULTS.md")].splitlines() if line]
    ends = [after for row, after in zip(lines, lines[1:]) if row.startswith("|") and not after.startswith("|")]
    assert len(ends) >= 11
    for note in ends:
        measured = re.match(r"Measured at \w{7}\b.*; .*(Intel Xeon|AMD EPYC|NVIDIA H200)", note)
        assert measured or note.startswith(("Computed, not measured", "Read in the script, not measured")), note
