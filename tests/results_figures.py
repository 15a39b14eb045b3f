"""The figures of tests/results.py, each from the JSON of one table; grey, so that they need no colours to be read."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import runtime

STYLES = {  # by variant: marker, line, grey
    "routed": ("o", "-", "0.0"),
    "list": ("s", "--", "0.35"),
    "mean route": ("^", "-.", "0.35"),
    "random": ("x", ":", "0.35"),
}
CONTROLS = tuple(STYLES)[1:]
UNITS = {"sequence": ("o", "0.0"), "token": ("s", "0.5")}
SHARES = (("-", "0.0"), ("--", "0.2"), ("-.", "0.4"), (":", "0.5"))
DPI = 130


def panels(count: int, width: float, height: float, rows: int = 1, **more):
    """A figure with a white ground, also on dark pages, and its axes, `count` in each row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (width * count, height * rows)
    figure, axes = plt.subplots(rows, count, figsize=size, squeeze=False, facecolor="white", **more)
    return figure, list(axes.flat)


def fidelity_figure(rows: list[dict]):
    """KL to the dense model against the share that is skipped: routers, their controls, and rounded weights."""
    kinds = list(dict.fromkeys(row["about"]["granularity"] for row in rows))
    figure, axes = panels(len(kinds), 4.6, 3.8, sharey=True)
    for axis, granularity in zip(axes, kinds):
        own = sorted((row for row in rows if row["about"]["granularity"] == granularity), key=skipped)
        draw_curves(axis, own)
        for row in rows:
            for name in ("int8", "int4"):
                if name in row["values"]["variants"]:
                    kl = row["values"]["variants"][name]["file"]["kl"]
                    axis.axhline(kl, color="0.7", lw=1, zorder=0)
                    axis.annotate(f"weights in {name}", (0.02, kl), xycoords=("axes fraction", "data"), fontsize=8,
                                  ha="left", va="bottom", color="0.3")
        axis.set_title(granularity)
        axis.set_xlabel("skipped, % of the model's attentions" if granularity.startswith("attn") else "skipped, %")
        axis.set_xlim(0, 105 * max(map(skipped, rows)))
        axis.set_yscale("log")
    axes[0].set_ylabel("KL to the dense model, nats a token")
    axes[0].legend(fontsize=8)
    return figure


def skipped(row: dict) -> float:
    return row["about"]["skipped"]


def curves(row: dict) -> dict[str, dict]:
    """What a row's variants measured on the file's answers, by the names of STYLES; a static list is `list`."""
    names = [name for name in row["values"]["variants"] if name not in ("dense", "int8", "int4")]
    titles = ["routed", *(name.replace("_", " ") for name in names[1:])]
    titles = [title if title in STYLES else "list" for title in titles]
    return {title: row["values"]["variants"][name]["file"] for title, name in zip(titles, names)}


def draw_curves(axis, rows: list[dict]) -> None:
    """A curve for each variant of these rows, with standard errors."""
    for title, (marker, line, grey) in STYLES.items():
        points = [(row, curves(row)[title]) for row in rows if title in curves(row)]
        x, y = [100 * skipped(row) for row, _ in points], [found["kl"] for _, found in points]
        error = [found["kl_stderr"] or 0.0 for _, found in points]
        if points:
            axis.errorbar(x, y, yerr=error, marker=marker, ls=line, color=grey, ms=6, capsize=3, label=title)


def speed_figure(rows: list[dict]):
    """Speed-up against the budget, measured beside its ceiling, by what is skipped."""
    targets = list(dict.fromkeys(row["about"]["granularity"].split("_")[0] for row in rows))
    figure, axes = panels(len(targets), 3.2, 3.0, rows=2, sharex=True, sharey="row", layout="constrained")
    cells = [(phase, target) for phase in ("prefill", "decode") for target in targets]
    for axis, (phase, target) in zip(axes, cells):
        for row in rows:
            name, unit = row["about"]["granularity"].split("_")
            points = [own for own in row["values"]["rows"] if own["phase"] == phase and own["route"] == "gather"]
            if name == target and points:
                draw_speed(axis, points, unit)
                axis.set_title(f"{target}: {phase}, {points[0]['context']:,} tokens", fontsize=10)
        axis.axhline(1, color="0.7", lw=1, zorder=0)
        axis.set_xlabel("share of routed units that run" if phase == "decode" else "")
        axis.set_ylabel("dense / routed time" if target == targets[0] else "")
    axes[0].legend(fontsize=8)
    return figure


def draw_speed(axis, points: list[dict], unit: str) -> None:
    """One granularity in one regime: filled as measured, hollow the ceiling."""
    (marker, grey), x = UNITS[unit], [own["capacity"] for own in points]
    axis.plot(x, [own["speedup"] for own in points], marker=marker, color=grey, label=f"{unit}, measured")
    hollow = dict(marker=marker, color=grey, ls=":", mfc="white", label=f"{unit}, ceiling")
    axis.plot(x, [own["ceiling"] for own in points], **hollow)


def kv_figure(rows: list[dict]):
    """Bytes of keys and values of one sequence against its length."""
    models = list(dict.fromkeys(row["about"]["model"] for row in rows))[:2]
    figure, axes = panels(len(models), 4.2, 3.6)
    for axis, model in zip(axes, models):
        own = sorted((row for row in rows if row["about"]["model"] == model), key=lambda row: row["about"]["context"])
        lengths = [row["about"]["context"] for row in own]
        for number, share in enumerate(own[0]["values"]["shares"]):
            line, grey = SHARES[number % len(SHARES)]
            label = f"{100 * share:g} % of attentions skipped" if share else "dense"
            sizes = [row["values"]["bytes"][number] / 1e6 for row in own]
            axis.plot(lengths, sizes, marker="o", ms=4, ls=line, color=grey, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
        axis.set_title(f"{model}, {8 * own[0]['values']['bytes_per_number']} bits a number", fontsize=10)
        axis.set_xlabel("tokens in the context")
        axis.set_ylabel("keys and values, MB")
        axis.grid(color="0.9")
    axes[0].legend(fontsize=8)
    return figure


def routes_figure(rows: list[dict]):
    """Which layers run: by task beside the greedy list, and by the position of a token."""
    wide = [bool(row["values"]["positions"] and row["values"]["positions"][0]) for row in rows]
    figure, axes = panels(len(rows) + sum(wide), 4.4, 4.6)
    left, shown = list(axes), None
    for row, positions in zip(rows, wide):
        values, granularity = row["values"], row["about"]["granularity"]
        columns = dict(values["tasks"])
        if "greedy" in values:
            columns["greedy list"] = [1 - share for share in values["greedy"]]
        grid = list(map(list, zip(*columns.values())))
        shown = heat(left.pop(0), grid, list(columns), values["places"], f"{granularity}, by task")
        if positions:
            size = values["tokens_per_bin"]
            starts = [str(number * size) for number in range(len(values["positions"][0]))]
            shown = heat(left.pop(0), values["positions"], starts, values["places"], f"{granularity}, by position")
            axes[len(axes) - len(left) - 1].set_xlabel(f"token's position (groups of {size})")
    figure.colorbar(shown, ax=axes, label="share that runs", fraction=0.03)
    return figure


def heat(axis, grid: list[list[float]], columns: list[str], places: list[str], title: str):
    """One heat map: black runs always, white never."""
    shown = axis.imshow(grid, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(len(places)), places, fontsize=7)
    axis.set_ylabel("layer")
    axis.set_title(title, fontsize=10)
    return shown


FIGURES: dict[str, Callable] = {name: globals()[f"{name}_figure"] for name in ("fidelity", "speed", "kv", "routes")}


def draw(folder: Path) -> None:
    """Draw what the tables' JSON in a folder allows."""
    for name, build in FIGURES.items():
        path = folder / f"{name}.json"
        rows = runtime.read_json(path)["rows"] if path.exists() else []
        if rows:
            save = partial(build(rows).savefig, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
            runtime.write_atomic(path.with_suffix(".png"), save)
