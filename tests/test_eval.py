"""Scoring: prompts, spans, sharing and batching, ranks, resuming, errors; all on made-up rows.  Run: python -m pytest tests/test_eval.py"""

import json
import math
import random
import subprocess
import sys
from array import array
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import eval as scoring
import runtime
from eval import Branch, EvalConfig, Item, Prefix, Query, Run
from model import KVCache, ModelConfig, Transformer, generate, load_model
from router import GRANULARITIES, RouterConfig, RouterMeta, save_routers

ROOT = Path(__file__).resolve().parent.parent
CPU = runtime.Runtime(0, 1, 0, torch.device("cpu"), torch.float32, True)
MERGES = [pair.split() for pair in ("h e", "e s", "Ġ A", "Ġ B", "Ġ C", "Ġ D", "Ġ t", "Ġ n", "Ġ y", "Ġn o", "Ġt he", "Ġy es")]


def byte_tokenizer() -> dict:
    """A tokenizer.json that knows every byte and a dozen merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)}
    vocab = {spelled[b]: b for b in range(256)} | {"".join(pair): 256 + i for i, pair in enumerate(MERGES)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": len(vocab) + i, "content": content, **flags} for i, content in enumerate(("<s>", "</s>"))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
             "merges": [" ".join(pair) for pair in MERGES]}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None, "post_processor": None,
            "pre_tokenizer": level, "decoder": level, "model": model}


def jsonl(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def stem(question: str, texts: list[str], labels: str, key: str) -> dict:
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels)]
    return {"id": "x", "question": {"stem": question, "choices": choices}, "answerKey": key}


def write_data(data: Path) -> None:
    """A few rows of every data set in its native format, with the traps of the published files."""
    jsonl(data / "boolq/dev.jsonl", [
        {"question": "is tin a metal", "title": "Tin", "answer": True, "passage": "Tin is a metal. -- It melts."},
        {"question": "do owls bark", "title": "Owl", "answer": False, "passage": "Owls hoot."}])
    jsonl(data / "boolq/train.jsonl", [{"question": f"is {n} odd", "title": "", "answer": n % 2 == 0, "passage": "-"} for n in range(6)])
    (data / "rte/glue/RTE").mkdir(parents=True)
    for split in ("dev", "train"):
        rows = ["index\tsentence1\tsentence2\tlabel", '0\tA "lone quote is here.\tA quote is here.\tentailment']
        rows.append("1\tIt rained.\tIt snowed.\tnot_entailment")
        (data / f"rte/glue/RTE/{split}.tsv").write_text("\n".join(rows) + "\n")
    jsonl(data / "openbookqa/Main/test.jsonl", [stem("Ice is made of", ["stone", "water", "iron", "wool"], "ABCD", "B"),
                                                stem("Rain falls", ["up", "down", "in", "out"], "ABCD", "B")])
    jsonl(data / "piqa/valid.jsonl", [{"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Turn the moon."},
                                      {"goal": "Dry a cup.", "sol1": "Wet it.", "sol2": "Wipe it."}])
    (data / "piqa/valid-labels.lst").write_text("0\n1\n")
    jsonl(data / "winogrande/dev.jsonl", [
        {"sentence": "The cat chased the dog as the _ was quick.", "option1": "cat", "option2": "dog", "answer": "1"},
        {"sentence": "_ won since Bo slept.", "option1": "Bo", "option2": "Al", "answer": "2"},
        {"sentence": "Ann met Eve and _ smiled.", "option1": "Ann", "option2": "Eve", "answer": "2"}])
    small = [{"sentence": f"Pot {n} met pan {n}, the _ broke.", "option1": "pot", "option2": "pan", "answer": "1"} for n in range(7)]
    jsonl(data / "winogrande/train_xs.jsonl", small[:2])
    jsonl(data / "winogrande/train_s.jsonl", small)
    jsonl(data / "gsm8k/test.jsonl", [{"question": "Two and two?", "answer": "It is <<2+2=4>>4.\n#### 4"},
                                      {"question": "A thousand less one?", "answer": "So.\n#### 999"}])
    jsonl(data / "gsm8k/train.jsonl", [{"question": f"What is {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(7)])
    wiki = {"activity_label": "Cooking", "ctx_a": "[header] How to boil [title] Take a pot.", "ctx_b": "", "ctx": "", "label": 2,
            "endings": ["Fill it.", "Sing [step] to it.", "Heat it [substeps] well.", "Drop it."]}
    boat = {"activity_label": "Rowing", "ctx_a": "A man sits in a boat.", "ctx_b": "he", "ctx": "", "label": 0,
            "endings": ["rows.", "melts.", "barks.", "folds."]}
    jsonl(data / "hellaswag/hellaswag_val.jsonl", [wiki, boat])
    jsonl(data / "hellaswag/hellaswag_train.jsonl", [{**boat, "activity_label": f"Rowing {n}"} for n in range(5)])
    for kind in ("ARC-Challenge", "ARC-Easy"):
        jsonl(data / f"arc/{kind}/{kind}-Test.jsonl", [
            stem("Which is hot?", ["ice", "fire", "snow"], "123", "2"), stem("Which sinks?", ["lead", "cork", "foam", "wood"], "ABCD", "A"),
            stem("Which flies?", ["a hen", "a bee", "a log", "a car", "a pot"], "ABCDE", "B")])
        jsonl(data / f"arc/{kind}/{kind}-Train.jsonl", [stem(f"Which is {n}?", ["one", "two"], "AB", "A") for n in range(30)])
    for subject in scoring.MMLU["stem"].split():
        for split, n in (("dev", 5), ("test", 3)):
            path = data / f"mmlu/data/{split}/{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [f'"Take {subject}, then\nadd {split} {i} ",one,"two, three",the end,{i},{"ABCD"[i % 4]}\n' for i in range(n)]
            path.write_text("".join(rows))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random Llama of four layers with a byte tokenizer, and made-up data."""
    folder = tmp_path_factory.mktemp("eval")
    write_data(folder / "data")
    config = ModelConfig(family="llama", dim=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=272,
                         max_seq_len=1024, norm_eps=1e-5, rope_theta=1e4, tie_embeddings=True)
    torch.manual_seed(0)
    model = Transformer(config)
    torch.nn.init.normal_(model.tok_embeddings.weight, std=0.5)
    (folder / "base").mkdir()
    save_file(model.state_dict(), folder / "base/model.safetensors")
    (folder / "base/config.json").write_text(json.dumps(asdict(config)))
    (folder / "base/tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    (folder / "base/tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}))
    return folder


@pytest.fixture(scope="session")
def tok(base):
    return scoring.load_tokenizer(base / "base")


@pytest.fixture
def data(base, tmp_path):
    """A private copy of the data, to be damaged."""
    write_data(tmp_path / "data")
    return tmp_path / "data"


def routed(base, granularity: str, kv: str = "routed", pool: str = "prompt") -> Transformer:
    """The base with random routers in layers 1-3, each cut at its median score over a few texts, so that routes differ between items."""
    model = load_model(base / "base")
    routing = RouterConfig.of(granularity, (1, 2, 3), pool=pool, kv=kv)
    if routing.target == "both":  # attention in all three layers, the MLP in one
        places = [place for place in routing.places if place.target == "attn" or place.layer == 2]
        routing = replace(routing, places=tuple(places))
    model.add_routers(routing)
    model.requires_grad_(False)
    torch.manual_seed(0)
    texts = (b"Question: Which is hot?\nAnswer:", b"Pot 3 met pan 3, the pot broke.", b"Open a jar, turn the lid. Open ")
    texts = torch.tensor([list(text) for text in texts])
    for i, router in enumerate(model.routers()):
        torch.nn.init.normal_(router.weight)
        router.cut.fill_(model.hidden(texts, route="mask", return_scores=True)[2][i].median())
    return model


def settings(base, **changes) -> EvalConfig:
    return EvalConfig(**{"model": str(base / "base"), "data": str(base / "data"), "device": "cpu", "dtype": "float32", **changes})


def examples(base, name: str) -> list:
    task = scoring.TASKS[name]
    return scoring.read_examples(scoring.find(base / "data", task.files), task.read)


def works(base, tok, *names, share=True, limit=1024, **changes) -> list:
    made = []
    for task in scoring.tasks_named(names):
        shots = changes.get("shots", task.shots if task.name != "arc_challenge" else 2)
        paths = scoring.locate([task], base / "data", {task.name: shots})
        made.append(scoring.prepare_task(task, paths[task.name], tok, shots=shots, by=changes.get("by", "index"), seed=1, items=None,
                                         limit=limit, share=share))
    return made


def score(run: Run, items: list[Item], share_prefix=True) -> list[dict]:
    work = scoring.Work(scoring.TASKS["piqa"], items, 0, "", "")
    if not share_prefix:
        return [line for item in items for line in scoring.score_batch(run, [item], Prefix())]
    return scoring.run_work(run, work, {}, "", scoring.Samples(None, CPU), scoring.Progress([work], False), CPU)


# ------------------------------------------------------------------------------------------------------------ prompts


PROMPTS = {
    "boolq": ("Tin -- Tin is a metal. -- It melts.\nQuestion: is tin a metal?\nAnswer:", ("no", "yes"), 1),
    "rte": ('A "lone quote is here.\nQuestion: A quote is here. True or False?\nAnswer:', ("True", "False"), 0),
    "openbookqa": ("Ice is made of", ("stone", "water", "iron", "wool"), 1),
    "piqa": ("Question: Open a jar.\nAnswer:", ("Turn the lid.", "Turn the moon."), 0),
    "gsm8k": ("Question: Two and two?\nAnswer:", ("It is <<2+2=4>>4.\n#### 4",), 0),
    "hellaswag": ("Cooking: How to boil. Take a pot.", ("Fill it.", "Sing to it.", "Heat it well.", "Drop it."), 2),
    "arc_challenge": ("Question: Which is hot?\nAnswer:", ("ice", "fire", "snow"), 1),
    "mmlu_anatomy": ("Take anatomy, then\nadd test 0\nA. one\nB. two, three\nC. the end\nD. 0\nAnswer:", ("A", "B", "C", "D"), 0),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_native_rows_become_the_harness_prompts(base, name):
    context, choices, gold = PROMPTS[name]
    assert examples(base, name)[0] == scoring.ask(context, choices, gold)


def test_partial_scoring_puts_each_option_into_the_context(base):
    first, second, _ = examples(base, "winogrande")
    assert first.contexts == ("The cat chased the dog as the cat", "The cat chased the dog as the dog")
    assert first.choices == ("was quick.",) * 2 and first.gold == 0
    assert second.contexts == ("Bo", "Al") and second.gold == 1
    assert first.solved() == "The cat chased the dog as the cat was quick.\n\n"


def test_superglue_files_serve_as_well(data):
    (data / "boolq/dev.jsonl").unlink()
    (data / "rte/glue/RTE/dev.tsv").unlink()
    row = {"question": "is tin a metal", "passage": "Tin -- Tin is a metal. -- It melts.", "idx": 0, "label": "true"}
    jsonl(data / "boolq/superglue/val.jsonl", [row])
    row = {"premise": 'A "lone quote is here.', "hypothesis": "A quote is here.", "label": "entailment", "idx": 0}
    jsonl(data / "rte/superglue/val.jsonl", [row])
    for task in (scoring.TASKS["boolq"], scoring.TASKS["rte"]):
        assert scoring.read_examples(scoring.find(data, task.files), task.read)[0] == scoring.ask(*PROMPTS[task.name])


def test_few_shot_prompt_is_description_then_solved_examples(base, tok):
    work = works(base, tok, "mmlu_anatomy")[0]
    text = tok.decode(list(work.items[0].queries[0].context))
    start = "The following are multiple choice questions (with answers) about anatomy.\n\nTake anatomy, then\nadd dev 0\nA. one\n"
    assert text.startswith(start)
    assert text.count("\nAnswer: ") == 5 and "D. 4\nAnswer: A\n\n" in text and text.endswith("\nAnswer:")
    assert [tok.decode(list(branch.tokens)) for branch in work.items[0].queries[0].branches] == [" A", " B", " C", " D"]


def test_largest_winogrande_training_file_is_taken(base):
    assert scoring.find(base / "data", scoring.TASKS["winogrande"].pool).name == "train_s.jsonl"


def test_shots_depend_on_seed_and_index_alone(base):
    task, items = scoring.TASKS["arc_challenge"], examples(base, "arc_challenge")
    pool = scoring.read_examples(scoring.find(base / "data", task.pool), task.read)
    drawn = scoring.draw_shots(task, items, pool, 3, by="index", seed=7)
    assert scoring.draw_shots(task, items[:2], pool, 3, by="index", seed=7) == drawn[:2] and drawn[0] != drawn[1]
    assert scoring.draw_shots(task, items, pool, 3, by="index", seed=8) != drawn
    assert scoring.draw_shots(task, items, pool, 3, by="first", seed=7) == [pool[:3]] * 3


def test_harness_draw_runs_one_generator_through_the_items(base):
    """lm-eval: random.Random(1234).sample per item in turn; tasks without a test split draw one more and leave the item out."""
    pool = [scoring.ask(f"q{n}", ("a", "b"), 0) for n in range(12)]
    rng = random.Random(1234)
    expected = [rng.sample(pool, 4), rng.sample(pool, 4)]
    assert scoring.draw_shots(scoring.TASKS["arc_challenge"], pool[:2], pool, 4, by="harness", seed=1234) == expected
    rng = random.Random(1234)
    expected = [[shot for shot in rng.sample(pool, 5) if shot != item][:4] for item in pool[:2]]
    assert scoring.draw_shots(scoring.TASKS["hellaswag"], pool[:2], pool, 4, by="harness", seed=1234) == expected
    assert all(pool[i] not in drawn for i, drawn in enumerate(expected))


# ------------------------------------------------------------------------------------------------------------ tokens


def test_trailing_spaces_of_the_context_go_to_the_choice(tok):
    context, choice = scoring.encode_pair(tok, "say:  ", "the end")
    assert tok.decode(context) == "say:" and tok.decode(choice) == "  the end"
    assert scoring.encode_pair(tok, "say:", " A") == (tok.encode("say:"), [tok.encode(" A")[0]])


def test_choice_is_what_lies_beyond_as_many_tokens_as_the_context(tok):
    """Where a merge crosses the boundary, lm-eval keeps the context's own tokens and cuts the whole text by count."""
    context, choice = scoring.encode_pair(tok, "th", "e end")  # "th" + "e": t, h against t, he
    assert context == tok.encode("th") and choice == tok.encode("the end")[2:] and tok.decode(choice) == " end"


@pytest.mark.parametrize("limit", [30, 9, 6])
def test_long_items_lose_their_beginning_as_in_the_harness(limit):
    pairs = [(list(range(20)), [91, 92, 93]), (list(range(20)), [94, 95])]
    queries, cut = scoring.queries_of(("x", 0), pairs, limit, False)
    for choice, (context, ids) in enumerate(pairs):
        query, = (q for q in queries if any(b.choice == choice for b in q.branches))
        branch, = (b for b in query.branches if b.choice == choice)
        seen = list(query.context) + list(branch.tokens[:-1])
        assert seen == (context + ids)[-(limit + 1):][:-1] and [branch.tokens[i] for i in branch.scored] == ids
    assert cut == (limit < 22) and len(queries) == (2 if cut else 1)


def test_differing_contexts_share_their_beginning(tok):
    pairs = [([1, 2, 3, 4], [9, 8]), ([1, 2, 5], [9, 8])]
    query, = scoring.queries_of(("x", 0), pairs, 100, True)[0]
    assert list(query.context) == [1, 2] and [list(b.tokens) for b in query.branches] == [[3, 4, 9, 8], [5, 9, 8]]
    assert [[b.tokens[i] for i in b.scored] for b in query.branches] == [[9, 8], [9, 8]]
    assert len(scoring.queries_of(("x", 0), pairs, 100, False)[0]) == 2
    assert len(scoring.queries_of(("x", 0), [([1], [2]), ([3], [2])], 100, True)[0]) == 2


def test_plan_keeps_the_budget_and_every_item():
    branches = [Branch(choice, array("i", [1, 2]), range(2)) for choice in range(3)]
    items = [Item([Query(("x", i), array("i", range(n)), branches)], 0, [1] * 3) for i, n in enumerate([5, 90, 7, 7, 400, 6, 30] * 9)]
    batches = scoring.plan(items, 500)
    assert sorted(item.index for batch in batches for item in batch) == list(range(len(items)))
    assert all(len(batch) == 1 or sum(i.rows for i in batch) * max(i.width for i in batch) <= 500 for batch in batches)


# ------------------------------------------------------------------------------------------------------------ scores


class Bigram:
    """A model whose next-token logits are a table: scores can be worked out by hand."""

    def __init__(self, table: torch.Tensor):
        self.table, self.config, self.routing = table, SimpleNamespace(n_layers=1, n_kv_heads=1, head_dim=1), None
        self.tok_embeddings = SimpleNamespace(weight=table)

    def hidden(self, tokens, *, lengths=None, cache=None, **_):
        cache.lengths = [a + b for a, b in zip(cache.lengths, lengths)]
        return torch.nn.functional.one_hot(tokens, len(self.table)).float(), None

    def head(self, h):
        return h @ self.table


def test_scores_worked_out_by_hand(tok):
    """Log-probability of a choice: the sum over its tokens, the first predicted by the context's last; acc_norm divides by characters."""
    table = torch.zeros(4, 4)
    table[1, 2], table[2, 3], table[3, 0] = math.log(5), math.log(2), math.log(3)  # p(2|1) = 5/8, p(3|1) = 1/8, p(3|2) = 2/5, p(3|3) = 1/6
    item = Item(scoring.queries_of(("custom", 0), [([0, 1], [2, 3, 3]), ([0, 1], [3])], 10, True)[0], 0, [9, 1])
    line, = score(Run(Bigram(table), tok), [item], share_prefix=False)
    assert line["logprobs"] == pytest.approx([math.log(5 / 8 * 2 / 5 / 6), math.log(1 / 8)])
    assert (line["prediction"], line["acc"]) == (1, 0)
    assert (line["prediction_norm"], line["acc_norm"]) == (0, 1)  # -3.18 / 9 beats -2.08 / 1


def test_scored_span_starts_and_ends_at_the_choice(base, tok):
    """Row by row against a whole forward pass: no token of the context counts, none of the choice is left out."""
    model = load_model(base / "base")
    for name in ("boolq", "piqa", "winogrande", "mmlu_anatomy"):
        for item, example in zip(works(base, tok, name, shots=0)[0].items, examples(base, name)):
            line, = score(Run(model, tok), [item], share_prefix=False)
            for context, choice, found in zip(example.contexts, example.choices, line["logprobs"]):
                ids, new = scoring.encode_pair(tok, scoring.TASKS[name].description + context, " " + choice)
                logits = model(torch.tensor([ids + new]))[0][0].log_softmax(-1)
                assert found == pytest.approx(sum(logits[len(ids) - 1 + i, token].item() for i, token in enumerate(new)), abs=1e-4)


CASES = [(None, ""), *((granularity, "routed") for granularity in GRANULARITIES), ("attn_token", "all"), ("both_token", "all")]


@pytest.mark.parametrize("granularity, kv", CASES)
def test_shared_contexts_score_as_rows_alone(base, tok, granularity, kv):
    """Contexts once for all choices, shared prefixes and batches, against one row at a time without a cache; gates counted alike."""
    model = load_model(base / "base") if granularity is None else routed(base, granularity, kv)
    run = Run(model, tok, "off" if granularity is None else "gather")
    routes = set()
    for work in works(base, tok, "mmlu_anatomy", "winogrande", "arc_challenge", "piqa", share=run.shares, by="first"):
        shared = score(run, work.items)
        alone = score(run, work.items, share_prefix=False)
        queries = works(base, tok, work.task.name, share=False, by="first")[0]
        routes |= {tuple(line["executed"]) for line in shared}
        for item, a, b in zip(queries.items, shared, alone):
            plain = [scoring.score_plain(replace(run, max_batch_tokens=1), [query])[0] for query in item.queries]
            logprobs = {choice: value for part in plain for choice, value in part.logprobs.items()}
            for found in (a, b):
                assert found["logprobs"] == pytest.approx([logprobs[i] for i in sorted(logprobs)], abs=2e-5)
                if len(item.queries) == 1 or run.sequence:
                    assert found["executed"] == [sum(counts) for counts in zip(*(part.executed for part in plain))]
                    assert found["kv_bytes"] == sum(part.kv_bytes for part in plain) // len(plain)
                    assert found["units"] == sum(part.units for part in plain)
        if run.shares and work.task.name == "mmlu_anatomy":
            assert scoring.common_prefix([item.queries[0].context for item in work.items]) > 100
    assert granularity is None or len(routes) > 1


def test_mask_scores_as_gather(base, tok):
    for granularity in ("attn_sequence", "block_token"):
        model = routed(base, granularity)
        for work in works(base, tok, "piqa", share=False):
            for a, b in zip(score(Run(model, tok, "mask"), work.items), score(Run(model, tok, "gather"), work.items)):
                assert a["logprobs"] == pytest.approx(b["logprobs"], abs=2e-5)
                assert a["executed"] == b["executed"] and a["kv_bytes"] == b["kv_bytes"]


def test_pool_all_sees_each_choice(base, tok):
    """With pool=all every choice has a route of its own, so nothing is shared."""
    model = routed(base, "attn_sequence", pool="all")
    run = Run(model, tok, "gather")
    item = works(base, tok, "openbookqa", share=run.shares)[0].items[0]
    line, = score(run, [item])
    assert not run.caches and line["units"] == 4
    for branch, found in zip(item.queries[0].branches, line["logprobs"]):
        logits = model(torch.tensor([list(item.queries[0].context + branch.tokens)[:-1]]), route="gather")[0][0].log_softmax(-1)
        first = len(item.queries[0].context) - 1
        assert found == pytest.approx(sum(logits[first + i, token].item() for i, token in enumerate(branch.tokens)), abs=2e-5)


@pytest.mark.parametrize("granularity", [None, "attn_token", "block_sequence"])
def test_batch_size_does_not_matter(base, tok, granularity, monkeypatch):
    monkeypatch.setattr(scoring, "NEW_TOKENS", 24)
    model = load_model(base / "base") if granularity is None else routed(base, granularity)
    route = "off" if granularity is None else "gather"
    for name in ("arc_challenge", "gsm8k", "mmlu_anatomy"):
        runs = [Run(model, tok, route, max_batch_tokens=n) for n in (1, 333, 100_000)]
        one, two, many = (score(run, works(base, tok, name, share=run.shares)[0].items) for run in runs)
        for a, b, c in zip(one, two, many):
            for other in (b, c):
                assert a["logprobs"] == pytest.approx(other["logprobs"], abs=2e-5) and a["executed"] == other["executed"]
                assert a["prediction"] == other["prediction"] and a.get("text") == other.get("text")


def test_no_call_exceeds_the_token_budget(base, tok, monkeypatch):
    """Tokens computed at once and slots of the cache that a call fills stay below the budget, at any context length."""
    model, budget, seen = load_model(base / "base"), 600, []
    plain = Transformer.hidden

    def spy(self, tokens, **kwargs):
        out = plain(self, tokens, **kwargs)
        seen.append((tokens.numel(), len(tokens) * max(kwargs["cache"].lengths)))
        return out

    monkeypatch.setattr(Transformer, "hidden", spy)
    for work in works(base, tok, "arc_challenge", "mmlu_anatomy", "winogrande", shots=5):
        longest = max(item.width for item in work.items)
        seen.clear()
        score(Run(model, tok, max_batch_tokens=budget), work.items)
        assert max(tokens for tokens, _ in seen) <= budget and max(slots for _, slots in seen) <= max(budget, longest)
    seen.clear()
    score(Run(model, tok, max_batch_tokens=100), works(base, tok, "arc_challenge", shots=20)[0].items)
    assert max(tokens for tokens, _ in seen) <= 100


def test_cache_bytes_are_those_of_the_cache(base):
    for granularity, kv in CASES[1:]:
        model = routed(base, granularity, kv)
        cache = KVCache(model, 2)
        tokens = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(1))
        _, gates = model.hidden(tokens, lengths=[17, 11], cache=cache, route="gather")
        counts = scoring.tally(gates, 2)
        assert [scoring.cache_bytes(Run(model, None, "gather"), n, c) for n, c in zip((17, 11), counts)] == cache.row_bytes()
        listed, lists = KVCache(model, 2), torch.tensor([[1.0, 0.0]] * len(model.routing.places))
        model.hidden(tokens, lengths=[17, 11], cache=listed, route="gather", gates=lists)
        run = Run(model, None, "gather", scoring.list_control(lambda task: ([0], 1.0), model))
        assert [scoring.cache_bytes(run, n, c) for n, c in zip((17, 11), scoring.tally(lists, 2))] == listed.row_bytes()
    assert scoring.cache_bytes(Run(model, None), 10, []) == 2 * 10 * 4 * 2 * 8 * 4


# ------------------------------------------------------------------------------------------------------------ generation


def test_greedy_answers_equal_generate(base, tok, monkeypatch):
    monkeypatch.setattr(scoring, "NEW_TOKENS", 48)
    model = routed(base, "attn_sequence")
    items = works(base, tok, "gsm8k", shots=2)[0].items
    lines = score(Run(model, tok, "gather"), items)
    for item, line in zip(items, lines):
        ids = generate(model, [list(item.queries[0].context)], scoring.NEW_TOKENS, stop_tokens=tok.stop_ids, route="gather")[0]
        assert line["text"] == scoring.cut_at_stop(tok.decode(ids, skip_special=True), scoring.STOPS)
        assert line["gold"] == ("4", "999")[item.index] and line["units"] == 1


@pytest.mark.parametrize("text, strict, flexible", [
    ("It is 4.\n#### 1,234.", "1,234.", "1,234."), ("so $5 and 7 left", "[invalid]", "7"), ("none", "[invalid]", "[invalid]"),
    ("#### -3\n#### 8", "-3", "8")])
def test_answers_are_extracted_as_by_the_harness(text, strict, flexible):
    assert scoring.extract(text, scoring.STRICT, 0) == strict and scoring.extract(text, scoring.FLEXIBLE, -1) == flexible


def test_answers_are_compared_without_marks():
    assert scoring.normal("1,234.") == scoring.normal("Thus.\n#### $1234") == "1234"
    assert scoring.cut_at_stop("a Question: b</s>", scoring.STOPS) == "a "


# ------------------------------------------------------------------------------------------------------------ perplexity and controls


def talk(i: int) -> list[dict]:
    return [{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": "yes " * (1 + i % 3)}]


def messages(path: Path, n: int = 5) -> Path:
    jsonl(path, [{"messages": talk(i), "split": "heldout" if i % 2 else "train", "domain": "ab"[i % 2]} for i in range(n)])
    return path


@pytest.mark.parametrize("granularity", [None, "attn_sequence", "attn_token"])
def test_perplexity_is_the_mean_loss_of_the_answers(base, tok, tmp_path, granularity):
    model = load_model(base / "base") if granularity is None else routed(base, granularity)
    route, losses = "off" if granularity is None else "gather", []
    work = scoring.prepare_perplexity("perplexity", messages(tmp_path / "m.jsonl"), tok, items=None, limit=1024, split=None)
    lines = scoring.run_work(Run(model, tok, route), work, {}, "", scoring.Samples(None, CPU), scoring.Progress([work], False), CPU)
    for i in range(5):
        ids, mask = scoring.encode_chat(tok, talk(i))
        logits = model(torch.tensor([ids]), prompt_lengths=[mask.index(True)], route=route)[0][0].log_softmax(-1)
        losses += [-logits[place - 1, ids[place]].item() for place, loss in enumerate(mask) if loss]
    result = scoring.summarise(lines, ("nll",))
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5) and result["tokens"] == len(losses)
    assert len(scoring.prepare_perplexity("perplexity", tmp_path / "m.jsonl", tok, items=None, limit=1024, split="heldout").items) == 2


def test_controls_force_their_routes(base, tok, tmp_path):
    for granularity in ("attn_sequence", "attn_token"):
        model = routed(base, granularity)
        items = works(base, tok, "piqa", share=False)[0].items * 40
        items = [replace(item, queries=[replace(item.queries[0], owner=("piqa", i))]) for i, item in enumerate(items)]

        def result(control: str, budget=None) -> dict:
            run = Run(model, tok, "gather", scoring.make_control(control, model, budget, {"greedy": ["2", "1", "3"]}))
            return scoring.summarise(score(run, items), ("acc", "acc_norm"))

        drop = result("static:1,3")
        assert drop["capacity_per_layer"] == [0.0, 1.0, 0.0], "a list skips whole sequences, whatever the unit"
        chance = result("random:5", budget=0.4)
        assert chance["capacity"] == pytest.approx(0.4, abs=0.06) and chance["route_variance"] > 0
        assert chance == result("random:5", budget=0.4) != result("random:6", budget=0.4)
        (tmp_path / "r.json").write_text(json.dumps({"results": {"piqa": {"capacity_per_layer": [0.2, 0.9, 0.6]}}}))
        mean = result(f"mean:{tmp_path / 'r.json'}")
        assert mean["capacity_per_layer"][:2] == [0.0, 1.0] and mean["capacity"] == pytest.approx(1.7 / 3, abs=0.06)
        assert mean == result(f"mean:{tmp_path / 'r.json'}")
        assert result("greedy", budget=1 / 3) == result("static:1,2") and result("greedy", budget=1.0)["capacity"] == 1.0
        part = result("greedy", budget=0.5)  # where a list ends within a place, it is skipped for that share of the items
        assert part["capacity"] == pytest.approx(0.5, abs=0.06) and part["capacity_per_layer"][1:] == [0.0, 1.0]
        for control in ("greedy", "similarity", "random:5"):
            with pytest.raises(ValueError, match="--control"):
                result(control)


def test_controls_of_both_count_compute(base, tok, tmp_path):
    """An MLP counts more than an attention: orders, random routes and mean routes keep to the budget in what places count, and keys and values go by
    attentions alone."""
    model = routed(base, "both_sequence")
    names, weights = model.routing.names, model.place_weights().tolist()
    assert names == ("1.attn", "2.attn", "2.mlp", "3.attn") and weights[2] > weights[0] == weights[1] == weights[3]
    items = works(base, tok, "piqa", share=False)[0].items * 60
    items = [replace(item, queries=[replace(item.queries[0], owner=("piqa", i))]) for i, item in enumerate(items)]

    def result(control: str, budget=None) -> dict:
        run = Run(model, tok, "gather", scoring.make_control(control, model, budget, {"greedy": ["2.mlp", "1.attn", "2.attn", "3.attn"]}))
        return scoring.summarise(score(run, items), ("acc", "acc_norm"), weights)

    drop, dense = result("static:2.mlp"), result("greedy", 1.0)
    assert drop["capacity"] == pytest.approx(1 - weights[2]) and drop["capacity_per_layer"] == [1.0, 1.0, 0.0, 1.0] and drop["kv_bytes"] == dense["kv_bytes"]
    assert result("greedy", 1 - weights[2]) == drop and result("static:1.attn")["kv_bytes"] < dense["kv_bytes"]
    assert result("random:5", 0.6)["capacity"] == pytest.approx(0.6, abs=0.06)
    (tmp_path / "r.json").write_text(json.dumps({"results": {"piqa": {"capacity_per_layer": [0.9, 1.0, 0.1, 0.9]}}}))
    mean = result(f"mean:{tmp_path / 'r.json'}")
    wanted = sum(weight * share for weight, share in zip(weights, [0.9, 1.0, 0.1, 0.9]))
    assert mean["capacity"] == pytest.approx(wanted, abs=0.06) and sum(0 < share < 1 for share in mean["capacity_per_layer"]) <= 1
    with pytest.raises(ValueError, match="expected numbers of routed layers, which are 1.attn"):
        result("static:2")


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_calibration_holds_the_budget_on_a_task(base, tok, granularity):
    """Cuts move together, a layer that is closed for everyone stays closed, and the second task starts from the file's cuts again."""
    model = routed(base, granularity)
    piqa, boolq = works(base, tok, "piqa", share=False)[0], works(base, tok, "boolq", share=False)[0]
    generator = random.Random(0)
    letters = [Item([Query(("piqa", i), array("i", generator.choices(range(32, 120), k=12)), [Branch(0, array("i", [65]), range(1))])], 0, [1]) for i in range(60)]
    piqa.items[:] = letters
    run = Run(model, tok, "gather")
    for cuts, budget in (([0.0, 0.3, -0.2], 0.4), ([0.0, 0.3, -0.2], 0.75), ([0.0, math.inf, -0.2], 0.5), ([0.0, 0.3, -0.2], 1.0)):
        with torch.no_grad():
            scoring.calibrate(run, boolq, 2, 0.3, cuts)
            scoring.calibrate(run, piqa, 60, budget, cuts)
            moved = [router.cut.item() for router in model.routers()]
            scoring.calibrate(run, piqa, 60, budget, cuts)
        assert moved == [router.cut.item() for router in model.routers()]
        found = scoring.summarise(score(run, piqa.items), ("acc",))
        if budget == 1.0:
            assert moved == pytest.approx(cuts)
            continue
        assert found["capacity"] == pytest.approx(budget, abs=0.03)
        rises = [cut - old for cut, old in zip(moved, cuts) if not math.isinf(old)]
        assert rises == pytest.approx([rises[0]] * len(rises), abs=1e-5)
        assert not math.isinf(cuts[1]) or found["capacity_per_layer"][1] < 0.1  # first tokens alone


# ------------------------------------------------------------------------------------------------------------ results


def test_routes_are_told_apart_within_and_between_tasks():
    found = scoring.routes_of([[1.0, 0.5, 0.0], [1.0, 0.5, 1.0]], [0.0, 0.1])
    assert found == {"variance_within_tasks": 0.05, "variance_between_tasks": pytest.approx(0.25 / 3), "constant_task_layer_pairs": pytest.approx(4 / 6)}


def test_standard_errors_and_pooling():
    assert scoring.mean_stderr([1, 0, 1, 1]) == (0.75, pytest.approx(0.25)) and scoring.mean_stderr([1]) == (1.0, None)
    blank = {"executed": [], "units": 0, "kv_bytes": 0, "truncated": False}
    records = {"a": [{"acc": v, **blank} for v in (1, 0, 1, 1)], "b": [{"acc": v, **blank} for v in (0, 0, 1)]}
    results = {name: scoring.summarise(part, ("acc",)) | {"shots": 5, "seconds": 1.0} for name, part in records.items()}
    group = scoring.summarise_group(["a", "b"], results, records)
    assert group["acc"] == pytest.approx(4 / 7) and group["acc_subjects"] == pytest.approx((3 / 4 + 1 / 3) / 2) and group["n"] == 7
    assert group["acc_stderr"] == pytest.approx(math.sqrt((3 * 0.25**2 * 4 + 2 * (1 / 3) ** 2 * 3) / 5 / 7))


def test_paired_comparison_counts_flips():
    ours = {"piqa": {"sha": "x", "acc": "1101"}, "perplexity": {"sha": "y", "nll": [2.0, 3.0], "tokens": [2, 4]}}
    theirs = {"piqa": {"sha": "x", "acc": "0111"}, "perplexity": {"sha": "y", "nll": [1.0, 2.0], "tokens": [2, 4]}}
    found = scoring.compare(ours, theirs)
    error = pytest.approx(math.sqrt(2 / 3 / 4))
    assert found["piqa"]["acc"] == {"difference": 0.0, "stderr": error, "gained": 1, "lost": 1, "flips": 2, "n": 4}
    assert found["perplexity"]["loss"]["difference"] == pytest.approx(2 / 6)


def test_own_task_by_a_flag(base, tmp_path):
    rows = [{"question": f"Is {n} odd?", "choices": ["the yes", "no"], "answer": 0 if n % 2 else "no"} for n in range(6)]
    jsonl(tmp_path / "odd.jsonl", rows)
    report = scoring.evaluate(settings(base, custom=(str(tmp_path / "odd.jsonl"),), fewshot=2, samples=str(tmp_path / "s.jsonl")), CPU)
    assert report["results"]["odd"]["n"] == 6 and report["results"]["odd"]["shots"] == 2
    assert [json.loads(line)["gold"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == [1, 0] * 3


# ------------------------------------------------------------------------------------------------------------ runs


def test_killed_run_goes_on_bit_for_bit(base, tmp_path, monkeypatch):
    """Whole lines are kept, a torn one is dropped, and only batches that lack an item are scored again."""
    cfg = settings(base, tasks=("arc_challenge", "winogrande"), fewshot=3, samples=str(tmp_path / "s.jsonl"), max_batch_tokens=2500)
    whole = scoring.evaluate(cfg, CPU)
    data, calls = (tmp_path / "s.jsonl").read_bytes(), []
    plain = scoring.score_batch
    monkeypatch.setattr(scoring, "score_batch", lambda run, batch, prefix: calls.append(len(batch)) or plain(run, batch, prefix))
    for kept in (0, 1, 4, 6):
        lines, calls[:] = data.splitlines(True), []
        (tmp_path / "s.jsonl").write_bytes(b"".join(lines[:kept]) + (lines[kept][:20] if kept < 6 else b""))
        again = scoring.evaluate(cfg, CPU)
        assert (tmp_path / "s.jsonl").read_bytes() == data and again["items"] == whole["items"] and 6 - kept <= sum(calls) <= 6
    assert not calls and sum(r["resumed"] for r in again["results"].values()) == 6
    with pytest.raises(ValueError, match="another model"):
        scoring.evaluate(replace(cfg, fewshot=2), CPU)
    (tmp_path / "s.jsonl").write_bytes(b"{}\n" + data)
    with pytest.raises(ValueError, match="line 1 is not a sample line"):
        scoring.evaluate(cfg, CPU)


def command(base, *extra: str, ranks: int = 0) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else [sys.executable]
    given = [str(ROOT / "eval.py"), f"--model={base / 'base'}", f"--data={base / 'data'}", "--device=cpu", "--dtype=float32", "--threads=1"]
    return subprocess.run([*start, *given, *extra], capture_output=True, text=True, timeout=120)


def test_two_ranks_are_one_process_bit_for_bit(base, tmp_path):
    routers = tmp_path / "routers.safetensors"
    model = routed(base, "attn_token")
    thresholds = [torch.sigmoid(router.cut).item() for router in model.routers()]
    save_routers(routers, model, RouterMeta(model.routing, thresholds, model.fingerprint))
    reports = []
    for ranks in (0, 2):
        out, samples = tmp_path / f"{ranks}.json", tmp_path / f"{ranks}.jsonl"
        done = command(base, "--tasks=arc_challenge,winogrande,mmlu_stem,gsm8k", "--fewshot=2", f"--routers={routers}",
                       f"--perplexity={messages(tmp_path / 'm.jsonl')}", "--max_batch_tokens=4000", f"--out={out}",
                       f"--samples={samples}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "| mmlu_stem | 2 | 57 |" in done.stdout and "perplexity" in done.stdout and "eta" in done.stderr
        reports.append(json.loads(out.read_text()))
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes() and reports[0]["items"] == reports[1]["items"]
    alone, together = ({name: {**result, "seconds": 0} for name, result in report["results"].items()} for report in reports)
    assert alone == together
    for name in ("perplexity", "perplexity_dense"):  # domains are a partition of the items
        parts, whole = [reports[1]["domains"][f"{name}/{domain}"] for domain in "ab"], reports[1]["results"][name]
        assert sum(part["loss"] * part["tokens"] for part in parts) / whole["tokens"] == pytest.approx(whole["loss"]) and sum(p["n"] for p in parts) == whole["n"]
    assert reports[0]["routes"] == reports[1]["routes"] and "routes: variance within tasks" in done.stdout
    assert 0 < reports[0]["results"]["arc_challenge"]["capacity"] < 1 and reports[0]["results"]["mmlu_stem"]["subjects"] == 19


# ------------------------------------------------------------------------------------------------------------ errors


def damage(data: Path, path: str, text: str, line: int = 2) -> None:
    lines = (data / path).read_text().split("\n")
    lines[line - 1] = text
    (data / path).write_text("\n".join(lines))


ERRORS = {
    "not json": ("arc_easy", "arc/ARC-Easy/ARC-Easy-Test.jsonl", "{broken", "line 2 is not JSON"),
    "missing field": ("piqa", "piqa/valid.jsonl", '{"goal": "x", "sol1": "y"}', "line 2: there is no field 'sol2'"),
    "wrong label": ("winogrande", "winogrande/dev.jsonl", '{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "3"}',
                    "line 2: the label is '3', expected one of 1, 2"),
    "no blank": ("winogrande", "winogrande/dev.jsonl", '{"sentence": "a b", "option1": "x", "option2": "y", "answer": "1"}',
                 "line 2: the sentence has no blank"),
    "label out of place": ("arc_easy", "arc/ARC-Easy/ARC-Easy-Test.jsonl", json.dumps(stem("q", ["a", "b"], "AB", "C")),
                           "line 2: the label is 'C', expected one of A, B"),
    "empty choice": ("openbookqa", "openbookqa/Main/test.jsonl", json.dumps(stem("q", ["a", " "], "AB", "A")), "line 2: a choice is ' '"),
    "no choices": ("openbookqa", "openbookqa/Main/test.jsonl", json.dumps(stem("q", ["a"], "A", "A")), "line 2: the row has 1 choices"),
    "not text": ("piqa", "piqa/valid.jsonl", '{"goal": "x", "sol1": "y", "sol2": 7}', "line 2: a choice is 7"),
    "csv fields": ("mmlu_anatomy", "mmlu/data/test/anatomy_test.csv", 'then",one,two', "line 2: the row has 3 fields"),
    "tsv fields": ("rte", "rte/glue/RTE/dev.tsv", "0\ta\tb", "line 2 has 3 fields, expected index, sentence1"),
    "bool label": ("boolq", "boolq/dev.jsonl", '{"question": "q", "passage": "p", "label": "maybe"}', "line 2: the label is 'maybe'"),
    "labels file": ("piqa", "piqa/valid-labels.lst", "1\n1", "holds 3 labels, valid.jsonl 2 rows"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_rows_are_named_by_file_and_line(base, data, tmp_path, case):
    name, path, text, message = ERRORS[case]
    damage(data, path, text)
    with pytest.raises(ValueError) as error:
        scoring.evaluate(settings(base, data=str(data), tasks=(name,), samples=str(tmp_path / "s.jsonl"), fewshot=0), CPU)
    assert message in str(error.value) and Path(path).name.split("-labels")[0].split(".")[0] in str(error.value)
    assert not list(tmp_path.glob("*.json*"))


def test_misuse_is_refused_with_a_reason(base, data, tmp_path):
    def refused(match: str, kind=ValueError, **changes):
        with pytest.raises(kind, match=match):
            scoring.evaluate(settings(base, **{"data": str(data), "tasks": ("piqa",), **changes}), CPU)

    refused("nearest task is 'arc_easy'", tasks=("arc_esy",))
    refused("nothing to score", tasks=())
    refused("needs routed layers", route="gather")
    refused("needs routed layers", control="random:1")
    refused("--limit is 0", limit=0)
    refused("--calibrate=5 moves the routers' cuts", calibrate=5)
    refused("cannot be written", out=str(tmp_path))
    refused("cannot be written", samples=str(base / "base/config.json/s.jsonl"))
    refused("this model's context is 1024", max_length=5000)
    refused("gsm8k generates 256", tasks=("gsm8k",), max_length=200)
    refused("need a pool of 31 and it holds 30", tasks=("arc_challenge",), fewshot=30)
    refused("no field 'items'", against=str(base / "base/config.json"))
    runtime.write_json(tmp_path / "other.json", scoring.evaluate(settings(base, tasks=("rte",)), CPU))
    refused("has none of the tasks", against=str(tmp_path / "other.json"))
    refused("scored other items or prompts of rte", tasks=("rte",), limit=1, against=str(tmp_path / "other.json"))
    (data / "piqa/valid.jsonl").unlink()
    (data / "mmlu/data/dev/anatomy_dev.csv").unlink()
    message = r"piqa: piqa/valid.jsonl  \(https://yonatanbisk.com/piqa\)\n  mmlu_anatomy: .*\n.*data/fetch.py --tasks=piqa,mmlu"
    refused(message, FileNotFoundError, tasks=("piqa", "mmlu_anatomy"))
    jsonl(tmp_path / "own.jsonl", [{"question": "q", "choices": "ab", "answer": 0}])
    refused("own.jsonl, line 1: choices is 'ab'", tasks=(), custom=(str(tmp_path / "own.jsonl"),))
    jsonl(tmp_path / "long.jsonl", [{"messages": [{"role": "user", "content": "x" * 2000}, {"role": "assistant", "content": "y"}]}])
    refused("long.jsonl, line 1: 20.. tokens", tasks=(), perplexity=str(tmp_path / "long.jsonl"))
    jsonl(tmp_path / "odd.jsonl", [{"text": "y"}])
    refused("odd.jsonl, line 1: there is no field 'messages'", tasks=(), perplexity=str(tmp_path / "odd.jsonl"))


def test_user_errors_end_in_one_line_and_status_2(base):
    done = command(base, "--tasks=nonsense")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nearest" in done.stderr and done.stdout == ""
    with pytest.raises(ValueError, match="nearest one is --tasks"):
        runtime.cli(EvalConfig, ["--model=x", "--task=piqa"])
