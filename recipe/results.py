"""What the records of eval.py say: results by task and group, one run beside another, and the lines to print."""

import math
from collections.abc import Sequence

from data.tasks import CONTINUATION, EXACT_MATCH, GROUPS, LOSS, NAMES

GOLD_LOGPROB = "gold_logprob"  # nats of the right choice, whole; moves where accuracy does not yet

# -----------------------------------------------------------------------------
# Results of records


def mean_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error from the sample's deviation (n - 1), as lm-eval; None for a single value."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None


def mean_per_token(sums: Sequence[float], tokens: Sequence[int]) -> tuple[float, float | None]:
    """Mean over the tokens of all items, from each item's sum; a ratio of sums, its error by linearisation."""
    mean, n = sum(sums) / sum(tokens), len(tokens)
    return mean, mean_stderr([(d - mean * t) * n / sum(tokens) for d, t in zip(sums, tokens)])[1]


def variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values)


def text_result(records: Sequence[dict]) -> dict:
    """Loss per token; of whole texts also per word and byte, and bits per byte (lm-eval api/metrics.py)."""
    tokens, total = sum(r["tokens"] for r in records), -sum(sum(r["logprobs"]) for r in records)
    result = {"loss": total / tokens, "perplexity": exp(total / tokens), "tokens": tokens}
    if "words" in records[0]:
        words, size = (sum(r[unit] for r in records) for unit in ("words", "bytes"))
        result |= {
            "word_perplexity": exp(total / words),
            "byte_perplexity": exp(total / size),
            "bits_per_byte": total / size / math.log(2),
            "words": words,
            "bytes": size,
        }
    return result


def chosen(records: Sequence[dict]) -> bool:
    """Whether these are of a task where one of several choices is right."""
    return "prediction_norm" in records[0]


def gold_logprobs(records: Sequence[dict]) -> list[float]:
    return [r["logprobs"][r["gold"]] for r in records]


def exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # e^710 is more than a float holds


def result_of(records: Sequence[dict], metrics: Sequence[str], weights: Sequence[float] = ()) -> dict:
    """Results of a task, or of a group together. weights: what each place counts in the capacity; (): all the same."""
    n, places = len(records), len(records[0]["executed"])
    result = text_result(records) if metrics == LOSS else {}
    for metric in [metric for metric in metrics if metric in records[0]]:
        result[metric], result[f"{metric}_stderr"] = mean_stderr([r[metric] for r in records])
    if chosen(records):
        result[GOLD_LOGPROB], result[f"{GOLD_LOGPROB}_stderr"] = mean_stderr(gold_logprobs(records))
    if metrics == CONTINUATION:  # lm-eval resamples for this error; to first order it is the same
        mean, error = mean_stderr([-r["logprobs"][0] for r in records])
        result["perplexity"] = exp(mean)
        result["perplexity_stderr"] = None if error is None else exp(mean) * error
    if "exact_match_strict" in metrics:
        result |= {"acc": result["exact_match_strict"], "acc_stderr": result["exact_match_strict_stderr"]}
    result |= {"n": n, "truncated": sum(r["truncated"] for r in records)}
    result |= {"spanning": sum(r.get("spanning", False) for r in records)}
    result |= {"capacity": 1.0, "kv_bytes": sum(r["kv_bytes"] for r in records) / n}
    if places:
        units = sum(r["units"] for r in records)
        shares = [[r["executed"][i] / r["units"] for r in records] for i in range(places)]
        result["capacity_per_layer"] = [sum(r["executed"][i] for r in records) / units for i in range(places)]
        weights = weights or [1 / places] * places
        result["capacity"] = sum(weight * share for weight, share in zip(weights, result["capacity_per_layer"]))
        result["route_variance"] = sum(map(variance, shares)) / places  # between the items of the task
    return result


def group_result(names: Sequence[str], results: dict, records: dict, weights: Sequence[float] = ()) -> dict:
    """MMLU and its categories: acc over all items, its standard error pooled as in lm-eval; acc_subjects is the plain
    mean of subjects."""
    result = result_of([r for name in names for r in records[name]], ("acc",), weights)
    sizes, errors = [results[name]["n"] for name in names], [results[name]["acc_stderr"] for name in names]
    if None not in errors:
        pooled = sum((n - 1) * error**2 * n for n, error in zip(sizes, errors)) / (sum(sizes) - len(sizes))
        result["acc_stderr"] = math.sqrt(pooled / sum(sizes))
    accuracy = sum(results[name]["acc"] for name in names) / len(names)
    return result | {
        "acc_subjects": accuracy,
        "subjects": len(names),
        "shots": results[names[0]]["shots"],
        "seconds": sum(results[name]["seconds"] for name in names),
    }


def routes_of(shares: Sequence[Sequence[float]], within: Sequence[float]) -> dict:
    """How dynamic routes are. shares[task][place] of executing units; within[task]: variance between a task's items,
    mean over places."""
    constant = [share <= 0.01 or share >= 0.99 for row in shares for share in row]
    return {
        "variance_within_tasks": sum(within) / len(within),
        "variance_between_tasks": sum(map(variance, zip(*shares))) / len(shares[0]),
        "constant_task_layer_pairs": sum(constant) / len(constant),
    }


# -----------------------------------------------------------------------------
# Two runs on the same items


def compare_runs(items: dict, other: dict) -> dict:
    """This run minus another on the same items: difference, its standard error (paired), how many items changed."""
    paired: dict = {}
    for name in [name for name in items if name in other]:
        paired[name] = {}
        for metric in [metric for metric in items[name] if metric not in ("sha", "tokens") and metric in other[name]]:
            change = [float(a) - float(b) for a, b in zip(items[name][metric], other[name][metric])]
            if metric == "nll":
                paired[name]["loss"] = compare_losses(change, items[name]["tokens"])
                continue
            mean, error = mean_stderr(change)
            paired[name][metric] = {"difference": mean, "stderr": error, "n": len(change)}
            if metric != GOLD_LOGPROB:
                gained, lost = change.count(1.0), change.count(-1.0)
                paired[name][metric] |= {"gained": gained, "lost": lost, "flips": gained + lost}
    return paired


def compare_losses(change: Sequence[float], tokens: Sequence[int]) -> dict:
    """Difference of losses per token."""
    mean, error = mean_per_token(change, tokens)
    return {"difference": mean, "stderr": error, "n": len(tokens)}


# -----------------------------------------------------------------------------
# Lines


ANOTHER = {  # what stands in the columns of acc and acc_norm instead
    EXACT_MATCH: "strict exact match under acc, flexible",
    CONTINUATION: "share of targets that greedy decoding says under acc, their perplexity",
}


def number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def task_table(results: dict, bold: dict[str, str]) -> list[str]:
    """Lines of Markdown; the paper's metric is bold. Of MMLU's subjects only their group is shown, if there is one."""
    grouped_names = {name for group, names in GROUPS.items() if group in results for name in names}
    header = "| task | shots | n | acc | ± | acc_norm | ± | capacity | KV MB/item | seconds |"
    lines, best = [header, "|---|" + "---:|" * 9], []
    for name in [name for name in results if name not in grouped_names and name not in NAMES]:
        r, first = results[name], bold.get(name, "acc")
        shown, cells = next((pair for pair in ANOTHER if pair[1] in r), ("acc", "acc_norm")), []
        for metric in shown:
            value = number(r.get(metric))
            cells += [f"**{value}**" if metric == first else value, number(r.get(f"{metric}_stderr"))]
        if name not in GROUPS or name == "mmlu":
            best.append(r[first])
        cells += [number(r["capacity"], ".3f"), number(r["kv_bytes"] / 1e6, ".2f"), number(r["seconds"], ".1f")]
        lines.append(f"| {name} | {r['shots']} | {r['n']:,} | {' | '.join(cells)} |")
    if len(best) > 1:
        lines.append(f"| mean of the bold | | | {sum(best) / len(best):.4f} | | | | | | |")
    for pair, what in ANOTHER.items():
        names = [name for name, r in results.items() if pair[1] in r and name not in NAMES]
        lines += [f"\n{', '.join(names)}: {what} under acc_norm."] if names else []
    return lines if best else []


def text_line(name: str, r: dict) -> str:
    """One line for a file of texts."""
    words = ""
    if "words" in r:
        words = (
            f"word perplexity {r['word_perplexity']:.4f} | byte perplexity {r['byte_perplexity']:.4f} | "
            f"bits per byte {r['bits_per_byte']:.4f} | "
        )
    return (
        f"\n{name.replace('_', ' ')} {r['perplexity']:.4f} | loss {r['loss']:.5f} | {words}{r['tokens']:,} "
        f"{'tokens' if words else 'answer tokens'} | capacity {r['capacity']:.3f} | "
        f"KV {r['kv_bytes'] / 1e6:.2f} MB/item | {r['seconds']:.1f} s"
    )


def report_lines(report: dict, bold: dict[str, str]) -> list[str]:
    """All that a run prints at its end."""
    results, against = report["results"], report.get("against", {}).get("tasks", {})
    lines = task_table(results, bold) + [text_line(name, results[name]) for name in NAMES if name in results]
    for name, entry in against.items():
        for metric, c in entry.items():
            flips = f", {c['flips']} flips (+{c['gained']} -{c['lost']})" if "flips" in c else ""
            error = number(c["stderr"], ".5f") or "n/a"
            lines.append(f"\nagainst: {name} {metric} {c['difference']:+.5f} ± {error}{flips}, n {c['n']:,}")
    for name, r in report.get("domains", {}).items():
        lines.append(
            f"{name.replace('_', ' '):<32} loss {r['loss']:.5f} | {r['n']} items, {r['tokens']:,} tokens | "
            f"capacity {r['capacity']:.3f}"
        )
    if "routes" in report:
        routes = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in report["routes"].items()]
        lines.append(f"routes: {', '.join(routes)}")
    return lines
