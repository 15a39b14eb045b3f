"""What tests/results.py measured, as tables between the markers of a page, and as figures.

    <!-- results NAME --> ... <!-- end of results -->      in OUT/RESULTS.md, and `readme` in the README beside OUT

Every number of a table is one of its JSON, rounded; what was not measured stands below with its command.
"""

import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import runtime
from results_figures import CONTROLS, FIGURES, curves, draw

BEGIN, END = "<!-- results {} -->", "<!-- end of results -->"
PAPER = 0.25
TITLES = {
    "fidelity": "How far its words are from the dense model's",
    "budget": "One router file at every budget",
    "drop": "Against Attention Drop",
    "granularity": "Granularity",
    "routes": "What runs where",
    "speed": "Speed by budget, beside its ceiling",
    "kv": "Keys and values",
    "tuning": "What tuning took",
    "layers": "Number of routed layers",
    "samples": "Number of samples",
    "sources": "Source of the tuning data",
    "seeds": "Three seeds",
    "ceilings": "Ceilings at 7 to 8 billion parameters",
}


# -----------------------------------------------------------------------------
# Cells


def percent(share: float) -> str:
    return f"{share * 100:.4g} %"


def with_error(value: float, error: float | None, form: str = ".3f") -> str:
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head, rows = list(head), [list(row) for row in rows]
    assert all(len(row) == len(head) for row in rows), f"a row has not the {len(head)} cells of {head}"
    lines = [f"| {' | '.join(head)} |", "| " + " | ".join(["---"] * len(head)) + " |"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)] if rows else []


def name_of(granularity: str) -> str:
    return granularity + (", kv=all" if granularity in ("attn_token", "both_token") else "")


# -----------------------------------------------------------------------------
# Tables: each from the rows of its JSON


def fidelity_table(rows: list[dict]) -> list[str]:
    """All variants; dense and its rounded copies once."""
    head = ["variant", "capacity", "KL ± se", "KL 99.9 %", "same top", "acceptance", "own answers: KL ± se", "same top",
            "agreed tokens", "repeated", "cut"]
    lines, seen = [], set()
    for row in rows:
        for name, found in row["values"]["variants"].items():
            general = name in ("dense", "int8", "int4")
            title = name if general else f"{row['about']['granularity']}: {name.replace('_', ' ')}"
            if title not in seen:
                lines.append(fidelity_line(title, found, row["values"]["items"]))
            seen.add(title)
    return table(head, sorted(lines, key=lambda line: line[0] not in ("dense", "int8", "int4")))


def fidelity_line(title: str, found: dict, items: int) -> list[str]:
    a, cells = found["answers"], [title, f"{found.get('capacity', 1.0):.3f}"]
    for kind in ("file", "own"):
        if kind not in found:  # the dense model itself
            cells += [""] * (4 if kind == "file" else 2)
            continue
        r = found[kind]
        cells += [with_error(r["kl"], r["kl_stderr"], ".4f")]
        cells += [f"{r['kl_p999']:.2f}"] if kind == "file" else []
        cells += [f"{r['same_top'] * 100:.1f} %"]
        cells += [f"{r['acceptance']:.4f}"] if kind == "file" else []
    cells += [with_error(a["agreement"], a["agreement_stderr"], ".1f")]
    return [*cells, f"{a['repetition'] * 100:.1f} %", f"{a['cut']} of {items}"]


def budget_table(rows: list[dict]) -> list[str]:
    head = ["granularity", "skipped", "capacity", "ceiling", "loss, dense", "loss, routed", "difference ± se",
            "KL routed ± se", "KL list", "KL mean route", "KL random", "KL routed - list ± se"]
    return table(head, [budget_line(row) for row in sorted(rows, key=place)])


def readme_table(rows: list[dict]) -> list[str]:
    """The same in few columns."""
    lines = []
    for row in sorted(rows, key=place):
        values, found = row["values"], curves(row)
        loss = f"{values['loss_routed']:.3f} ({values['loss_dense']:.3f})"
        cells = [f"{values['capacity']:.2f}", f"{values['ceiling']:.2f}", loss]
        cells.append(with_error(found["routed"]["kl"], found["routed"]["kl_stderr"]))
        cells += [kl(found, name) for name in CONTROLS]
        lines.append([name_of(row["about"]["granularity"]), percent(row["about"]["skipped"]), *cells])
    head = ["granularity", "skipped", "capacity", "ceiling", "loss (dense)", "KL to dense", *CONTROLS]
    return table(head, lines)


def place(row: dict) -> tuple:
    return row["about"]["granularity"], row["about"]["skipped"]


def budget_line(row: dict) -> list[str]:
    about, values, found = row["about"], row["values"], curves(row)
    change, cells = values["loss_change"], [name_of(about["granularity"]), percent(about["skipped"])]
    cells += [f"{values[name]:.3f}" for name in ("capacity", "ceiling", "loss_dense", "loss_routed")]
    cells.append(with_error(change["difference"], change["stderr"], "+.3f"))
    cells.append(with_error(found["routed"]["kl"], found["routed"]["kl_stderr"]))
    cells += [kl(found, name) for name in CONTROLS]
    pair = found["list"]["paired"]["kl"] if "list" in found else None
    return [*cells, "" if pair is None else with_error(pair["difference"], pair["stderr"], "+.3f")]


def kl(found: dict, name: str) -> str:
    return f"{found[name]['kl']:.3f}" if name in found else ""


MEANS = ("mean ± se", "difference from dense ± se", "of the right choice's log-probability ± se")


def task_cells(values: dict, tasks: list[str]) -> list[str]:
    """Each task, and what MEANS names, averaged over tasks."""
    cells = []
    for name in tasks:
        entry = values["tasks"].get(name)
        cells.append("" if entry is None else with_error(entry["value"], entry["stderr"]))
    for name, error, form in (("value", "stderr", ".3f"), ("change", "change_stderr", "+.3f"),
                              ("gold", "gold_stderr", "+.3f")):
        found = values.get(f"mean_{name}"), values.get(f"mean_{error}")
        cells.append("" if found[0] is None else with_error(*found, form))
    return cells


def task_names(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["values"]["tasks"]))


def drop_table(rows: list[dict]) -> list[str]:
    tasks = task_names(rows)
    head = ["what skips", "skipped", "capacity", *tasks, *MEANS]
    return table(head, [[row["about"]["what"], percent(row["about"]["skipped"]), f"{row['values']['capacity']:.3f}",
                         *task_cells(row["values"], tasks)] for row in rows])


def granularity_table(rows: list[dict]) -> list[str]:
    tasks, lines = task_names(rows), []
    for row in rows:
        speeds = {"prefill": "1", "decode": "1"}
        for own in row["values"].get("speed", ()):
            speeds[own["phase"]] = f"{own['speedup']:.3f} ({own['ceiling']:.3f})"
        tuned = row["values"].get("tuning")
        losses = ["", "", ""] if tuned is None else [f"{tuned[name]:.3f}" for name in ("dense", "routed", "list")]
        lines.append([name_of(row["about"]["granularity"]), *speeds.values(), *losses,
                      f"{row['values']['capacity']:.3f}", *task_cells(row["values"], tasks)])
    head = ["granularity", "prefill (ceiling)", "decode (ceiling)", *LOSSES[2:5], "capacity"]
    return table([*head, *tasks, *MEANS], lines)


def speed_table(rows: list[dict]) -> list[str]:
    lines, most = [], 0
    for row in rows:
        for phase in ("prefill", "decode"):
            own = [own for own in row["values"]["rows"] if own["phase"] == phase and own["route"] == "gather"]
            cells = [f"{o['capacity']:.3f}: {o['speedup']:.3f} ({o['ceiling']:.3f})" for o in own]
            regime = [f"{phase}, {o['context']:,} tokens, batch {o['batch']}" for o in own[:1]]
            lines.append([name_of(row["about"]["granularity"]), *regime, *cells])
            most = max(most, len(cells))
    head = ["granularity", "regime", *["capacity: speed-up (ceiling)"] * most]
    return table(head, [line + [""] * (len(head) - len(line)) for line in lines])


def kv_table(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        about, values = row["about"], row["values"]
        lines.append([about["model"], f"{about['context']:,}", str(values["bytes_per_number"]),
                      *(f"{size / 1e6:,.1f} MB" for size in values["bytes"])])
    shares = rows[0]["values"]["shares"] if rows else ()
    return table(["model", "tokens", "bytes a number", *(f"{percent(share)} skipped" for share in shares)], lines)


def ceilings_table(rows: list[dict]) -> list[str]:
    lines = []
    for own in rows[0]["values"]["analytic"] if rows else ():
        regime = f"{own['phase']}, batch {own['batch']}, {own['context']:,} tokens"
        lines.append([own["model"], regime, own["binds"], *(f"{value:.3f}" for value in own["ceilings"].values())])
    return table(["model", "regime", "bound by", "a quarter of attentions skipped", "half of them", "a quarter of MLPs",
                  "a quarter of blocks"], lines)


def tuning_table(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        v = row["values"]
        lines.append([row["about"]["granularity"], f"{v['examples']:,}", str(v["steps"]), f"{v['seconds']:,.0f}",
                      f"{v['tokens_per_second']:,.0f}", f"{v['peak_memory_bytes'] / 1e6:,.0f} MB",
                      f"{v['trainable_parameters']:,}", f"{v['optimizer_bytes'] / 1e6:.2f} MB", *loss_cells(v)])
    return table(["granularity", "examples", "steps", "seconds in all", "tokens a second", "peak memory",
                  "trained parameters", "optimizer", *LOSSES], lines)


LOSSES = ("capacity", "ceiling", "held out: dense", "routed", "best list", "random", "gap closed")


def loss_cells(v: dict) -> list[str]:
    cells = [f"{v[name]:.3f}" for name in ("capacity", "ceiling", "dense", "routed", "list", "random")]
    return [*cells, "n/a" if v["gap_closed"] is None else f"{v['gap_closed'] * 100:.0f} %"]


def tuned_table(title: str) -> Callable[[list[dict]], list[str]]:
    """A table of runs of train.py that differ in one thing."""

    def build(rows: list[dict]) -> list[str]:
        tasks, lines = task_names(rows), []
        for row in sorted(rows, key=number_of):
            v = row["values"]
            lines.append([str(*row["about"].values()), *loss_cells(v), *task_cells(v, tasks)])
        return table([title, *LOSSES, *tasks, *MEANS], lines)

    return build


def number_of(row: dict) -> int:
    """What a run was given, where that is a number; sources have none and stay in their order."""
    (given,) = row["about"].values()
    return given if isinstance(given, int) else 0


def routes_table(rows: list[dict]) -> list[str]:
    head = ["granularity", "variance of routes within tasks", "between tasks", "(task, layer) pairs that never vary"]
    names, lines = ("variance_within_tasks", "variance_between_tasks"), []
    for row in rows:
        found = row["values"]["routes"]
        constant = f"{found['constant_task_layer_pairs'] * 100:.0f} %"
        lines.append([name_of(row["about"]["granularity"]), *(f"{found[name]:.3f}" for name in names), constant])
    return table(head, lines)


def seeds_table(rows: list[dict]) -> list[str]:
    """Differences of the right choice's log-probability and of accuracy, from each run's own controls."""
    beside, lines = ("dense", "greedy", "random:0"), []
    for row in rows:
        about, values = row["about"], row["values"]
        cells = [name_of(about["granularity"]), percent(about["skipped"]), str(about["seed"])]
        cells += [f"{values['capacity']:.3f}"]
        for metric, form in (("gold_logprob", "+.3f"), ("acc", "+.4f")):
            cells += [with_error(*values[f"{metric} - {other}"], form) for other in beside]
        lines.append(cells)
    heads = [f"{what} - {other}" for what in ("log-probability", "accuracy") for other in beside]
    return table(["routers", "skipped", "seed", "capacity", *heads], lines)


TABLES = {name: globals()[f"{name}_table"] for name in (*TITLES, "readme") if f"{name}_table" in globals()}
TABLES |= {"layers": tuned_table("routed layers"), "samples": tuned_table("samples"), "sources": tuned_table("source")}
COMPUTED = ("kv", "ceilings")
SOURCE = {"budget": "fidelity", "readme": "fidelity"}  # tables that show another one's rows
ONE_SHARE = ("fidelity", "readme")  # tables that show the rows at the paper's share of skipped places


# -----------------------------------------------------------------------------
# Pages


def section(name: str, found: dict) -> str:
    """What stands between the markers of a table."""
    rows = [row for row in found["rows"] if name not in ONE_SHARE or row["about"]["skipped"] == PAPER]
    lines = TABLES[name](rows)
    if lines:
        lines += ["", "Computed, not measured: from sizes alone." if name in COMPUTED else note(rows)]
    if name in FIGURES and rows:
        lines += ["", f"![{TITLES[name]}](figures/{name}.png)"]
    if name == "readme" and rows:
        lines += ["", f"![{TITLES['fidelity']}](docs/figures/fidelity.png)"]
    if name not in SOURCE and found["missing"]:
        lines += not_measured(name, found["missing"])
    return "\n".join(lines).strip("\n")


def note(rows: list[dict]) -> str:
    """By which code and where the rows were measured."""
    steps = [step for row in rows for step in row["steps"]]
    commits = list(dict.fromkeys(step["commit"] for step in steps if step["commit"]))
    machines = {f"{step['processor']}, threads: {step['threads']}, {step['dtype']}" for step in steps}
    return f"Measured at {', '.join(commits)}; {' and '.join(sorted(machines))}."


def not_measured(name: str, missing: list[dict]) -> list[str]:
    """Rows that lack: those that a run would make, and those that need what is not at hand, with their commands."""
    lines, due = [], [words(row) for row in missing if not row["lacks"]]
    if due:
        text = f"Not measured yet, `python tests/results.py --tables={name}` does it: {'; '.join(due)}."
        lines += ["", *textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)]
    if lacking := [row for row in missing if row["lacks"]]:
        lines += ["", "Not measured:", "", "```"]
        for row in lacking:
            lines += [f"# {words(row)}: {row['lacks']}", *row["commands"][:1]]
        lines += ["```"]
    return lines


def words(row: dict) -> str:
    """What a row is about."""
    return ", ".join(percent(value) if isinstance(value, float) else str(value) for value in row["about"].values())


def write(out: Path) -> None:
    """Fill the markers of the page and of the README beside it, and draw the figures."""
    pages = [out / "RESULTS.md", *(path for path in [out.parent / "README.md"] if path.exists())]
    if not pages[0].exists():
        body = "\n\n".join(f"## {title}\n\n{BEGIN.format(name)}\n{END}" for name, title in TITLES.items())
        runtime.write_atomic(pages[0], lambda path: path.write_text(f"# Results\n\n{body}\n", encoding="utf-8"))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        new = filled(text, out)
        if new != text:
            runtime.write_atomic(page, lambda path, new=new: path.write_text(new, encoding="utf-8"))
    draw(out / "figures")


def filled(text: str, out: Path) -> str:
    """A page with what stands in the JSON between its markers; a table without JSON keeps what it has."""

    def replaced(match: re.Match) -> str:
        name = match[1]
        path = out / "figures" / f"{SOURCE.get(name, name)}.json"
        if not path.exists():
            return match[0]
        body = section(name, runtime.read_json(path))
        return "\n".join([BEGIN.format(name), *(["", body, ""] if body else []), END])

    return re.sub(BEGIN.format(r"(\w+)") + f"\n.*?{END}", replaced, text, flags=re.S)
