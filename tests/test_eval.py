"""Scoring: spans, batches, ranks, resuming, errors, on made-up rows.  Scorer: python -m pytest tests/test_eval.py"""

import json
import math
import random
import re
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as scoring
import runtime
from data.records import Form, encode
import data.rows as rows_module
from data.rows import Item, Row, encode_pairs, rows_of, windows
from data.tasks import TASKS, Task, chat_prompt, draw_shots, find, locate, piqa, read_questions, tasks_named
from eval import EvalConfig, ReadyTask, Scorer
from model import KVCache, Transformer, generate, load_model
from recipe.forced import Control, make_control
from recipe.orders import gate_norm_order
from recipe.results import mean_stderr
from router import GRANULARITIES, RouterConfig, RouterMeta, save_routers, set_cuts
from runtime import ALONE as CPU
from test_tasks import stem, write_data
from tiny import CONFIG, byte_tokenizer, write_base, write_jsonl
from tokenizer import encode_chat, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MERGES = ("h e", "e s", "Ġ A", "Ġ B", "Ġ C", "Ġ D", "Ġ t", "Ġ n", "Ġ y", "Ġn o", "Ġt he", "Ġy es")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random Llama of four layers with a byte tokenizer, and made-up data."""
    folder = tmp_path_factory.mktemp("eval")
    write_data(folder / "data")
    write_base(folder / "base", replace(CONFIG, vocab_size=272, max_seq_len=1024))
    (folder / "base/tokenizer.json").write_text(json.dumps(byte_tokenizer(MERGES)))
    return folder


@pytest.fixture(scope="session")
def tok(base):
    return load_tokenizer(base / "base")


@pytest.fixture
def data(base, tmp_path):
    """A private copy of the data, to be damaged."""
    write_data(tmp_path / "data")
    return tmp_path / "data"


def routed(base, granularity: str, kv: str = "routed", pool: str = "prompt") -> Transformer:
    """The base with random routers in layers 1-3, each cut at its median score over a few texts: routes differ."""
    model = load_model(base / "base")
    routing = RouterConfig.of(granularity, (1, 2, 3), pool=pool, kv=kv)
    if routing.target == "both":  # attention in all three layers, the MLP in one
        places = [place for place in routing.places if place.target == "attn" or place.layer == 2]
        routing = replace(routing, places=tuple(places))
    model.add_routers(routing)
    model.requires_grad_(False)
    torch.manual_seed(0)
    texts = (
        b"Question: Which is hot?\nAnswer:",
        b"Pot 3 met pan 3, the pot broke.",
        b"Open a jar, turn the lid. Open ",
    )
    texts = torch.tensor([list(text) for text in texts])
    for i, router in enumerate(model.routers()):
        torch.nn.init.normal_(router.weight)
        router.cut.fill_(model.hidden(texts, route="mask", return_scores=True)[2][i].median())
    return model


def settings(base, **changes) -> EvalConfig:
    own = {"model": str(base / "base"), "data": str(base / "data"), "device": "cpu", "dtype": "float32"}
    return EvalConfig(**{**own, **changes})


def examples(base, name: str) -> list:
    return read_questions(find(base / "data", TASKS[name].files), TASKS[name])


def ready_tasks(base, tok, *names, share=True, limit=1024, **changes) -> list[ReadyTask]:
    made = []
    for task in tasks_named(names):
        shots = changes.pop("fewshot", 2 if task.name == "arc_challenge" else task.shots)
        paths = locate([task], base / "data", {task.name: shots})
        cfg = settings(base, fewshot=shots, seed=1, **changes)
        how = SimpleNamespace(tok=tok, shares=share)
        made.append(scoring.prepare_task(task, paths[task.name], how, cfg, limit))
        changes["fewshot"] = shots if "fewshot" in changes else changes.get("fewshot", shots)
        changes = {key: value for key, value in changes.items() if key != "fewshot"}
    return made


def score(run: Scorer, items: list[Item], alone=False) -> list[dict]:
    """Records of the items as a task, or of each by itself: no batch, no shared prefix."""
    run = replace(run, task=run.task or "piqa")
    if alone:
        return [line for item in items for line in scoring.score_batch(run, [item])]
    ready = ReadyTask(TASKS["piqa"], "", items=items)
    return scoring.score_task(run, ready, {}, lambda records: None, runtime.Progress("x", 0), CPU)


# -----------------------------------------------------------------------------
# Tokens


def test_trailing_spaces_of_the_context_go_to_the_choice(tok):
    ((context, choice),), spanning = encode_pairs(tok, ["say:  "], ["the end"])
    assert tok.decode(context) == "say:" and tok.decode(choice) == "  the end" and not spanning
    assert encode_pairs(tok, ["say:"], [" A"])[0] == [(tok.encode("say:"), [tok.encode(" A")[0]])]


def test_choice_is_what_lies_beyond_as_many_tokens_as_the_context(tok):
    """Where a merge crosses the boundary, lm-eval keeps the context's own tokens and cuts the whole text by count."""
    ((context, choice),), _ = encode_pairs(tok, ["th"], ["e end"])  # "th" + "e": t, h against t, he
    assert context == tok.encode("th") and choice == tok.encode("the end")[2:] and tok.decode(choice) == " end"


def spanning_tokenizer(folder: Path):
    """One token spans ": C", as sentencepiece's do: words end at line feeds alone."""
    tokenizer = byte_tokenizer((": Ġ", ":Ġ C"))
    split = {"type": "Split", "pattern": {"Regex": r"[^\n]+|\n"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            split,
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return load_tokenizer(folder)


def test_a_choice_without_a_token_of_its_own_is_scored_by_what_it_adds(base, tmp_path, capsys):
    """One token once spanned context and choice, and the whole task stopped. All choices are then scored from the
    same place, item and count are named, and other items stay as they were."""
    own = tmp_path / "own"
    write_base(own / "base", replace(CONFIG, vocab_size=272, max_seq_len=1024))
    tok = spanning_tokenizer(own / "base")
    rows = [{"question": "Which?", "choices": list("ABCD"), "answer": 2}]
    rows += [{"question": "Which?", "choices": list("ABD"), "answer": 2}]
    write_jsonl(tmp_path / "odd.jsonl", rows)
    report = scoring.evaluate(
        settings(own, custom=(str(tmp_path / "odd.jsonl"),), samples=str(tmp_path / "s.jsonl")), CPU
    )
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    context, model = tok.encode("Question: Which?\nAnswer"), load_model(own / "base")
    for choice, found in zip("ABCD", lines[0]["logprobs"]):
        whole = tok.encode(f"Question: Which?\nAnswer: {choice}")
        assert whole[: len(context)] == context and len(whole) - len(context) == (1 if choice == "C" else 2)
        assert found == pytest.approx(direct(model, context, whole[len(context) :]), abs=1e-4)
    ids = tok.encode("Question: Which?\nAnswer:")
    for choice, found in zip("ABD", lines[1]["logprobs"]):
        whole = tok.encode(f"Question: Which?\nAnswer: {choice}")
        assert found == pytest.approx(direct(model, ids, whole[len(ids) :]), abs=1e-4)
    assert report["results"]["odd"]["spanning"] == 1 and lines[0]["spanning"] and "spanning" not in lines[1]
    assert "odd: 1 of 2 items have a choice without a token of its own" in capsys.readouterr().err


def test_nothing_left_to_score_skips_the_item_by_number(base, tok, tmp_path, capsys, monkeypatch):
    """A choice that adds nothing at all: its item is left out, counted and named."""
    plain = scoring.encode_pairs
    monkeypatch.setattr(
        scoring,
        "encode_pairs",
        lambda tok, contexts, choices: (
            [
                (context, target if contexts[0][10] != "1" else [])
                for context, target in plain(tok, contexts, choices)[0]
            ],
            True,
        ),
    )
    write_jsonl(tmp_path / "x.jsonl", [{"question": f"{n}?", "choices": ["a", "b"], "answer": 0} for n in range(3)])
    report = scoring.evaluate(
        settings(base, custom=(str(tmp_path / "x.jsonl"),), samples=str(tmp_path / "s.jsonl")), CPU
    )
    assert report["results"]["x"]["n"] == 2 and report["results"]["x"]["skipped"] == 1
    assert [json.loads(line)["index"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == [0, 2]
    assert "x: 1 of 3 items are skipped, nothing of them can be scored (1)" in capsys.readouterr().err


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("text", ["<s>Ann met Eve", "Ann met Eve", "<s><s>Ann", " <s>Ann", "</s>Ann"])
def test_a_text_that_begins_with_bos_gets_no_second_one(tmp_path, text, adds):
    """As lm-eval's tok_encode; against it where it is installed."""
    tokenizer, bos = byte_tokenizer(MERGES), {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text_itself, known = {"Sequence": {"id": "A", "type_id": 0}}, {"id": "<s>", "ids": [268], "tokens": ["<s>"]}
    both = {"Sequence": {"id": "B", "type_id": 0}}
    if adds:
        own = {"single": [bos, text_itself], "pair": [text_itself, both], "special_tokens": {"<s>": known}}
        tokenizer["post_processor"] = {"type": "TemplateProcessing", **own}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = load_tokenizer(tmp_path)
    ids = rows_module.encode_prompt(tok, text)
    wanted = text.count("<s>") + (adds and not text.startswith("<s>"))
    assert ids.count(tok.bos_id) == wanted and tok.decode(ids).endswith(text)
    models, transformers = pytest.importorskip("lm_eval.models.huggingface"), pytest.importorskip("transformers")
    harness = object.__new__(models.HFLM)
    harness.tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    harness.custom_prefix_token_id, harness.add_bos_token, harness.backend = None, None, "causal"
    assert harness.tok_encode(text) == ids
    assert harness._encode_pair(text + ":  ", "the end") == encode_pairs(tok, [text + ":  "], ["the end"])[0][0]


@pytest.mark.parametrize("limit", [30, 9, 6])
def test_long_items_lose_their_beginning_as_in_the_harness(limit):
    pairs = [(list(range(20)), [91, 92, 93]), (list(range(20)), [94, 95])]
    rows, cut = rows_of(0, pairs, limit, False)
    for row, (context, ids) in zip(rows, pairs):
        seen = list(row.context) + list(row.target[:-1])
        assert seen == (context + ids)[-(limit + 1) :][:-1] and [row.target[place] for place in row.at] == ids
    assert cut == (limit < 22) and len(scoring.grouped(rows)[0]) == (2 if cut else 1)


def test_differing_contexts_share_their_beginning():
    pairs = [([1, 2, 3, 4], [9, 8]), ([1, 2, 5], [9, 8])]
    rows, _ = rows_of(0, pairs, 100, True)
    assert all(list(row.context) == [1, 2] for row in rows) and rows[0].context is rows[1].context
    assert [list(row.target) for row in rows] == [[3, 4, 9, 8], [5, 9, 8]]
    assert [[row.target[place] for place in row.at] for row in rows] == [[9, 8], [9, 8]]
    assert len(scoring.grouped(rows_of(0, pairs, 100, False)[0])[0]) == 2
    assert len(scoring.grouped(rows_of(0, [([1], [2]), ([3], [2])], 100, True)[0])[0]) == 2


def made_item(index: int, context, targets) -> Item:
    context = array("i", context)
    rows = [Row(index, choice, context, array("i", ids), range(len(ids))) for choice, ids in enumerate(targets)]
    return Item(index, rows, 0, [1] * len(rows))


def test_plan_keeps_the_budget_and_every_item():
    items = [made_item(i, range(n), [[1, 2]] * 3) for i, n in enumerate([5, 90, 7, 7, 400, 6, 30] * 9)]
    batches = scoring.plan_batches(items, 500)
    assert sorted(item.index for batch in batches for item in batch) == list(range(len(items)))
    for batch in batches:
        rows, width = scoring.shape([row for item in batch for row in item.rows])
        assert len(batch) == 1 or rows * width <= 500


# -----------------------------------------------------------------------------
# Scores


class Bigram:
    """A model whose next-token logits are a table: scores can be worked out by hand."""

    def __init__(self, table: torch.Tensor):
        self.table, self.config, self.routing = table, SimpleNamespace(n_layers=1, n_kv_heads=1, head_dim=1), None
        self.tok_embeddings, self.dtype = SimpleNamespace(weight=table), table.dtype

    def hidden(self, tokens, *, lengths=None, cache=None, **_):
        cache.lengths = [a + b for a, b in zip(cache.lengths, lengths)]
        return torch.nn.functional.one_hot(tokens, len(self.table)).float(), None

    def head(self, h):
        return h @ self.table


def test_scores_worked_out_by_hand(tok):
    """Log-probability of a choice: the sum over its tokens, the first predicted by the context's last; acc_norm divides
    by characters."""
    table = torch.zeros(4, 4)
    # p(2|1) = 5/8, p(3|1) = 1/8, p(3|2) = 2/5, p(3|3) = 1/6
    table[1, 2], table[2, 3], table[3, 0] = math.log(5), math.log(2), math.log(3)
    item = replace(made_item(0, [0, 1], [[2, 3, 3], [3]]), sizes=[9, 1])
    (line,) = score(Scorer(Bigram(table), tok), [item], alone=True)
    assert line["logprobs"] == pytest.approx([math.log(5 / 8 * 2 / 5 / 6), math.log(1 / 8)])
    assert (line["prediction"], line["acc"]) == (1, 0)
    assert (line["prediction_norm"], line["acc_norm"]) == (0, 1)  # -3.18 / 9 beats -2.08 / 1
    result = scoring.result_of([line, line | {"gold": 1}], ("acc", "acc_norm"))
    assert result["gold_logprob"] == pytest.approx((math.log(5 / 8 * 2 / 5 / 6) + math.log(1 / 8)) / 2)


def test_scored_span_starts_and_ends_at_the_choice(base, tok):
    """Row by row against a whole forward pass: no token of the context counts, none of the choice is left out."""
    model = load_model(base / "base")
    for name in ("boolq", "piqa", "winogrande", "mmlu_anatomy"):
        for item, example in zip(ready_tasks(base, tok, name, fewshot=0)[0].items, examples(base, name)):
            (line,) = score(Scorer(model, tok), [item], alone=True)
            for context, choice, found in zip(example.contexts, example.choices, line["logprobs"]):
                ((ids, new),), _ = encode_pairs(tok, [TASKS[name].description + context], [" " + choice])
                assert found == pytest.approx(direct(model, ids, new), abs=1e-4)


def direct(model: Transformer, context: list[int], target: list[int], route: str = "off") -> float:
    """log P(target | context) from one pass over both."""
    tokens = torch.tensor([[*context, *target][:-1]])
    logits = model(tokens, prompt_lengths=[len(context)], route=route)[0][0].log_softmax(-1)
    return sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(target))


CASES = [
    (None, ""),
    *((granularity, "routed") for granularity in GRANULARITIES),
    ("attn_token", "all"),
    ("both_token", "all"),
]


@pytest.mark.parametrize("granularity, kv", CASES)
def test_shared_contexts_score_as_rows_alone(base, tok, granularity, kv):
    """Contexts once for all choices, shared prefixes and batches, against one row at a time without a cache; gates
    counted alike."""
    model = load_model(base / "base") if granularity is None else routed(base, granularity, kv)
    run, routes = Scorer(model, tok, "off" if granularity is None else "gather"), set()
    for name in ("mmlu_anatomy", "winogrande", "arc_challenge", "piqa"):
        (ready,) = ready_tasks(base, tok, name, share=run.shares, fewshot_by="first")
        (plain,) = ready_tasks(base, tok, name, share=False, fewshot_by="first")
        shared, alone = score(run, ready.items), score(run, ready.items, alone=True)
        routes |= {tuple(line["executed"]) for line in shared}
        for item, *lines in zip(plain.items, shared, alone):
            sums, usage = scoring.score_plain(replace(run, max_batch_tokens=1), item.rows)
            logprobs = [logprob for logprob, _ in sums]
            for found in lines:
                assert found["logprobs"] == pytest.approx(logprobs, abs=2e-5)
                if len(usage) == 1 or run.sequence:
                    assert found["executed"] == [sum(counts) for counts in zip(*(own.executed for own in usage))]
                    assert found["kv_bytes"] == sum(own.kv_bytes for own in usage) // len(usage)
                    assert found["units"] == sum(own.units for own in usage)
        if run.shares and name == "mmlu_anatomy":
            assert len(scoring.prefix_row(run, ready.items).context) > 100
    assert granularity is None or len(routes) > 1


def test_mask_scores_as_gather(base, tok):
    for granularity in ("attn_sequence", "block_token"):
        model = routed(base, granularity)
        for ready in ready_tasks(base, tok, "piqa", share=False):
            masked, gathered = (score(Scorer(model, tok, route), ready.items) for route in ("mask", "gather"))
            for a, b in zip(masked, gathered):
                assert a["logprobs"] == pytest.approx(b["logprobs"], abs=2e-5)
                assert a["executed"] == b["executed"] and a["kv_bytes"] == b["kv_bytes"]


def test_pool_all_sees_each_choice(base, tok):
    """With pool=all every choice has a route of its own, so nothing is shared."""
    model = routed(base, "attn_sequence", pool="all")
    run = Scorer(model, tok, "gather")
    item = ready_tasks(base, tok, "openbookqa", share=run.shares)[0].items[0]
    (line,) = score(run, [item])
    assert not run.caches and line["units"] == 4
    for row, found in zip(item.rows, line["logprobs"]):
        assert found == pytest.approx(direct(model, list(row.context), list(row.target), "gather"), abs=2e-5)


def short_answers(monkeypatch, n: int) -> None:
    for module in (scoring, rows_module):
        monkeypatch.setattr(module, "NEW_TOKENS", n)


@pytest.mark.parametrize("granularity", [None, "attn_token", "block_sequence"])
def test_batch_size_does_not_matter(base, tok, granularity, monkeypatch):
    short_answers(monkeypatch, 24)
    model = load_model(base / "base") if granularity is None else routed(base, granularity)
    route = "off" if granularity is None else "gather"
    for name in ("arc_challenge", "gsm8k", "mmlu_anatomy"):
        runs = [Scorer(model, tok, route, max_batch_tokens=n) for n in (1, 333, 100_000)]
        one, two, many = (score(run, ready_tasks(base, tok, name, share=run.shares)[0].items) for run in runs)
        for a, b, c in zip(one, two, many):
            for other in (b, c):
                assert (
                    a["logprobs"] == pytest.approx(other["logprobs"], abs=2e-5) and a["executed"] == other["executed"]
                )
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
    for name in ("arc_challenge", "mmlu_anatomy", "winogrande"):
        (ready,) = ready_tasks(base, tok, name, fewshot=5)
        longest = max(row.width for item in ready.items for row in item.rows)
        seen.clear()
        score(Scorer(model, tok, max_batch_tokens=budget), ready.items)
        assert max(tokens for tokens, _ in seen) <= budget and max(slots for _, slots in seen) <= max(budget, longest)
    seen.clear()
    score(Scorer(model, tok, max_batch_tokens=100), ready_tasks(base, tok, "arc_challenge", fewshot=20)[0].items)
    assert max(tokens for tokens, _ in seen) <= 100


def test_cache_bytes_are_those_of_the_cache(base):
    for granularity, kv in CASES[1:]:
        model = routed(base, granularity, kv)
        cache = KVCache(model, 2)
        tokens = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(1))
        _, gates = model.hidden(tokens, lengths=[17, 11], cache=cache, route="gather")
        counts = scoring.units_run(gates, 2)
        run = Scorer(model, None, "gather")
        assert [scoring.cache_bytes(run, n, c) for n, c in zip((17, 11), counts)] == cache.row_bytes()
        listed, lists = KVCache(model, 2), torch.tensor([[1.0, 0.0]] * len(model.routing.places))
        model.hidden(tokens, lengths=[17, 11], cache=listed, route="gather", gates=lists)
        run = Scorer(model, None, "gather", Control(model.place_weights(), lists={}))
        counts = scoring.units_run(lists, 2)
        assert [scoring.cache_bytes(run, n, c) for n, c in zip((17, 11), counts)] == listed.row_bytes()
    assert scoring.cache_bytes(Scorer(model, None), 10, []) == 2 * 10 * 4 * 2 * 8 * 4


# -----------------------------------------------------------------------------
# Generation


def test_greedy_answers_equal_generate(base, tok, monkeypatch):
    short_answers(monkeypatch, 48)
    model = routed(base, "attn_sequence")
    items = ready_tasks(base, tok, "gsm8k", fewshot=2)[0].items
    lines = score(Scorer(model, tok, "gather"), items)
    for item, line in zip(items, lines):
        prompt = list(item.rows[0].context)
        ids = generate(model, [prompt], scoring.NEW_TOKENS, stop_tokens=tok.stop_ids, route="gather")[0]
        assert line["text"] == scoring.cut_at_stop(tok.decode(ids, skip_special=True), scoring.STOPS)
        assert line["gold"] == ("4", "999")[item.index] and line["units"] == 1


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("It is 4.\n#### 1,234.", "1,234.", "1,234."),
        ("so $5 and 7 left", "[invalid]", "7"),
        ("none", "[invalid]", "[invalid]"),
        ("#### -3\n#### 8", "-3", "8"),
    ],
)
def test_answers_are_extracted_as_by_the_harness(text, strict, flexible):
    assert (
        scoring.extract(text, scoring.STRICT, 0) == strict and scoring.extract(text, scoring.FLEXIBLE, -1) == flexible
    )


def test_answers_are_compared_without_marks():
    assert scoring.normal("1,234.") == scoring.normal("Thus.\n#### $1234") == "1234"
    assert scoring.cut_at_stop("a Question: b</s>", scoring.STOPS) == "a "


# -----------------------------------------------------------------------------
# Perplexity and controls


def talk(i: int) -> list[dict]:
    return [{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": "yes " * (1 + i % 3)}]


def messages(path: Path, n: int = 5) -> Path:
    splits = ("train", "heldout")
    return write_jsonl(path, [{"messages": talk(i), "split": splits[i % 2], "domain": "ab"[i % 2]} for i in range(n)])


def prepare_texts(base, tok, path: Path, limit: int = 1024, **changes) -> ReadyTask:
    return scoring.prepare_texts(settings(base, perplexity=str(path), **changes), tok, limit)


@pytest.mark.parametrize("granularity", [None, "attn_sequence", "attn_token"])
def test_perplexity_is_the_mean_loss_of_the_answers(base, tok, tmp_path, granularity):
    model = load_model(base / "base") if granularity is None else routed(base, granularity)
    route, losses = "off" if granularity is None else "gather", []
    lines = score(Scorer(model, tok, route), prepare_texts(base, tok, messages(tmp_path / "m.jsonl")).items)
    for i in range(5):
        ids, mask = encode_chat(tok, talk(i))
        logits = model(torch.tensor([ids]), prompt_lengths=[mask.index(True)], route=route)[0][0].log_softmax(-1)
        losses += [-logits[place - 1, ids[place]].item() for place, loss in enumerate(mask) if loss]
    result = scoring.result_of(lines, ("nll",))
    assert result["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5) and result["tokens"] == len(losses)
    assert len(prepare_texts(base, tok, tmp_path / "m.jsonl", perplexity_split="heldout").items) == 2


FORMS = [
    {"messages": talk(3)},
    {"conversations": [{"from": "human", "value": "add 2"}, {"from": "gpt", "value": "four"}], "system": "Be brief."},
    {"instruction": "add", "input": "2 3", "output": "five", "history": [["add 1 1", "two"]]},
    {"prompt": "add 2 2", "response": "four"},
    {"text": "Ice melts in the sun, and the sun is hot."},
]


def test_perplexity_scores_what_tuning_learns_of_every_row_form(base, tok, tmp_path):
    """The tokens and targets of data/records.py; a row cut so far that no answer is left is counted as skipped."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{**row, "domain": str(i)} for i, row in enumerate(FORMS)])
    ready = prepare_texts(base, tok, path)
    for item, row in zip(ready.items, FORMS, strict=True):
        example, (scored,) = encode(row, "here", Form(tok, 1024)), item.rows
        assert list(scored.context) == example.tokens[: example.prompt] and item.domain == str(item.index)
        assert [len(scored.context) + place for place in scored.at] == example.targets
        assert list(scored.context + scored.target) == example.tokens[: example.targets[-1] + 1]
    with pytest.raises(ValueError, match="2 rows cannot be used.*\n.*rows.jsonl, line 2: "):
        prepare_texts(base, tok, path, limit=40)
    cut = prepare_texts(base, tok, path, limit=40, truncate=True)
    assert len(cut.items) + len(cut.skipped) == len(FORMS) and cut.skipped
    assert all(len(item.rows[0].context + item.rows[0].target) <= 40 for item in cut.items)
    assert [item.truncated for item in cut.items] == [
        len(encode(row, "here", Form(tok, 1024)).tokens) > 40 for i, row in enumerate(FORMS) if i not in cut.skipped
    ]
    assert len(prepare_texts(base, tok, path, limit=40, skip_bad=True).items) == 3


@pytest.mark.parametrize("limit", [1, 2, 7, 30, 31, 100])
def test_windows_predict_each_token_once_as_in_the_harness(limit):
    ids = list(range(100, 131))
    pairs = windows(ids, [7], limit)
    assert [token for _, target in pairs for token in target] == ids
    assert pairs[0][0] == [7] and all(1 <= len(context + target) - 1 <= limit for context, target in pairs)
    for context, target in pairs[1:]:
        at = ids.index(target[0])
        assert context == ids[at - len(context) : at]
    harness = pytest.importorskip("lm_eval.utils")
    theirs = harness.get_rolling_token_windows(ids, 7, limit, 1)
    assert pairs == [harness.make_disjoint_window(window) for window in theirs]


@pytest.fixture(scope="session")
def lambada(base, tok):
    """A folder of texts; of every second one the last word is what the dense base says next."""
    model, rng, rows = load_model(base / "base"), random.Random(3), []
    while len(rows) < 24:
        context = "".join(rng.choice("abc de") for _ in range(rng.randrange(5, 30))).strip()
        ids = tok.encode(context) if " " in context else []
        says = tok.decode([model(torch.tensor([ids]))[0][0, -1].argmax().item()]) if ids else ""
        if len(rows) % 2 or re.fullmatch(r" \w+", says):
            rows.append({"text": context + (" yes" if len(rows) % 2 else says)})
    write_jsonl(base / "lambada/lambada_openai/lambada_test.jsonl", rows)
    return base / "lambada"


@pytest.mark.parametrize("granularity", [None, "attn_sequence", "block_token"])
def test_lambada_asks_whether_greedy_decoding_says_the_last_word(base, tok, lambada, granularity):
    """acc and perplexity as lm-eval 0.4 defines them, from one plain pass over each text."""
    model = load_model(base / "base") if granularity is None else routed(base, granularity)
    route = "off" if granularity is None else "gather"
    cfg, task = settings(base, data=str(lambada), tasks=("lambada_openai",), fewshot=0), TASKS["lambada_openai"]
    run = Scorer(model, tok, route, task=task.name)
    ready = scoring.prepare_task(task, (find(lambada, task.files), None), run, cfg, 1024)
    lines = scoring.score_task(run, ready, {}, lambda records: None, runtime.Progress("x", 0), CPU)
    hits, sums = [], []
    for text, line in zip((lambada / task.files[0]).read_text().splitlines(), lines):
        before, last = json.loads(text)["text"].rsplit(" ", 1)
        context, whole = tok.encode(before), tok.encode(f"{before} {last}")
        target = whole[len(context) :]
        logits = model(torch.tensor([whole[:-1]]), prompt_lengths=[len(context)], route=route)[0][0]
        hits.append(logits[len(context) - 1 :].argmax(-1).tolist() == target)
        sums.append(direct(model, context, target, route))
        assert line["logprobs"] == pytest.approx(sums[-1:], abs=2e-5)
        assert (line["prediction"], line["gold"], line["acc"]) == (hits[-1], True, int(hits[-1]))
    result = scoring.result_of(lines, task.metrics)
    assert result["acc"] == sum(hits) / 24 and result["perplexity"] == pytest.approx(math.exp(-sum(sums) / 24))
    assert granularity is not None or result["acc"] == 0.5
    error = math.exp(-sum(sums) / 24) * mean_stderr(sums)[1]
    assert result["perplexity_stderr"] == pytest.approx(error, rel=1e-4)


def test_continuations_are_reported_and_compared(base, tmp_path, lambada):
    """acc and perplexity in the table, a paired difference in nats; probes need no file."""
    write_base(tmp_path / "other", replace(CONFIG, vocab_size=272, max_seq_len=1024, norm_eps=1e-2))
    (tmp_path / "other/tokenizer.json").write_text((base / "base/tokenizer.json").read_text())
    tasks = ("lambada_openai", "probe_arithmetic", "probe_brackets")
    cfg = settings(base, data=str(lambada), tasks=tasks, fewshot=2, limit=20, out=str(tmp_path / "a.json"))
    first = scoring.evaluate(cfg, CPU)
    runtime.write_json(cfg.out, first)
    again = scoring.evaluate(replace(cfg, out=None), CPU)
    assert [r["perplexity"] for r in again["results"].values()] == [r["perplexity"] for r in first["results"].values()]
    moved = replace(cfg, model=str(tmp_path / "other"), against=cfg.out, out=None)
    report = scoring.evaluate(moved, CPU)
    for name in tasks:
        change = math.log(report["results"][name]["perplexity"] / first["results"][name]["perplexity"])
        assert report["against"]["tasks"][name]["loss"]["difference"] == pytest.approx(change, abs=1e-6) and change
        assert (report["results"][name]["file"] == "made up") == ("probe" in name)
    shown = "\n".join(scoring.report_lines(report, dict.fromkeys(tasks, "acc")))
    assert "lambada_openai, probe_arithmetic, probe_brackets: share of targets that greedy decoding says" in shown
    other = scoring.evaluate(replace(cfg, seed=7, out=None), CPU)["items"]
    assert [other[name]["sha"] != first["items"][name]["sha"] for name in tasks[1:]] == [True, True]


@pytest.mark.parametrize("chat", [False, True])
def test_lambada_is_that_of_the_harness(base, tok, lambada, tmp_path, chat):
    """The installed lm-eval on its own definition and our model behind its API, item by item."""
    lm_eval, manage = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
    from lm_eval_adapter import RouterTuningLM

    yaml = Path(manage.__file__).parent / "lambada/lambada_openai.yaml"
    files = json.dumps({"test": str(lambada / "lambada_openai/lambada_test.jsonl")})
    (tmp_path / "local.yaml").write_text(f"include: {yaml}\ntask: local\ndataset_path: json\ndataset_name: null\n"
                                         f"dataset_kwargs:\n  data_files: {files}\n")
    write_base(tmp_path / "base", replace(CONFIG, vocab_size=272, max_seq_len=1024))
    (tmp_path / "base/tokenizer.json").write_text(json.dumps(byte_tokenizer(MERGES)))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    said = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "chat_template": template}
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(said))
    theirs = lm_eval.simple_evaluate(
        model=RouterTuningLM(model=tmp_path / "base"), tasks=["local"], num_fewshot=0, log_samples=True,
        bootstrap_iters=0, apply_chat_template=chat, task_manager=manage.TaskManager(include_path=str(tmp_path)))
    ours = scoring.evaluate(settings(tmp_path, data=str(lambada), tasks=("lambada_openai",), fewshot=0,
                                     apply_chat_template=chat, samples=str(tmp_path / "s.jsonl")), CPU)
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    for line, sample in zip(lines, theirs["samples"]["local"], strict=True):
        (value, greedy), = sample["filtered_resps"]
        assert line["logprobs"] == pytest.approx([float(value)], abs=1e-4) and line["prediction"] == greedy
    for metric in ("acc", "perplexity"):
        found = ours["results"]["lambada_openai"][metric]
        assert found == pytest.approx(theirs["results"]["local"][f"{metric},none"], rel=1e-4)


def test_rolling_perplexity_is_that_of_all_tokens_by_word_and_byte(base, tok, tmp_path):
    """One text in a .txt file, or `text` rows: sums over whole passes, words and bytes counted as in lm-eval."""
    texts = ["Ice melts in  the sun.\nSo does wax, é.", "Tin is a metal. " * 9]
    model, total = load_model(base / "base"), 0.0
    for text in texts:
        total += sum(direct(model, context, target) for context, target in windows(tok.encode(text), [tok.bos_id], 50))
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    found = scoring.evaluate(settings(base, perplexity=str(path), rolling=True, max_length=50), CPU)
    r = found["results"]["perplexity"]
    words, size = (
        sum(len(text.split()) for text in texts) + 1,
        sum(len(text.encode()) for text in texts),
    )  # "" at an end
    assert r["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4) and r["words"] == words
    assert r["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-4) and r["bytes"] == size
    assert r["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
    assert r["loss"] == pytest.approx(-total / r["tokens"], rel=1e-4)
    assert r["tokens"] == sum(len(tok.encode(text)) for text in texts)
    (tmp_path / "one.TXT").write_text(texts[1])
    (tmp_path / "two.jsonl").write_text(json.dumps({"text": texts[1]}))
    one, two = (
        scoring.evaluate(settings(base, perplexity=str(tmp_path / name), rolling=name[-1] == "l"), CPU)["items"]
        for name in ("one.TXT", "two.jsonl")
    )
    assert one == two


def many(items: list[Item], times: int) -> list[Item]:
    """The items again and again, each with a number of its own."""
    numbered = list(enumerate(items * times))
    return [replace(item, index=i, rows=[row._replace(item=i) for row in item.rows]) for i, item in numbered]


def test_controls_force_their_routes(base, tok, tmp_path):
    for granularity in ("attn_sequence", "attn_token"):
        model = routed(base, granularity)
        items = many(ready_tasks(base, tok, "piqa", share=False)[0].items, 40)

        def result(control: str, budget=None) -> dict:
            made = make_control(control, model, budget, {"greedy": ["2", "1", "3"]}, ["piqa"])
            return scoring.result_of(score(Scorer(model, tok, "gather", made), items), ("acc", "acc_norm"))

        drop = result("static:1,3")
        assert drop["capacity_per_layer"] == [0.0, 1.0, 0.0], "a list skips whole sequences, whatever the unit"
        chance = result("random:5", budget=0.4)
        assert chance["capacity"] == pytest.approx(0.4, abs=0.06) and chance["route_variance"] > 0
        assert chance == result("random:5", budget=0.4) != result("random:6", budget=0.4)
        (tmp_path / "r.json").write_text(json.dumps({"results": {"piqa": {"capacity_per_layer": [0.2, 0.9, 0.6]}}}))
        mean = result(f"mean:{tmp_path / 'r.json'}")
        assert mean["capacity_per_layer"][:2] == [0.0, 1.0] and mean["capacity"] == pytest.approx(1.7 / 3, abs=0.06)
        assert mean == result(f"mean:{tmp_path / 'r.json'}")
        assert (
            result("greedy", budget=1 / 3) == result("static:1,2") and result("greedy", budget=1.0)["capacity"] == 1.0
        )
        part = result(
            "greedy", budget=0.5
        )  # where a list ends within a place, it is skipped for that share of the items
        assert part["capacity"] == pytest.approx(0.5, abs=0.06) and part["capacity_per_layer"][1:] == [0.0, 1.0]
        order = [model.routing.names[place] for place in gate_norm_order(model)]
        assert result("gate_norm", budget=1 / 3) == result(f"static:{order[0]},{order[1]}")  # whatever the file holds
        for control in ("greedy", "similarity", "random:5", "gate_norm", "smallest_gate"):
            with pytest.raises(ValueError, match="--control"):
                result(control)
    with pytest.raises(ValueError, match="ranks attentions .* mlp_token; expected attn_sequence or attn_token"):
        make_control("gate_norm", routed(base, "mlp_token"), 0.5, {}, ["piqa"])
    with pytest.raises(ValueError, match="smallest_gate skips pairs .* attn_token; expected expert_token"):
        make_control("smallest_gate", model, 0.5, {}, ["piqa"])


def test_controls_of_both_count_compute(base, tok, tmp_path):
    """An MLP counts more than an attention: orders, random routes and mean routes keep to the budget in what places
    count, and keys and values go by attentions alone."""
    model = routed(base, "both_sequence")
    names, weights = model.routing.names, model.place_weights().tolist()
    assert names == ("1.attn", "2.attn", "2.mlp", "3.attn") and weights[2] > weights[0] == weights[1] == weights[3]
    items = many(ready_tasks(base, tok, "piqa", share=False)[0].items, 60)

    def result(control: str, budget=None) -> dict:
        made = make_control(control, model, budget, {"greedy": ["2.mlp", "1.attn", "2.attn", "3.attn"]}, ["piqa"])
        return scoring.result_of(score(Scorer(model, tok, "gather", made), items), ("acc", "acc_norm"), weights)

    drop, dense = result("static:2.mlp"), result("greedy", 1.0)
    assert drop["capacity"] == pytest.approx(1 - weights[2]) and drop["kv_bytes"] == dense["kv_bytes"]
    assert drop["capacity_per_layer"] == [1.0, 1.0, 0.0, 1.0] and result("greedy", 1 - weights[2]) == drop
    assert result("static:1.attn")["kv_bytes"] < dense["kv_bytes"]
    assert result("random:5", 0.6)["capacity"] == pytest.approx(0.6, abs=0.06)
    (tmp_path / "r.json").write_text(json.dumps({"results": {"piqa": {"capacity_per_layer": [0.9, 1.0, 0.1, 0.9]}}}))
    mean = result(f"mean:{tmp_path / 'r.json'}")
    wanted = sum(weight * share for weight, share in zip(weights, [0.9, 1.0, 0.1, 0.9]))
    assert mean["capacity"] == pytest.approx(wanted, abs=0.06)
    assert sum(0 < share < 1 for share in mean["capacity_per_layer"]) <= 1
    with pytest.raises(ValueError, match="expected numbers of routed layers, which are 1.attn"):
        result("static:2")


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_calibration_holds_the_budget_over_the_tasks(base, tok, granularity):
    """Cuts move together, and a place that everyone skips stays so; capacity is that of all tasks' contexts, of a
    single task it may differ.
    """
    model = routed(base, granularity)
    generator = random.Random(0)
    kinds = (range(32, 70), range(70, 120))
    tasks = [ReadyTask(Task(f"t{kind}", None, (), (), 0, ("acc",), ""), "", items=[
        made_item(60 * kind + i, generator.choices(kinds[kind], k=12), [[65]]) for i in range(60)]) for kind in (0, 1)]
    run = Scorer(model, tok, "gather")
    for cuts, budget in (
        ([0.0, 0.3, -0.2], 0.4),
        ([0.0, 0.3, -0.2], 0.75),
        ([0.0, math.inf, -0.2], 0.5),
        ([0.0, 0.3, -0.2], 1.0),
    ):
        set_cuts(model, cuts)
        with torch.no_grad():
            scoring.calibrate_cuts(run, tasks, SimpleNamespace(calibrate=60, budget=budget), CPU)
        moved = [router.cut.item() for router in model.routers()]
        found = scoring.result_of(score(run, [item for own in tasks for item in own.items]), ("acc",))
        if budget == 1.0:
            assert moved == pytest.approx(cuts)
            continue
        assert found["capacity"] == pytest.approx(budget, abs=0.03)
        rises = [cut - old for cut, old in zip(moved, cuts) if not math.isinf(old)]
        assert rises == pytest.approx([rises[0]] * len(rises), abs=1e-5)
        assert not math.isinf(cuts[1]) or found["capacity_per_layer"][1] < 0.1  # first tokens alone


# -----------------------------------------------------------------------------
# Results


def test_routes_are_told_apart_within_and_between_tasks():
    found = scoring.routes_of([[1.0, 0.5, 0.0], [1.0, 0.5, 1.0]], [0.0, 0.1])
    assert found == {
        "variance_within_tasks": 0.05,
        "variance_between_tasks": pytest.approx(0.25 / 3),
        "constant_task_layer_pairs": pytest.approx(4 / 6),
    }


def test_standard_errors_and_pooling():
    assert mean_stderr([1, 0, 1, 1]) == (0.75, pytest.approx(0.25)) and mean_stderr([1]) == (1.0, None)
    blank = {"executed": [], "units": 0, "kv_bytes": 0, "truncated": False}
    records = {"a": [{"acc": v, **blank} for v in (1, 0, 1, 1)], "b": [{"acc": v, **blank} for v in (0, 0, 1)]}
    results = {name: scoring.result_of(part, ("acc",)) | {"shots": 5, "seconds": 1.0} for name, part in records.items()}
    group = scoring.group_result(["a", "b"], results, records)
    assert (
        group["acc"] == pytest.approx(4 / 7)
        and group["acc_subjects"] == pytest.approx((3 / 4 + 1 / 3) / 2)
        and group["n"] == 7
    )
    assert group["acc_stderr"] == pytest.approx(math.sqrt((3 * 0.25**2 * 4 + 2 * (1 / 3) ** 2 * 3) / 5 / 7))


@pytest.mark.parametrize("granularity, way", [("attn_token", "--hold_budget or "), ("attn_sequence", "")])
def test_a_missed_budget_is_told(base, tok, capsys, granularity, way):
    run = Scorer(routed(base, granularity), tok, "gather")
    found = {"piqa": {"capacity": 0.4}, "boolq": {"capacity": 0.52}, "perplexity_dense": {"capacity": 1.0}}
    scoring.say_missed(settings(base, budget=0.5), run, found)
    said = capsys.readouterr().err
    assert "--budget=0.5" in said and "(piqa 0.400)" in said and said.endswith(f"to hold it: {way}--calibrate=N\n")
    for held in ({"budget_per": "sequence"}, {"control": "random:1"}, {"calibrate": 2}):
        scoring.say_missed(settings(base, budget=0.5, **held), run, found)
    assert not capsys.readouterr().err


def test_paired_comparison_counts_flips():
    ours = {
        "piqa": {"sha": "x", "acc": "1101", "gold_logprob": [-1.0, -2.0, -3.0, -4.0]},
        "perplexity": {"sha": "y", "nll": [2.0, 3.0], "tokens": [2, 4]},
    }
    theirs = {
        "piqa": {"sha": "x", "acc": "0111", "gold_logprob": [-2.0, -2.0, -3.0, -5.0]},
        "perplexity": {"sha": "y", "nll": [1.0, 2.0], "tokens": [2, 4]},
    }
    found = scoring.compare_runs(ours, theirs)
    error = pytest.approx(math.sqrt(2 / 3 / 4))
    assert found["piqa"]["acc"] == {"difference": 0.0, "stderr": error, "gained": 1, "lost": 1, "flips": 2, "n": 4}
    error = pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))
    assert found["piqa"]["gold_logprob"] == {"difference": 0.5, "stderr": error, "n": 4}
    assert found["perplexity"]["loss"]["difference"] == pytest.approx(2 / 6)


def test_own_task_by_a_flag(base, tmp_path):
    rows = [
        {"question": f"Is {n} odd?", "choices": ["the yes", "no"], "answer": 0 if n % 2 else "no"} for n in range(6)
    ]
    write_jsonl(tmp_path / "odd.jsonl", rows)
    report = scoring.evaluate(
        settings(base, custom=(str(tmp_path / "odd.jsonl"),), fewshot=2, samples=str(tmp_path / "s.jsonl")), CPU
    )
    assert report["results"]["odd"]["n"] == 6 and report["results"]["odd"]["shots"] == 2
    assert [json.loads(line)["gold"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == [1, 0] * 3


def test_a_new_task_is_one_row(base, data, monkeypatch):
    """A row of TASKS, with a reader that is there already: command line, shots, metrics and fetch hint follow."""
    row = Task(
        "jars", piqa, ("jars/test.jsonl",), ("piqa/train.jsonl",), 1, ("acc_norm", "acc"), "https://jars.example"
    )
    monkeypatch.setitem(TASKS, row.name, row)
    jars = [{"goal": f"Open jar {n}.", "sol1": "Turn the lid.", "sol2": "Turn the moon.", "label": 0} for n in range(4)]
    write_jsonl(data / "piqa/train.jsonl", jars)
    own = {"data": str(data), "tasks": ("jars",)}
    with pytest.raises(FileNotFoundError, match="jars: jars/test.jsonl  .https://jars.example"):
        scoring.evaluate(settings(base, **own), CPU)
    write_jsonl(data / "jars/test.jsonl", jars[:3])
    result = scoring.evaluate(settings(base, **own), CPU)["results"]["jars"]
    assert result["n"] == 3 and result["shots"] == 1 and 0 <= result["acc_norm"] <= 1


# -----------------------------------------------------------------------------
# Runs


def test_killed_run_goes_on_bit_for_bit(base, tmp_path, monkeypatch):
    """Whole lines are kept, a torn one is dropped, and only batches that lack an item are scored again."""
    cfg = settings(
        base, tasks=("arc_challenge", "winogrande"), fewshot=3, samples=str(tmp_path / "s.jsonl"), max_batch_tokens=2500
    )
    whole = scoring.evaluate(cfg, CPU)
    data, calls = (tmp_path / "s.jsonl").read_bytes(), []
    plain = scoring.score_batch
    monkeypatch.setattr(
        scoring, "score_batch", lambda run, batch, prefix: calls.append(len(batch)) or plain(run, batch, prefix)
    )
    for kept in (0, 1, 4, 6):
        lines, calls[:] = data.splitlines(True), []
        (tmp_path / "s.jsonl").write_bytes(b"".join(lines[:kept]) + (lines[kept][:20] if kept < 6 else b""))
        again = scoring.evaluate(cfg, CPU)
        assert (
            (tmp_path / "s.jsonl").read_bytes() == data
            and again["items"] == whole["items"]
            and 6 - kept <= sum(calls) <= 6
        )
    assert not calls and sum(r["resumed"] for r in again["results"].values()) == 6
    with pytest.raises(ValueError, match="another model"):
        scoring.evaluate(replace(cfg, fewshot=2), CPU)
    (tmp_path / "s.jsonl").write_bytes(b"{}\n" + data)
    with pytest.raises(ValueError, match="line 1 is not a sample line"):
        scoring.evaluate(cfg, CPU)


def command(base, *extra: str, ranks: int = 0) -> subprocess.CompletedProcess:
    start = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks
        else [sys.executable]
    )
    given = [
        str(ROOT / "eval.py"),
        f"--model={base / 'base'}",
        f"--data={base / 'data'}",
        "--device=cpu",
        "--dtype=float32",
        "--threads=1",
    ]
    return subprocess.run([*start, *given, *extra], capture_output=True, text=True, timeout=120)


def test_two_ranks_are_one_process_bit_for_bit(base, tmp_path):
    routers = tmp_path / "routers.safetensors"
    model = routed(base, "attn_token")
    thresholds = [torch.sigmoid(router.cut).item() for router in model.routers()]
    save_routers(routers, model, RouterMeta(model.routing, thresholds, model.fingerprint))
    reports = []
    for ranks in (0, 2):
        out, samples = tmp_path / f"{ranks}.json", tmp_path / f"{ranks}.jsonl"
        done = command(
            base,
            "--tasks=arc_challenge,winogrande,mmlu_stem,gsm8k",
            "--fewshot=2",
            f"--routers={routers}",
            f"--perplexity={messages(tmp_path / 'm.jsonl')}",
            "--max_batch_tokens=4000",
            f"--out={out}",
            f"--samples={samples}",
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr
        assert "| mmlu_stem | 2 | 57 |" in done.stdout and "perplexity" in done.stdout
        reports.append(json.loads(out.read_text()))
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes() and reports[0][
        "items"
    ] == reports[1]["items"]
    alone, together = (
        {name: {**result, "seconds": 0} for name, result in report["results"].items()} for report in reports
    )
    assert alone == together
    for name in ("perplexity", "perplexity_dense"):  # domains are a partition of the items
        parts, whole = [reports[1]["domains"][f"{name}/{domain}"] for domain in "ab"], reports[1]["results"][name]
        assert (
            sum(part["loss"] * part["tokens"] for part in parts) / whole["tokens"] == pytest.approx(whole["loss"])
            and sum(p["n"] for p in parts) == whole["n"]
        )
    assert reports[0]["routes"] == reports[1]["routes"] and "routes: variance within tasks" in done.stdout
    assert (
        0 < reports[0]["results"]["arc_challenge"]["capacity"] < 1
        and reports[0]["results"]["mmlu_stem"]["subjects"] == 19
    )


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("multiturn", [True, False])
def test_chat_form_puts_the_prompt_into_the_template_and_scores_the_bare_choice(base, tmp_path, multiturn):
    """The context is the conversation with add_generation_prompt, the choice follows without a space, as in lm-eval."""
    write_base(tmp_path / "base", replace(CONFIG, vocab_size=272, max_seq_len=1024))
    (tmp_path / "base/tokenizer.json").write_text(json.dumps(byte_tokenizer(MERGES)))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "chat_template": TEMPLATE}
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(config))
    tok, model = load_tokenizer(tmp_path / "base"), load_model(tmp_path / "base")
    cfg = settings(
        base,
        model=str(tmp_path / "base"),
        tasks=("piqa", "winogrande", "gsm8k"),
        fewshot=1,
        limit=2,
        apply_chat_template=True,
        system_instruction="Be brief.",
        fewshot_as_multiturn=multiturn,
        samples=str(tmp_path / "s.jsonl"),
    )
    write_jsonl(base / "data/piqa/train.jsonl", [{"goal": "Sit.", "sol1": "On it.", "sol2": "Off.", "label": 0}] * 3)
    _, ready = scoring.prepare_all(cfg, CPU)
    assert scoring.evaluate(cfg, CPU)["results"]["piqa"]["shots"] == 1
    lines = {(line["task"], line["index"]): line for line in map(json.loads, open(tmp_path / "s.jsonl"))}
    for own in ready:
        questions = examples(base, own.name)
        pool = read_questions(find(base / "data", own.task.pool), own.task)
        shots = draw_shots(own.task, questions, pool, 1, cfg.fewshot_by, cfg.seed)
        for item, question, drawn in zip(own.items, questions, shots):
            texts = [tok.decode(list(row.context + row.target)) for row in item.rows]
            talks = [chat_prompt(own.task, drawn, context, "Be brief.", multiturn) for context in question.contexts]
            wanted = [tok.decode(encode_chat(tok, talk, generate=True)[0]) for talk in talks]
            assert all(text.count("Be brief.") == 1 for text in texts)
            if own.task.generates:
                assert texts == wanted
                continue
            assert texts == [text + choice for text, choice in zip(wanted, question.choices)]
            context = tok.encode(wanted[0].rstrip(), special=True)
            target = tok.encode(texts[0], special=True)[len(context) :]
            found = lines[own.name, item.index]["logprobs"][0]
            assert found == pytest.approx(direct(model, context, target), abs=1e-4)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_chat_context_is_the_rendered_text_for_sentencepiece_too(tmp_path, legacy):
    """Some of these models put a space in front of what follows a special token; it must not get into the text."""
    sentencepiece, jinja2 = pytest.importorskip("sentencepiece"), pytest.importorskip("jinja2")
    words = "name a prime seven is and the moon of tin owl melts".split()
    rng, prefix = random.Random(0), tmp_path / "tokenizer"
    lines = [" ".join(rng.choices(words, k=8)).capitalize() + "." for _ in range(200)]
    (tmp_path / "text").write_text("\n".join(lines))
    own = {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(prefix), vocab_size=360, **own
    )
    template = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    template += "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"add_bos_token": True, "legacy": legacy, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = load_tokenizer(tmp_path)
    if not hasattr(tok, "templates"):
        pytest.skip("this tokenizer does not render templates")
    turns = [("user", "Name a prime."), ("assistant", "Seven."), ("user", " And  the next?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    values = {"messages": messages, "bos_token": "<s>", "eos_token": "</s>"}
    assert rows_module.chat_context(tok, messages, None) == jinja2.Template(template).render(**values)


def test_truncated_items_are_told(base, tmp_path, capsys):
    report = scoring.evaluate(settings(base, tasks=("arc_challenge",), fewshot=5, max_length=100), CPU)
    assert report["results"]["arc_challenge"]["truncated"] == 3
    assert (
        "arc_challenge: 3 of 3 items are longer than 100 tokens and lost their beginning (0, 1, 2)"
        in capsys.readouterr().err
    )


def test_outputs_that_are_not_finite_stop_with_the_remedy(base, tmp_path):
    """float16 that overflows once gave an accuracy of NaN scores, exit status 0 and NaN in JSON."""
    (tmp_path / "base").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((base / "base" / name).read_bytes())
    weights = load_file(base / "base/model.safetensors")
    large = weights["layers.1.feed_forward.w2.weight"]
    large *= 6e4 / large.abs().max()  # float16 holds it, but not its products
    save_file(weights, tmp_path / "base/model.safetensors")
    own = {"model": str(tmp_path / "base"), "dtype": "float16", "samples": str(tmp_path / "s.jsonl")}
    half = replace(CPU, dtype=torch.float16)
    talks = str(messages(tmp_path / "m.jsonl"))
    for what in ({"tasks": ("piqa",)}, {"tasks": ("gsm8k",), "fewshot": 0}, {"perplexity": talks}):
        with pytest.raises(ValueError, match="not finite .*--dtype=float32"):
            scoring.evaluate(settings(base, **own, **what), half)
    out = tmp_path / "o.json"
    done = command(base, "--tasks=piqa", f"--model={tmp_path / 'base'}", "--dtype=float16", f"--out={out}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not finite" in done.stderr
    assert done.stdout == "" and not out.exists() and not (tmp_path / "s.jsonl").exists()
    assert command(base, "--tasks=piqa", f"--model={tmp_path / 'base'}", f"--out={out}").returncode == 0


# -----------------------------------------------------------------------------
# Errors


def damage(data: Path, path: str, text: str, line: int = 2) -> None:
    lines = (data / path).read_text().split("\n")
    lines[line - 1] = text
    (data / path).write_text("\n".join(lines))


ERRORS = {
    "not json": ("arc_easy", "arc/ARC-Easy/ARC-Easy-Test.jsonl", "{broken", "line 2 is not JSON"),
    "missing field": ("piqa", "piqa/valid.jsonl", '{"goal": "x", "sol1": "y"}', "line 2: there is no field 'sol2'"),
    "wrong label": (
        "winogrande",
        "winogrande/dev.jsonl",
        '{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "3"}',
        "line 2: the label is '3', expected one of 1, 2",
    ),
    "no blank": (
        "winogrande",
        "winogrande/dev.jsonl",
        '{"sentence": "a b", "option1": "x", "option2": "y", "answer": "1"}',
        "line 2: the sentence has no blank",
    ),
    "label out of place": (
        "arc_easy",
        "arc/ARC-Easy/ARC-Easy-Test.jsonl",
        json.dumps(stem("q", ["a", "b"], "AB", "C")),
        "line 2: the label is 'C', expected one of A, B",
    ),
    "empty choice": (
        "openbookqa",
        "openbookqa/Main/test.jsonl",
        json.dumps(stem("q", ["a", " "], "AB", "A")),
        "line 2: a choice is ' '",
    ),
    "no choices": (
        "openbookqa",
        "openbookqa/Main/test.jsonl",
        json.dumps(stem("q", ["a"], "A", "A")),
        "line 2: the row has 1 choices",
    ),
    "not text": ("piqa", "piqa/valid.jsonl", '{"goal": "x", "sol1": "y", "sol2": 7}', "line 2: a choice is 7"),
    "csv fields": ("mmlu_anatomy", "mmlu/data/test/anatomy_test.csv", 'then",one,two', "line 2: the row has 3 fields"),
    "tsv fields": ("rte", "rte/glue/RTE/dev.tsv", "0\ta\tb", "line 2 has 3 fields, expected index, sentence1"),
    "bool label": (
        "boolq",
        "boolq/dev.jsonl",
        '{"question": "q", "passage": "p", "label": "maybe"}',
        "line 2: the label is 'maybe'",
    ),
    "labels file": ("piqa", "piqa/valid-labels.lst", "1\n1", "holds 3 labels, valid.jsonl 2 rows"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_rows_are_named_by_file_and_line(base, data, tmp_path, case):
    name, path, text, message = ERRORS[case]
    damage(data, path, text)
    with pytest.raises(ValueError) as error:
        scoring.evaluate(
            settings(base, data=str(data), tasks=(name,), samples=str(tmp_path / "s.jsonl"), fewshot=0), CPU
        )
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
    refused("give --routers and --budget", budget_per="sequence")
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
    message = (
        r"piqa: piqa/valid.jsonl  \(https://yonatanbisk.com/piqa\)\n  mmlu_anatomy: .*\n.*fetch.py --tasks=piqa,mmlu"
    )
    refused(message, FileNotFoundError, tasks=("piqa", "mmlu_anatomy"))
    write_jsonl(tmp_path / "own.jsonl", [{"question": "q", "choices": "ab", "answer": 0}])
    refused("own.jsonl, line 1: choices is 'ab'", tasks=(), custom=(str(tmp_path / "own.jsonl"),))
    write_jsonl(
        tmp_path / "long.jsonl",
        [{"messages": [{"role": "user", "content": "x" * 2000}, {"role": "assistant", "content": "y"}]}],
    )
    refused(
        "long.jsonl, line 1: 2,0.. tokens, expected at most 1,024", tasks=(), perplexity=str(tmp_path / "long.jsonl")
    )
    write_jsonl(tmp_path / "odd.jsonl", [{"words": "y"}])
    odd = {"tasks": (), "perplexity": str(tmp_path / "odd.jsonl")}
    refused("odd.jsonl, line 1 has the keys .'words'.; expected messages", **odd)
    refused("odd.jsonl, line 1: there is no field 'text', which --rolling scores", rolling=True, **odd)
    refused("no row whose split is 'x'", perplexity_split="x", **odd)
    refused("--rolling says how --perplexity is read, and there is none", rolling=True)
    refused("--chat=chatml names a chat form, and prompts are plain", chat="chatml")
    refused("say.* how shots stand in a chat", fewshot_as_multiturn=False)
    refused("this model has no chat template", tasks=("arc_easy",), apply_chat_template=True)
    write_jsonl(tmp_path / "a/own.jsonl", [])
    refused("would both be the task 'own'", custom=(str(tmp_path / "own.jsonl"), str(tmp_path / "a/own.jsonl")))
    refused("--custom=.*none.csv was not found", FileNotFoundError, custom=(str(tmp_path / "none.csv"),))


def test_user_errors_end_in_one_line_and_status_2(base):
    done = command(base, "--tasks=nonsense")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nearest" in done.stderr and done.stdout == ""
    with pytest.raises(ValueError, match="nearest one is --tasks"):
        runtime.cli(EvalConfig, ["--model=x", "--task=piqa"])
