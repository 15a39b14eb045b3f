"""How far a routed model's words are from the dense model's, token by token: damage that multiple choice hides.

Every variant (the routers, controls at their capacity, the dense model with rounded weights) reads two kinds of
answers: those of a file, and the dense model's own greedy ones, which hold nothing that it would not say itself. At
each of their tokens its distribution q stands beside the dense model's p:
    kl          sum_v p log(p / q), its mean and its 99.9th percentile
    same_top    share of tokens at which both find the same token likeliest (llama.cpp's --kl-divergence has these two)
    acceptance  sum_v min(p, q): how often speculative decoding would accept q's token (arXiv 2211.17192)
Then each variant answers the prompts itself: how many tokens it agrees with the dense model, and what it repeats.

Legend: n tokens of an answer, B rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.records import Example
from data.rows import common_prefix
from model import Transformer, generate
from recipe.experts import mean_route
from recipe.forced import Control
from recipe.int8 import quantise
from recipe.passes import EVAL_BATCH, Batch, Workload, collate, evaluate, head_blocks, states
from recipe.results import mean_per_token, mean_stderr
from runtime import Runtime, collect, mine, track

MEASURES = ("kl", "same_top", "acceptance")
ANSWER_TOKENS = 128  # of a greedy answer, at most
NGRAM = 4  # tokens of what counts as repeated
TASK = "fidelity"
GROUP = 32  # weights that share a scale where they are rounded to 4 bits


@dataclass(frozen=True)
class Variant:
    """One way to run a model: dense, by its routers, by forced routes, or with other weights."""

    name: str
    model: Transformer
    route: str = "off"
    control: Control | None = None
    capacity: float = 1.0

    def gates(self, items: Sequence[int], starts: Sequence[int], width: int) -> Tensor | None:
        """Forced gates, (R,B) or (R,B,T), of `width` tokens of these items from `starts` on; None: the routers' own."""
        gates = None if self.control is None else self.control.batch([(TASK, item) for item in items], starts, width)
        return None if gates is None else gates.to(self.model.tok_embeddings.weight.device)

    def states(self, batch: Batch, items: Sequence[int]) -> Tensor:
        """Final states (n,D) that predict the answers of a batch."""
        gates = self.gates(items, [0] * len(items), batch.tokens.shape[1])
        return states(self.model, batch, route=self.route, gates=gates)[0]


def with_controls(routed: Variant, orders: dict[str, list[str]], work: Workload) -> list[Variant]:
    """`routed` with the capacity that it realises on these examples, and at that capacity the first of these static
    lists, the mean route and random routes."""
    model, names = routed.model, routed.model.routing.names
    found = evaluate(work, None if routed.control is None else forced_by(routed))
    budget, weights = found["capacity"], model.place_shares()
    lists = {name: [names.index(place) for place in order] for name, order in list(orders.items())[:1]}
    lists["mean_route"] = mean_route(model, found["capacity_per_layer"])[0]
    controls = {name: Control(weights, lists={TASK: (order, budget)}) for name, order in lists.items()}
    controls["random"] = Control(weights, budget, "0", per_token=model.routing.unit == "token")
    others = [Variant(name, model, "gather", control, budget) for name, control in controls.items()]
    return [replace(routed, capacity=budget), *others]


def forced_by(variant: Variant):
    """A variant's forced routes, as `evaluate` asks for them: rows are numbered by their group."""

    def gates(model: Transformer, batch: Batch, number: int) -> Tensor:
        items = range(number * EVAL_BATCH, number * EVAL_BATCH + len(batch.lengths))
        return variant.gates(items, [0] * len(items), batch.tokens.shape[1])

    return gates


def rounded(model: Transformer, bits: int, group: int | None = None) -> Transformer:
    """A dense copy of a model, its matrices rounded to `bits`: symmetric, a scale for each row or `group` of it."""
    with torch.device("meta"):
        other = Transformer(model.config)
    held = model.state_dict()
    tensors = {name: held[name] for name in other.state_dict()}
    for name, tensor in tensors.items():
        scale = held.get(f"{name.removesuffix('.weight')}.scale")  # of a base in int8
        tensor = tensor if scale is None else (tensor * scale[:, None]).to(model.dtype)
        if tensor.dim() == 2:
            size = group if group and tensor.shape[1] % group == 0 else tensor.shape[1]
            table, scale = quantise(tensor.reshape(-1, size), name, 2 ** (bits - 1) - 1)
            tensors[name] = (table * scale[:, None]).view_as(tensor).to(tensor.dtype)
    other.load_state_dict(tensors, assign=True)
    return other.to(model.tok_embeddings.weight.device).eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# Reading answers


def token_measures(p: Tensor, q: Tensor) -> Tensor:
    """MEASURES (3,n), in fp32, of logits (n,V) of the dense model and of another one."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    p, q, same = log_p.exp(), log_q.exp(), log_p.argmax(-1) == log_q.argmax(-1)
    return torch.stack([(p * (log_p - log_q)).sum(-1), same.float(), torch.minimum(p, q).sum(-1)])


@torch.no_grad()
def read(dense: Variant, others: Sequence[Variant], examples: Sequence[Example], rt: Runtime) -> list[list[Tensor]]:
    """MEASURES (3,n) of each example under each of the others, beside the dense model."""

    def read_batch(items: list[int]) -> list[list[Tensor]]:
        batch = collate([examples[item] for item in items], rt.device)
        base, seen = dense.states(batch, items), [other.states(batch, items) for other in others]
        found = []
        for part in head_blocks(dense.model, base):
            p = dense.model.head(base[part])
            found.append(torch.stack([token_measures(p, own.model.head(h[part])) for own, h in zip(others, seen)]))
        sizes = [len(examples[item].targets) for item in items]
        return list(map(list, torch.cat(found, dim=2).cpu().split(sizes, dim=2)))

    return by_item([len(example.tokens) for example in examples], read_batch, rt, "reading answers")


def by_item(lengths: Sequence[int], compute: Callable[[list[int]], list], rt: Runtime, what: str) -> list:
    """What `compute` says of each item: it gets the numbers of items of similar length, on the ranks in turn."""
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    groups = [order[a : a + EVAL_BATCH] for a in range(0, len(order), EVAL_BATCH)]
    parts = [(number, list(zip(items, compute(items)))) for number, items in track(mine(groups, rt), what)]
    found = dict(pair for pairs in collect(parts, rt) for pair in pairs)
    return [found[item] for item in range(len(lengths))]


# -----------------------------------------------------------------------------
# Answering


def answer(variant: Variant, prompts: Sequence[list[int]], stop: Sequence[int], rt: Runtime) -> list[list[int]]:
    """Greedy answers to the prompts, each to a stop token, which it includes, or to ANSWER_TOKENS."""

    def answer_items(items: list[int]) -> list[list[int]]:
        def gates(rows: list[int], starts: list[int], width: int) -> Tensor | None:
            return variant.gates([items[row] for row in rows], starts, width)

        asked, how = [prompts[item] for item in items], {"stop_tokens": stop, "route": variant.route, "gates": gates}
        return generate(variant.model, asked, ANSWER_TOKENS, **how)

    return by_item(list(map(len, prompts)), answer_items, rt, f"{variant.name} answers")


def repetition(tokens: Sequence[int]) -> float:
    """Share of the runs of NGRAM tokens that stood in the same answer before; 0 for an answer that has none."""
    runs = [tuple(tokens[a : a + NGRAM]) for a in range(len(tokens) - NGRAM + 1)]
    return (len(runs) - len(set(runs))) / len(runs) if runs else 0.0


# -----------------------------------------------------------------------------
# The report


def reading_result(parts: Sequence[Tensor]) -> dict:
    """Of MEASURES (3,n) by example: means per token, their standard errors (examples are independent, tokens of one
    are not), the 99.9th percentile of the KL."""
    sizes = [part.shape[1] for part in parts]
    result = {"tokens": sum(sizes), "kl_p999": torch.cat([part[0] for part in parts]).double().quantile(0.999).item()}
    for number, name in enumerate(MEASURES):
        sums = [part[number].sum().item() for part in parts]
        result[name], result[f"{name}_stderr"] = mean_per_token(sums, sizes)
    return result


def paired_result(own: Sequence[Tensor], other: Sequence[Tensor]) -> dict:
    """The same variant's measures minus another's on the same tokens, with paired standard errors."""
    result = {}
    for number, name in enumerate(MEASURES):
        change = [(a[number] - b[number]).sum().item() for a, b in zip(own, other)]
        difference, error = mean_per_token(change, [part.shape[1] for part in own])
        result[name] = {"difference": difference, "stderr": error}
    return result


def answer_result(own: Sequence[list[int]], dense: Sequence[list[int]], stop: Sequence[int]) -> dict:
    """How long answers agree with the dense model's, what they repeat, how many were cut at ANSWER_TOKENS."""
    agreed, error = mean_stderr([common_prefix([a, b]) for a, b in zip(own, dense)])
    repeated, repeated_error = mean_stderr([repetition(tokens) for tokens in own])
    result = {"agreement": agreed, "agreement_stderr": error, "same": sum(a == b for a, b in zip(own, dense))}
    result |= {"repetition": repeated, "repetition_stderr": repeated_error}
    result |= {"length": sum(map(len, own)) / len(own), "cut": sum(tokens[-1] not in stop for tokens in own)}
    return result


def fidelity(variants: Sequence[Variant], examples: Sequence[Example], stop: Sequence[int], rt: Runtime) -> dict:
    """What the variants, of which the first is dense and the second stands to be judged, keep of the dense model."""
    dense, *others = variants
    prompts = [example.tokens[: example.prompt] for example in examples]
    answers = {variant.name: answer(variant, prompts, stop, rt) for variant in variants}
    own = [
        Example(prompt + answered, len(prompt), list(range(len(prompt), len(prompt + answered))), example.domain)
        for prompt, answered, example in zip(prompts, answers[dense.name], examples)
    ]
    readings = {"file": read(dense, others, examples, rt), "own": read(dense, others, own, rt)}
    domains = sorted({str(example.domain) for example in examples if example.domain is not None})
    report = {dense.name: {"answers": answer_result(answers[dense.name], answers[dense.name], stop)}}
    for number, variant in enumerate(others):
        entry = {"capacity": variant.capacity}
        entry["answers"] = answer_result(answers[variant.name], answers[dense.name], stop)
        for kind, read_by in readings.items():
            parts = [measures[number] for measures in read_by]
            entry[kind] = reading_result(parts)
            if number:
                entry[kind]["paired"] = paired_result([measures[0] for measures in read_by], parts)
            by_domain = {name: [p for p, e in zip(parts, examples) if str(e.domain) == name] for name in domains}
            entry[kind]["domains"] = {name: reading_result(some) for name, some in by_domain.items()}
        report[variant.name] = entry
    return {"items": len(examples), "answer_tokens": ANSWER_TOKENS, "variants": report}


def fidelity_lines(report: dict | None) -> list[str]:
    """The report, if there is one, as lines of Markdown."""
    if report is None:
        return []
    head = ["variant", "capacity", "KL", "±", "KL 99.9 %", "same top", "acceptance", "own: KL", "±", "same top",
            "acceptance", "agreed", "repeats", "cut"]
    lines = ["", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for name, entry in report["variants"].items():
        cells = [name.replace("_", " "), f"{entry.get('capacity', 1.0):.3f}"]
        for kind in ("file", "own"):
            r = entry.get(kind)
            cells += [f"{r['kl']:.4f}", f"{r['kl_stderr'] or 0:.4f}"] if r else ["0", "0"]
            cells += [f"{r['kl_p999']:.2f}" if r else "0"] if kind == "file" else []
            cells += [f"{r['same_top']:.2%}", f"{r['acceptance']:.4f}"] if r else ["100 %", "1"]
        a = entry["answers"]
        cells += [f"{a['agreement']:.1f}", f"{a['repetition']:.1%}", f"{a['cut']} of {report['items']}"]
        lines.append(f"| {' | '.join(cells)} |")
    judged = list(report["variants"])[1]
    for name, entry in list(report["variants"].items())[2:]:
        c = entry["file"]["paired"]["kl"]
        lines.append(f"KL of {judged} minus {name.replace('_', ' ')}: {c['difference']:+.5f} ± {c['stderr'] or 0:.5f}")
    return lines
