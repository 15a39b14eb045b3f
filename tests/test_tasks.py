"""Tasks: published rows, custom files, shots, prompts, on made-up rows.  Run: python -m pytest tests/test_tasks.py"""

import csv
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import tasks
from data.tasks import TASKS, Question, ask, draw_shots, find, read_questions, tasks_named
from tiny import write_jsonl


def stem(question: str, texts: list[str], labels: str, key: str) -> dict:
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels)]
    return {"id": "x", "question": {"stem": question, "choices": choices}, "answerKey": key}


def write_data(data: Path) -> None:
    """A few rows of every data set in its native format, with the traps of the published files."""
    tin = {"question": "is tin a metal", "title": "Tin", "answer": True, "passage": "Tin is a metal. -- It melts."}
    owl = {"question": "do owls bark", "title": "Owl", "answer": False, "passage": "Owls hoot."}
    write_jsonl(data / "boolq/dev.jsonl", [tin, owl])
    odd = [{"question": f"is {n} odd", "title": "", "answer": n % 2 == 0, "passage": "-"} for n in range(6)]
    write_jsonl(data / "boolq/train.jsonl", odd)
    (data / "rte/glue/RTE").mkdir(parents=True)
    for split in ("dev", "train"):
        rows = ["index\tsentence1\tsentence2\tlabel", '0\tA "lone quote is here.\tA quote is here.\tentailment']
        rows.append("1\tIt rained.\tIt snowed.\tnot_entailment")
        (data / f"rte/glue/RTE/{split}.tsv").write_text("\n".join(rows) + "\n")
    ice = stem("Ice is made of", ["stone", "water", "iron", "wool"], "ABCD", "B")
    write_jsonl(
        data / "openbookqa/Main/test.jsonl", [ice, stem("Rain falls", ["up", "down", "in", "out"], "ABCD", "B")]
    )
    jar = {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Turn the moon."}
    write_jsonl(data / "piqa/valid.jsonl", [jar, {"goal": "Dry a cup.", "sol1": "Wet it.", "sol2": "Wipe it."}])
    (data / "piqa/valid-labels.lst").write_text("0\n1\n")
    dog = {"sentence": "The cat chased the dog as the _ was quick.", "option1": "cat", "option2": "dog", "answer": "1"}
    bo = {"sentence": "_ won since Bo slept.", "option1": "Bo", "option2": "Al", "answer": "2"}
    ann = {"sentence": "Ann met Eve and _ smiled.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    write_jsonl(data / "winogrande/dev.jsonl", [dog, bo, ann])
    pot = {"option1": "pot", "option2": "pan", "answer": "1"}
    small = [{"sentence": f"Pot {n} met pan {n}, the _ broke.", **pot} for n in range(7)]
    write_jsonl(data / "winogrande/train_xs.jsonl", small[:2])
    write_jsonl(data / "winogrande/train_s.jsonl", small)
    two = {"question": "Two and two?", "answer": "It is <<2+2=4>>4.\n#### 4"}
    write_jsonl(data / "gsm8k/test.jsonl", [two, {"question": "A thousand less one?", "answer": "So.\n#### 999"}])
    counts = [{"question": f"What is {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(7)]
    write_jsonl(data / "gsm8k/train.jsonl", counts)
    said = [{"text": "Ann gave Bo the key,\nand Bo took the key."}, {"text": "It rained  and the street was wet"}]
    write_jsonl(data / "lambada_openai/lambada_test.jsonl", [*said, *({"text": f"One and {n}"} for n in range(5))])
    wiki = {
        "activity_label": "Cooking",
        "ctx_a": "[header] How to boil [title] Take a pot.",
        "ctx_b": "",
        "label": 2,
        "endings": ["Fill it.", "Sing [step] to it.", "Heat it [substeps] well.", "Drop it."],
    }
    boat = {
        "activity_label": "Rowing",
        "ctx_a": "A man sits in a boat.",
        "ctx_b": "he",
        "label": 0,
        "endings": ["rows.", "melts.", "barks.", "folds."],
    }
    write_jsonl(data / "hellaswag/hellaswag_val.jsonl", [wiki, boat])
    boats = [{**boat, "activity_label": f"Rowing {n}"} for n in range(5)]
    write_jsonl(data / "hellaswag/hellaswag_train.jsonl", boats)
    hot = stem("Which is hot?", ["ice", "fire", "snow"], "123", "2")
    sinks = stem("Which sinks?", ["lead", "cork", "foam", "wood"], "ABCD", "A")
    flies = stem("Which flies?", ["a hen", "a bee", "a log", "a car", "a pot"], "ABCDE", "B")
    which = [stem(f"Which is {n}?", ["one", "two"], "AB", "A") for n in range(30)]
    for kind in ("ARC-Challenge", "ARC-Easy"):
        write_jsonl(data / f"arc/{kind}/{kind}-Test.jsonl", [hot, sinks, flies])
        write_jsonl(data / f"arc/{kind}/{kind}-Train.jsonl", which)
    for subject in tasks.SUBJECTS["stem"].split():
        for split, n in (("dev", 5), ("test", 3)):
            path = data / f"mmlu/data/{split}/{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            begin = f'"Take {subject}, then\nadd {split} '
            rows = [f'{begin}{i} ",one,"two, three",the end,{i},{"ABCD"[i % 4]}\n' for i in range(n)]
            path.write_text("".join(rows))


@pytest.fixture
def data(tmp_path):
    write_data(tmp_path / "data")
    return tmp_path / "data"


def questions(data: Path, name: str) -> list[Question]:
    return read_questions(find(data, TASKS[name].files), TASKS[name])


# -----------------------------------------------------------------------------
# Published rows


PROMPTS = {
    "boolq": ("Tin -- Tin is a metal. -- It melts.\nQuestion: is tin a metal?\nAnswer:", ("no", "yes"), 1),
    "rte": ('A "lone quote is here.\nQuestion: A quote is here. True or False?\nAnswer:', ("True", "False"), 0),
    "openbookqa": ("Ice is made of", ("stone", "water", "iron", "wool"), 1),
    "piqa": ("Question: Open a jar.\nAnswer:", ("Turn the lid.", "Turn the moon."), 0),
    "gsm8k": ("Question: Two and two?\nAnswer:", ("It is <<2+2=4>>4.\n#### 4",), 0),
    "hellaswag": ("Cooking: How to boil. Take a pot.", ("Fill it.", "Sing to it.", "Heat it well.", "Drop it."), 2),
    "lambada_openai": ("Ann gave Bo the key,\nand Bo took the", (" key.",), 0),
    "arc_challenge": ("Question: Which is hot?\nAnswer:", ("ice", "fire", "snow"), 1),
    "mmlu_anatomy": (
        "Take anatomy, then\nadd test 0\nA. one\nB. two, three\nC. the end\nD. 0\nAnswer:",
        tuple("ABCD"),
        0,
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_native_rows_become_the_harness_prompts(data, name):
    context, choices, gold = PROMPTS[name]
    assert questions(data, name)[0] == ask(context, choices, gold)


def test_partial_scoring_puts_each_option_into_the_context(data):
    first, second, _ = questions(data, "winogrande")
    assert first.contexts == ("The cat chased the dog as the cat", "The cat chased the dog as the dog")
    assert first.choices == ("was quick.",) * 2 and first.gold == 0
    assert second.contexts == ("Bo", "Al") and second.gold == 1
    assert first.solved() == "The cat chased the dog as the cat was quick.\n\n"


def test_superglue_files_serve_as_well(data):
    (data / "boolq/dev.jsonl").unlink()
    (data / "rte/glue/RTE/dev.tsv").unlink()
    row = {"question": "is tin a metal", "passage": "Tin -- Tin is a metal. -- It melts.", "idx": 0, "label": "true"}
    write_jsonl(data / "boolq/superglue/val.jsonl", [row])
    row = {"premise": 'A "lone quote is here.', "hypothesis": "A quote is here.", "label": "entailment", "idx": 0}
    write_jsonl(data / "rte/superglue/val.jsonl", [row])
    for name in ("boolq", "rte"):
        assert questions(data, name)[0] == ask(*PROMPTS[name])


def test_largest_winogrande_training_file_is_taken(data):
    assert find(data, TASKS["winogrande"].pool).name == "train_s.jsonl"


@pytest.mark.parametrize("name", [name for name in PROMPTS if not name.startswith("mmlu")] + ["winogrande"])
@pytest.mark.parametrize("value", [None, 7, ["x"], {"a": 1}])
def test_what_is_no_text_is_refused_by_name_and_never_put_into_a_prompt(data, name, value):
    """A null question was once scored as the word None."""
    path = find(data, TASKS[name].files)
    if path.suffix == ".tsv":
        pytest.skip("all fields of a tsv file are texts")
    row = json.loads(path.read_text().splitlines()[0])
    (path.parent / "valid-labels.lst").unlink(missing_ok=True)
    row |= {"label": 0} if name == "piqa" else {}
    whole = TASKS[name].read(row)
    for key in [key for key in row if isinstance(row[key], str) and key not in ("answerKey", "id")]:
        try:
            found = tasks.checked(TASKS[name], TASKS[name].read({**row, key: value}))
        except (ValueError, TypeError) as error:
            assert key in str(error) or "label" in str(error) or "choice" in str(error)
        else:
            assert found == whole, f"{key} changed the prompt"


@given(st.integers(0, 10**9))
def test_probes_ask_what_they_ask_for_a_seed_and_their_targets_are_right(seed):
    asked = {name: read_questions(None, TASKS[name], seed=seed) for name in ("probe_arithmetic", "probe_brackets")}
    for name, found in asked.items():
        assert found == read_questions(None, TASKS[name], seed=seed) != read_questions(None, TASKS[name], seed=seed + 1)
        assert len({question.contexts for question in found}) == len(found) == tasks.PROBED
        assert all(tasks.checked(TASKS[name], question) for question in found)
    for question in asked["probe_arithmetic"]:
        value = int(question.choices[0].removesuffix("."))
        assert eval(question.contexts[0].removesuffix("=")) == value >= 0
    for question in asked["probe_brackets"]:
        (target,) = question.choices
        whole = (question.contexts[0] + target).replace(" ", "")
        assert target.startswith(" ") and whole.endswith(".") and target != " ."
        for _ in whole:
            for two in ("()", "[]", "{}", "<>"):
                whole = whole.replace(two, "")
        assert whole == "."


def test_probes_are_the_same_on_every_machine():
    """What seed 1234 asks first: a change here would part results from those that were published."""
    first = {name: read_questions(None, TASKS[name], seed=1234)[:3] for name in ("probe_arithmetic", "probe_brackets")}
    assert [q.contexts[0] + q.choices[0] for part in first.values() for q in part] == [
        "32 + 21 = 53.", "7 * 0 = 0.", "5 * 2 = 10.", "{ < > } .", "{ } ( < > ) .", "{ { { } [ { [ ] ( ) } ] } } ."
    ]


# -----------------------------------------------------------------------------
# Custom files


ROWS = [{"question": f"Is {n} odd?", "choices": ["the yes", "no", "it, perhaps"], "answer": n % 3} for n in range(6)]


def written(folder: Path, name: str, rows: list[dict] = ROWS) -> Path:
    """The rows in the form that the name asks for."""
    path = folder / name
    if ".json" in name.lower():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        text = json.dumps(rows, indent=1) if "list" in name else lines
        path.write_text(text, encoding="utf-8-sig" if "bom" in name else "utf-8")
        return path
    delimiter, n = "\t" if name.endswith("tsv") else ",", len(rows[0]["choices"])
    labels = [f"choice{i + 1}" for i in range(n)] if "choice" in name else list("ABCDEFGH"[:n])
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["question", "choices", "answer"] if "lists" in name else ["question", *labels, "answer"])
        for i, row in enumerate(rows):
            gold = row["answer"]
            answer = gold if "lists" in name else (gold, row["choices"][gold], labels[gold])[i % 3]
            choices = [json.dumps(row["choices"])] if "lists" in name else row["choices"]
            writer.writerow([row["question"], *choices, answer])
    return path


@pytest.mark.parametrize(
    "name",
    [
        "x.jsonl",
        "x.json",
        "list.json",
        "bom.jsonl",
        "x.JSONL",
        "list.jsonl",
        "x.csv",
        "x.CSV",
        "choice.csv",
        "x.tsv",
        "lists.csv",
    ],
)
def test_custom_files_of_any_form_hold_the_same_questions(tmp_path, name):
    path = written(tmp_path, name)
    (task,) = tasks_named([], [str(path)])
    expected = [ask(f"Question: {row['question']}\nAnswer:", row["choices"], row["answer"]) for row in ROWS]
    assert read_questions(path, task) == expected and task.name == name.split(".")[0]


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=2, max_size=5, unique=True),
    st.integers(0, 4),
    st.sampled_from(["number", "text", "column"]),
)
def test_an_answer_in_a_table_is_the_choice_it_names_or_refused(choices, gold, kind):
    """Number, text or column: never another choice in silence."""
    choices, gold = [choice.strip() or "x" for choice in choices], gold % len(choices)
    row = {"question": "q"} | dict(zip("ABCDE", choices))
    row["answer"] = {"number": str(gold), "text": choices[gold], "column": "ABCDE"[gold]}[kind]
    try:
        found = tasks.table_row(row)
    except ValueError as error:
        assert "names" in str(error)
    else:
        assert found.choices == tuple(choices) and found.gold == gold


CUSTOM_ERRORS = {
    "null": ("a.jsonl", '{"question": null, "choices": ["a", "b"], "answer": 0}', "line 1: question is None"),
    "empty": ("a.jsonl", '{"question": " ", "choices": ["a", "b"], "answer": 0}', "line 1: question is ' '"),
    "choices": ("a.jsonl", '{"question": "q", "choices": "ab", "answer": 0}', "line 1: choices is 'ab'"),
    "choice": ("a.jsonl", '{"question": "q", "choices": ["a", null], "answer": 0}', "line 1: a choice is None"),
    "one choice": ("a.jsonl", '{"question": "q", "choices": ["a"], "answer": 0}', "line 1: the row has 1 choices"),
    "answer": ("a.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": 2}', "line 1: the label is 2"),
    "field": ("a.json", '[{"question": "q", "choices": ["a", "b"]}]', "item 1: there is no field 'answer'"),
    "columns": ("a.csv", "question,A,B,subject,answer\nq,a,b,x,0\n", "rename or delete subject"),
    "no header": ("a.csv", "Is 1 odd?,yes,no,0\n", "has the columns Is 1 odd?, yes, no, 0; expected question"),
    "fields": ("a.csv", "question,A,B,answer\nq,a,0\n", "line 2: the row has more or fewer fields than the header"),
    "ambiguous": ("a.csv", "question,A,B,answer\nq,1,0,0\n", "line 2: the answer '0' names 2 choices"),
    "lists": ("a.csv", "question,choices,answer\nq,[a b],0\n", "line 2: choices is '[a b]', expected a JSON list"),
    "suffix": ("a.xlsx", "x", "ends in .xlsx; expected .jsonl, .json, .csv or .tsv"),
    "nothing": ("a.csv", "", "has the columns none"),
}


@pytest.mark.parametrize("case", CUSTOM_ERRORS)
def test_bad_custom_files_are_refused_by_place(tmp_path, case):
    name, content, message = CUSTOM_ERRORS[case]
    (tmp_path / name).write_text(content)
    (task,) = tasks_named([], [str(tmp_path / name)])
    with pytest.raises(ValueError) as error:
        read_questions(tmp_path / name, task)
    assert message in str(error.value) and name in str(error.value)


def test_all_bad_rows_are_listed_or_left_out(tmp_path, capsys):
    rows = [{**row, "question": None if n % 2 else row["question"]} for n, row in enumerate(ROWS * 5)]
    path = written(tmp_path, "x.jsonl", rows)
    (task,) = tasks_named([], [str(path)])
    with pytest.raises(ValueError, match="15 rows cannot be used") as error:
        read_questions(path, task)
    assert (
        "line 2: question is None" in str(error.value)
        and "line 20:" in str(error.value)
        and "5 more" in str(error.value)
    )
    assert (
        len(read_questions(path, task, skip_bad=True)) == 15 and "15 bad rows are left out" in capsys.readouterr().out
    )


def test_two_files_of_one_name_are_refused():
    """Once the last one alone was scored."""
    with pytest.raises(ValueError, match="a/test.jsonl and b/test.csv, which would both be the task 'test'"):
        tasks_named([], ["a/test.jsonl", "b/test.csv"])
    with pytest.raises(ValueError, match="would be the task 'piqa', which exists already"):
        tasks_named([], ["x/piqa.jsonl"])
    with pytest.raises(ValueError, match="'perplexity', which exists already"):
        tasks_named([], ["perplexity.jsonl"])
    assert [task.name for task in tasks_named(["piqa", "mmlu_stem", "piqa"], ["a.jsonl"])][::20] == ["piqa", "a"]


# -----------------------------------------------------------------------------
# Shots and prompts


def test_shots_depend_on_seed_and_index_alone(data):
    task, items = TASKS["arc_challenge"], questions(data, "arc_challenge")
    pool = read_questions(find(data, task.pool), task)
    drawn = draw_shots(task, items, pool, 3, by="index", seed=7)
    assert draw_shots(task, items[:2], pool, 3, by="index", seed=7) == drawn[:2] and drawn[0] != drawn[1]
    assert draw_shots(task, items, pool, 3, by="index", seed=8) != drawn
    assert draw_shots(task, items, pool, 3, by="first", seed=7) == [pool[:3]] * 3


def test_harness_draw_runs_one_generator_through_the_items():
    """lm-eval: random.Random(1234).sample per item in turn; without a test split one more, and the item is left out."""
    pool = [ask(f"q{n}", ("a", "b"), 0) for n in range(12)]
    rng = random.Random(1234)
    expected = [rng.sample(pool, 4), rng.sample(pool, 4)]
    assert draw_shots(TASKS["arc_challenge"], pool[:2], pool, 4, by="harness", seed=1234) == expected
    rng = random.Random(1234)
    expected = [[shot for shot in rng.sample(pool, 5) if shot != item][:4] for item in pool[:2]]
    assert draw_shots(TASKS["hellaswag"], pool[:2], pool, 4, by="harness", seed=1234) == expected
    assert all(pool[i] not in drawn for i, drawn in enumerate(expected))


@pytest.mark.parametrize("system", ["", "Be brief.", "Be brief.\n"])
@pytest.mark.parametrize("name", ["arc_easy", "mmlu_anatomy", "winogrande", "gsm8k", "lambada_openai"])
@pytest.mark.parametrize("n", [0, 2])
def test_prompts_are_those_of_the_harness(data, name, system, n):
    """Against lm-eval's own building of turns: as text, as turns, and as one message."""
    harness, messages = pytest.importorskip("lm_eval.api.task"), pytest.importorskip("lm_eval.api.utils")
    task = TASKS[name]
    pool = read_questions(find(data, task.pool), task)[:n]
    context = questions(data, name)[0].contexts[0]
    preamble = messages.maybe_delimit(system, task.description, "\n\n")

    def turns() -> list:
        made = [messages.Message("system", preamble)] if preamble else []
        for shot in pool:
            made += harness.ConfigurableTask.build_qa_turn(None, q=shot.contexts[shot.gold], a=shot.choices[shot.gold])
        return made + harness.ConfigurableTask.build_qa_turn(None, q=context, few_delim="")

    assert tasks.plain_prompt(task, pool, context, system) == "".join(turn.to_text() for turn in turns())
    assert tasks.chat_prompt(task, pool, context, system, True) == [turn.to_dict() for turn in turns()]
    assert tasks.chat_prompt(task, pool, context, system, False) == messages.multiturn_to_singleturn(turns())


def test_prompt_of_a_chat_holds_all_of_the_plain_one(data):
    """The same words in the same order, whatever the form; the last turn is the user's."""
    task = TASKS["mmlu_anatomy"]
    pool = read_questions(find(data, task.pool), task)
    context = questions(data, "mmlu_anatomy")[0].contexts[0]
    plain = tasks.plain_prompt(task, pool, context)
    assert plain.startswith(task.description + pool[0].contexts[0]) and plain.endswith("\nAnswer:")
    for multiturn, turns in ((True, 2 + 2 * len(pool)), (False, 2)):
        chat = tasks.chat_prompt(task, pool, context, "", multiturn)
        assert len(chat) == turns and chat[0]["role"] == "system" and chat[-1]["role"] == "user"
        assert " ".join(turn["content"] for turn in chat).split() == plain.split()
