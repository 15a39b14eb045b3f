"""The paper's tables: commands run once, killed runs go on, every number of a page is one of its JSON.

Run: python -m pytest tests/test_results.py
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import results
import results_page
import runtime
from model import load_model
from router import RouterConfig, RouterMeta, save_routers
from tiny import CONFIG, write_base, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?![\w.]*\w)")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base, a router file that holds a list, texts to read."""
    folder = write_base(tmp_path_factory.mktemp("results") / "base", replace(CONFIG, max_seq_len=256))
    model = load_model(folder)
    torch.manual_seed(1)
    model.add_routers(RouterConfig.of("attn_token", (1, 2, 3), kv="all"))
    for router in model.routers():
        torch.nn.init.normal_(router.weight)
    budgets = {"budgets": [0.0, 0.5, 1.0], "thresholds": [[1.0] * 3, [0.5] * 3, [0.0] * 3]}
    orders = {"greedy": ["2", "1", "3"]}
    save_routers(folder / "r.safetensors", model, RouterMeta(model.routing, [0.5] * 3, model.fingerprint, budgets,
                                                              orders=orders))
    rows = [{"prompt": word * 2, "response": f"{word} and {word}"} for word in ("one", "two", "six")]
    write_jsonl(folder / "texts.jsonl", [row | {"split": "heldout"} for row in rows])
    return folder


def settings(base, tmp_path, *words: str) -> list[str]:
    common = [f"--model={base}", f"--out={tmp_path}/docs", f"--work={tmp_path}/work", "--threads=1", "--dtype=float32"]
    return [*common, f"--routers={base}/r.safetensors", f"--texts={base}/texts.jsonl", "--granularities=attn_token",
            "--skipped=0.25", "--routed=3", "--rounds=1", "--rows=3", *words]


def begin(base, tmp_path, monkeypatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["results.py", *settings(base, tmp_path, *words)])
    results.main()


def read(tmp_path, name: str) -> dict:
    return json.loads((tmp_path / "docs" / "figures" / f"{name}.json").read_text())


def rows_of_a_bench(step: results.Step) -> None:
    """What bench.py would write, at once."""
    budgets = next(word for word in step.settings if word.startswith("--budget=")).removeprefix("--budget=").split(",")
    rows = [{"phase": phase, "batch": 1, "context": 64, "route": "gather", "budget": float(budget), "capacity": 0.625,
             "speedup": 1.125, "ceiling": 1.0625, "ratio": 1.059, "kv_bytes": 2500000}
            for phase in ("prefill", "decode") for budget in budgets]
    runtime.write_json(step.result, {"rows": rows})


def results_of_a_command(step: results.Step) -> None:
    """What bench.py, train.py, or eval.py on two tasks would write, at once."""
    losses = {"capacity": 0.5, "ceiling": 1.07, "dense": 2.5, "routed": 2.75, "greedy": 2.8, "random": 3.5}
    if step.script == "bench.py":
        return rows_of_a_bench(step)
    if step.script == "train.py":
        summary = {"seconds": 61.0, "tokens_per_second": 97.0, "steps": 3, "peak_memory_bytes": 2_000_000,
                   "trainable_parameters": 96, "optimizer_bytes": 384, "data": {"used": 40}, "heldout_tokens": 90,
                   "budget": 0.5, "report": [losses | {"budget": 0.5, "gap_closed": 0.17}]}
        return runtime.write_json(step.result, summary)
    changes = {"acc_norm": {"difference": -0.04, "stderr": 0.02}, "gold_logprob": {"difference": -0.3, "stderr": 0.1}}
    found = {"acc": 0.32, "acc_stderr": 0.06, "acc_norm": 0.36, "acc_norm_stderr": 0.07, "n": 50, "shots": 0,
             "capacity": 0.51}
    right = 0.75 if "--control=greedy" in step.settings else 0.5
    items = {"acc": ["1", "0"], "gold_logprob": [-right, -right - 0.5], "sha": ["a", "b"]}
    names = ("arc_easy", "piqa")
    report = {"results": dict.fromkeys(names, found), "items": dict.fromkeys(names, items)}
    if any(word.startswith("--against=") for word in step.settings):
        report["against"] = {"tasks": dict.fromkeys(names, changes)}
    runtime.write_json(step.result, report)


def test_every_table_of_tasks_and_tuning_has_a_cell_for_each_column(base, tmp_path, monkeypatch):
    def call(self, step):
        step.result.parent.mkdir(parents=True, exist_ok=True)
        results_of_a_command(step)

    monkeypatch.setattr(results.Run, "call", call)
    tables = ("drop", "granularity", "tuning", "layers", "samples", "seeds")
    words = [word for word in settings(base, tmp_path) if not word.startswith(("--routers", "--granularities"))]
    monkeypatch.setattr("sys.argv", ["results.py", *words, "--tasks=arc_easy,piqa", f"--tables={','.join(tables)}"])
    results.main()
    page = (tmp_path / "docs" / "RESULTS.md").read_text()
    for name in tables:
        part, found = page.split(f"<!-- results {name} -->")[1].split(results_page.END)[0], read(tmp_path, name)
        widths = [line.count("|") for line in part.splitlines() if line.startswith("|")]
        assert len(widths) == 2 + len(found["rows"]) and found["rows"] and not found["missing"]
        assert len(set(widths)) == 1 and not unfounded(part, found)
    assert "| attn_sequence | 25 % | pooled | 0.510 | +0.000 ± 0.000 | +0.250 ± 0.000 | +0.000 ± 0.000 |" in page
    assert "| attn_token, kv=all |" in page and "-0.040 ± 0.014" in page and "-0.300 ± 0.071" in page


@pytest.mark.parametrize("granularity, setting", [
    ("attn_token", "--calibrate=100"), ("mlp_sequence", "--budget_per=sequence")])
def test_routers_run_the_budget_of_their_lists_on_tasks(base, tmp_path, granularity, setting):
    words = [word for word in settings(base, tmp_path) if not word.startswith("--routers")]
    commands = results.Commands(runtime.cli(results.ResultsConfig, words))
    routed, listed = (commands.accuracy(granularity, 0.25, control)[-1].settings for control in (None, "greedy"))
    assert setting in routed and setting not in listed and "--control=greedy" in listed
    own = results.Commands(runtime.cli(results.ResultsConfig, [*words, "--routed_by=hold_budget"]))
    assert setting not in own.accuracy(granularity, 0.25)[-1].settings


def test_commands_beside_each_other_run_once_and_timings_alone(base, tmp_path, monkeypatch):
    running, most, called = [], {}, []

    def call(self, step):
        running.append(step.script)
        called.append(step.command)
        time.sleep(0.02)
        most[step.script] = max(most.get(step.script, 0), len(running))
        step.result.parent.mkdir(parents=True, exist_ok=True)
        results_of_a_command(step)
        running.remove(step.script)

    monkeypatch.setattr(results.Run, "call", call)
    words = [word for word in settings(base, tmp_path) if not word.startswith(("--routers", "--granularities"))]
    words += ["--tasks=arc_easy,piqa", "--tables=drop,granularity,seeds", "--jobs=3"]
    monkeypatch.setattr("sys.argv", ["results.py", *words])
    results.main()
    assert len(set(called)) == len(called) and most == {"train.py": 3, "eval.py": 3, "bench.py": 1}
    assert not any(read(tmp_path, name)["missing"] for name in ("drop", "granularity", "seeds"))
    apart = [json.dumps(read(tmp_path, "drop")["rows"][at]["values"]) for at in (0, 1)]
    monkeypatch.setattr("sys.argv", ["results.py", *words[:-1], f"--out={tmp_path}/again", f"--work={tmp_path}/again"])
    results.main()
    again = json.loads((tmp_path / "again" / "figures" / "drop.json").read_text())["rows"]
    assert [json.dumps(again[at]["values"]) for at in (0, 1)] == apart


def test_where_the_time_ends_all_jobs_end(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results.Run, "call", lambda self, step: (_ for _ in ()).throw(results.Stopped))
    begin(base, tmp_path, monkeypatch, "--tables=speed,drop", "--jobs=2")
    assert "the same command goes on" in capsys.readouterr().out and not read(tmp_path, "speed")["rows"]


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_and_repeats_nothing(base, tmp_path, monkeypatch):
    called = []

    def call(self, step):
        if len(called) == 3:
            raise Killed
        called.append(step.command)
        step.result.parent.mkdir(parents=True, exist_ok=True)
        rows_of_a_bench(step)

    monkeypatch.setattr(results.Run, "call", call)
    with pytest.raises(Killed):
        begin(base, tmp_path, monkeypatch, "--tables=speed")
    found = read(tmp_path, "speed")
    assert len(found["rows"]) == 3 and len(found["missing"]) == len(results.GRANULAR) - 3
    again = []
    monkeypatch.setattr(results.Run, "call", lambda self, step: (again.append(step.command), rows_of_a_bench(step)))
    begin(base, tmp_path, monkeypatch, "--tables=speed")
    assert not set(again) & set(called) and len(again) == len(results.GRANULAR) - 3
    assert read(tmp_path, "speed")["rows"][:3] == found["rows"] and not read(tmp_path, "speed")["missing"]
    begin(base, tmp_path, monkeypatch, "--tables=speed")
    assert len(again) == len(results.GRANULAR) - 3
    begin(base, tmp_path, monkeypatch, "--tables=speed", "--rounds=2")  # other settings: measured anew, in their place
    assert len(again) == 2 * len(results.GRANULAR) - 3 and len(read(tmp_path, "speed")["rows"]) == len(results.GRANULAR)


def test_a_failed_row_is_told_and_the_others_are_measured(base, tmp_path, monkeypatch, capsys):
    def call(self, step):
        if "mlp_token" in step.name:
            raise results.Failed("no room")
        step.result.parent.mkdir(parents=True, exist_ok=True)
        rows_of_a_bench(step)

    monkeypatch.setattr(results.Run, "call", call)
    with pytest.raises(SystemExit) as stop:
        begin(base, tmp_path, monkeypatch, "--tables=speed")
    assert stop.value.code == 1 and "speed, mlp_token: no room" in capsys.readouterr().err
    assert [row["about"]["granularity"] for row in read(tmp_path, "speed")["missing"]] == ["mlp_token"]
    page = (tmp_path / "docs" / "RESULTS.md").read_text()
    assert "--tables=speed` does it: mlp_token." in page and "| block_token | prefill, 64 tokens, batch 1 |" in page


def numbers_in(page: str) -> list[str]:
    """Every number in the rows of a page's tables, without their heads."""
    lines = page.splitlines()
    heads = {line for line, after in zip(lines, lines[1:]) if after.startswith("| ---")}
    cells = [cell for line in lines if line.startswith("|") and line not in heads for cell in line.split("|")]
    return [number.replace(",", "") for cell in cells for number in NUMBER.findall(cell)]


def values_in(found) -> list[float]:
    """Every number that a JSON document holds, its names and texts included."""
    if isinstance(found, dict):
        return [value for part in (*found, *found.values()) for value in values_in(part)]
    if isinstance(found, list):
        return [value for part in found for value in values_in(part)]
    if isinstance(found, str):
        return [float(number.replace(",", "")) for number in NUMBER.findall(found)]
    return [] if found is None or isinstance(found, bool) else [float(found)]


def unfounded(page: str, found: dict) -> list[str]:
    """Numbers of a page that are no number of the JSON, rounded, as a share in percent or as bytes in megabytes."""
    held = [value * unit for value in values_in(found) for unit in (1, 100, 1e-6)]
    held += [1 - value for value in values_in(found)]
    missing = []
    for number in set(numbers_in(page)):
        digits = len(number.partition(".")[2])
        if not any(abs(value - float(number)) <= 0.5001 * 10**-digits for value in held):
            missing.append(number)
    return missing


def test_the_check_of_numbers_finds_a_wrong_one():
    assert unfounded("| a2 | 12.5 % | 1.50 MB | -0.25 |", {"a": [0.125, 1_500_000, -0.2512]}) == []
    assert sorted(unfounded("| 0.26 | 7 |", {"a": [0.25]})) == ["0.26", "7"]


def test_a_real_row_its_page_and_its_figures(base, tmp_path, monkeypatch):
    """eval.py itself reads and answers; the page says nothing that is not in the JSON."""
    readme = tmp_path / "README.md"
    readme.write_text(f"Read me.\n{results_page.BEGIN.format('readme')}\n{results_page.END}\nThe end.\n")
    begin(base, tmp_path, monkeypatch, "--tables=kv,fidelity")
    row = read(tmp_path, "fidelity")["rows"][0]
    step = row["steps"][0]
    assert step["command"].startswith("python eval.py ") and "--fidelity=" in step["command"]
    assert re.match(r"\w{7}", step["commit"]) and step["processor"] and step["seconds"] > 0
    assert step["dtype"] == "float32" and step["threads"] == 1
    assert {"dense", "routed", "greedy", "mean_route", "random", "int8", "int4"} == set(row["values"]["variants"])
    page = (tmp_path / "docs" / "RESULTS.md").read_text() + readme.read_text()
    assert readme.read_text().startswith("Read me.\n") and readme.read_text().endswith("\nThe end.\n")
    for name in ("fidelity", "budget", "kv", "readme"):
        part = page.split(f"<!-- results {name} -->")[1].split(results_page.END)[0]
        assert numbers_in(part) and not unfounded(part, read(tmp_path, results_page.SOURCE.get(name, name)))
    for name in ("fidelity", "kv"):
        assert (tmp_path / "docs" / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_end_of_the_time_ends_the_command_too(base, tmp_path):
    slow, mark = tmp_path / "slow.py", tmp_path / "mark"
    slow.write_text(f"import time\ntime.sleep(3)\nopen({str(mark)!r}, 'w')\n")
    cfg = runtime.cli(results.ResultsConfig, settings(base, tmp_path, "--seconds=0.5"))
    with pytest.raises(results.Stopped):
        results.Run(cfg).call(results.Step("slow", str(slow), (), tmp_path / "work" / "slow.json"))
    time.sleep(3.5)
    assert not mark.exists()


def test_items_of_a_command_with_other_settings_are_left(base, tmp_path):
    """eval.py goes on from its --samples, and refuses those of another command: neither may stand in the way."""
    custom, kept = write_jsonl(tmp_path / "q.jsonl", [{"question": "a", "choices": ["b", "c"], "answer": 0}]), []
    samples = tmp_path / "work" / "one.jsonl"
    run = results.Run(runtime.cli(results.ResultsConfig, settings(base, tmp_path, f"--data={tmp_path}")))
    for dtype in ("float32", "float32", "bfloat16"):
        own = (f"--model={base}", f"--custom={custom}", f"--dtype={dtype}", f"--samples={samples}")
        step = results.Step("one", "eval.py", (*own, f"--out={tmp_path}/work/one.json"), tmp_path / "work" / "one.json")
        run.call(step)
        kept.append([json.loads(line)["run"] for line in samples.read_text().splitlines()])
        assert step.log.read_text().startswith(f"$ {step.command}\n")
    assert kept[0] == kept[1] != kept[2] and list(map(len, kept)) == [1, 1, 1]


@pytest.mark.parametrize("page", ["README.md", "docs/RESULTS.md"])
def test_generated_tables_are_those_of_the_committed_json(page):
    text = (ROOT / page).read_text()
    assert results_page.filled(text, ROOT / "docs") == text
    for part in text.split("<!-- results ")[1:]:
        name, _, rest = part.partition(" -->")
        path = ROOT / "docs" / "figures" / f"{results_page.SOURCE.get(name, name)}.json"
        body = rest.split(results_page.END)[0]
        assert path.exists() or not numbers_in(body)
        assert not path.exists() or not unfounded(body, json.loads(path.read_text()))


def test_wrong_settings_are_told(base, tmp_path):
    words = [sys.executable, ROOT / "tests" / "results.py", *settings(base, tmp_path, "--tables=fidelty")]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode == 2 and "--tables names 'fidelty'" in found.stderr
