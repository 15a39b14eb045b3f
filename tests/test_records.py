"""Rows: every form that people publish becomes the same conversation, or is refused by name.  Run: python -m pytest
tests/test_records.py
"""

import gzip
import json
import os

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_tokenizer

from data.records import (
    LOSS_KEYS, PAIRS, PROMPT_KEYS, Form, Tally, encode, prompt_of, read_records, settle_bad, to_messages,
)
from data.stream import RowError
from tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}
ROWS = [{"a": 1}, {"a": "é\u2028"}]
FORMS = [
    {"messages": CHAT, "domain": "x"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": "1"},
    {"instruction": "q", "input": "", "output": "a"},
    {"instruction": "q", "output": "a", "system": "", "history": [], "text": "q a"},
    {"instruction": "q", "response": "a"},
    {"prompt": "q", "response": "a"},
    {"prompt": "q", "completion": "a"},
    {"query": "q", "response": "a", "type": "x"},
    {"question": "q", "answer": "a"},
]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


# -----------------------------------------------------------------------------
# Files


def written(path, content: bytes):
    path.write_bytes(content)
    return path


LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
LIST = json.dumps(ROWS, indent=1).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.JSONL", "a.JSON", "rows", "a.jsonl.gz"])
@pytest.mark.parametrize("content", [LINES, LIST, b"\xef\xbb\xbf" + LINES, b"\n" + LIST, gzip.compress(LINES, mtime=0)])
def test_content_and_not_the_name_says_how_rows_are_written(tmp_path, name, content):
    path = written(tmp_path / name, content)
    rows = read_records(path)
    assert [row for _, row in rows] == ROWS
    assert all(place.startswith(f"{path}, ") for place, _ in rows)


def test_places_count_lines_and_items(tmp_path):
    assert [place.split(", ")[1] for place, _ in read_records(written(tmp_path / "a", LINES))] == ["line 1", "line 3"]
    assert [place.split(", ")[1] for place, _ in read_records(written(tmp_path / "b", LIST))] == ["item 1", "item 2"]


@pytest.mark.parametrize(
    "content, part",
    [
        (b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        (b'{"a": "\xff"}', "line 1 is not UTF-8"),
        (b"7\n8", "line 1 is a JSON int"),
        (b'[{"a": 1}, 3]', "item 2 is a JSON int"),
        (b'[{"a": 1}', "ends behind .*item 1"),
        (b'{\n"data": [{"a": 1}]\n}', "one JSON object with the keys .'data'."),
        (b"\n \n", "no row"),
        (b"", "no row"),
        (b"[]", "no row"),
        (b"PAR1\x00", "Parquet"),
        (gzip.compress(LINES, mtime=0)[:-9], "cannot be unpacked"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "line 1 is not JSON"),
    ],
)
def test_what_holds_no_rows_is_refused_by_name(tmp_path, content, part):
    path = written(tmp_path / "rows.jsonl", content)
    with pytest.raises(ValueError, match=part) as error:
        read_records(path)
    assert str(path) in str(error.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="c.jsonl"):
        read_records(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        read_records(tmp_path)


def test_bad_rows_are_all_collected_and_the_good_ones_kept(tmp_path):
    bad = []
    path = written(tmp_path / "rows.jsonl", b'{"a": 1}\n{"a"\n[2]\n{"a": 2}\n')
    assert [row["a"] for _, row in read_records(path, bad)] == [1, 2]
    assert len(bad) == 2 and "line 2" in str(bad[0]) and "line 3" in str(bad[1])


# -----------------------------------------------------------------------------
# Forms


@pytest.mark.parametrize("row", FORMS)
def test_every_form_is_the_same_conversation(row):
    assert to_messages(row, "here") == (CHAT, None)


@pytest.mark.parametrize("row", [row for row in FORMS if "messages" not in row])
def test_a_system_message_of_the_row_comes_first(row):
    assert to_messages(row | {"system": "s"}, "here") == ([SYSTEM, *CHAT], None)


def test_alpaca_input_and_history():
    assert to_messages({"instruction": "q", "input": "i", "output": "a"}, "here")[0][0]["content"] == "q\n\ni"
    row = {"instruction": "q", "output": "a", "history": [["q", "a"], ["q", "a"]]}
    assert to_messages(row, "here")[0] == CHAT * 3


def test_tools_may_be_a_list_or_its_json_text():
    tools = [{"name": "f"}]
    for written_so in (tools, json.dumps(tools)):
        assert to_messages({"messages": CHAT, "tools": written_so}, "here") == (CHAT, tools)
    with pytest.raises(ValueError, match="here: tools is not JSON"):
        to_messages({"messages": CHAT, "tools": "f("}, "here")


@given(st.sampled_from(FORMS), st.sampled_from(PROMPT_KEYS))
def test_a_key_that_changes_the_prompt_is_used_or_refused_by_name(row, key):
    """Whatever the form: a row with the key either gives another conversation, or an error that names the key."""
    value = {"history": [["x", "y"]], "tools": [{"name": "f"}]}.get(key, "value")
    try:
        assert to_messages({**row, key: value}, "here") != (CHAT, None)
    except ValueError as error:
        assert repr(key) in str(error) and str(error).startswith("here")


@pytest.mark.parametrize(
    "row, part",
    [
        ({"foo": 1}, r"has the keys \['foo'\]"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": "hello"}, "not a list of turns"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "turn 1 has role 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "content of type NoneType"),
        ({"messages": CHAT[:1]}, "no turn of the assistant"),
        ({"instruction": 3, "output": "a"}, "has the keys"),
        ({"instruction": "q", "input": 7, "output": "a"}, "input is a int"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "expected pairs"),
        ({"conversations": [SYSTEM, *CHAT], "system": "t"}, "expected one"),
        ({"messages": [CHAT[0] | {"weight": 1}, CHAT[1]]}, "loss is asked for on a turn of the user"),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": 0.5}]}, "'weight' is 0.5"),
    ],
)
def test_wrong_rows_name_place_and_reason(row, part):
    with pytest.raises(ValueError, match=part) as error:
        to_messages(row, "file, line 3")
    assert str(error.value).startswith("file, line 3")


# -----------------------------------------------------------------------------
# Tokens


def answers(tok, example) -> str:
    return tok.decode([example.tokens[position] for position in example.targets], skip_special=True)


def test_prompt_ends_before_the_first_loss_carrying_token(tok):
    example = encode({"prompt": "question", "response": "answer"}, "here", Form(tok, 128))
    assert example.targets == list(range(example.prompt, example.targets[-1] + 1))
    assert "question" in tok.decode(example.tokens[: example.prompt]) and answers(tok, example) == "answer"


def test_text_is_predicted_in_its_second_half(tok):
    text = encode({"text": "0123456789"}, "here", Form(tok, 128))
    assert text.prompt == 5 and text.targets == [5, 6, 7, 8, 9]


def test_long_examples_are_refused_or_cut(tok):
    row = {"prompt": "q" * 20, "response": "a" * 60}
    with pytest.raises(ValueError, match=r"file, line 3: \d+ tokens, expected at most 60.*--truncate"):
        encode(row, "file, line 3", Form(tok, 60))
    example = encode(row, "here", Form(tok, 60, truncate=True))
    assert len(example.tokens) == 60 and max(example.targets) == 59
    assert encode(row, "here", Form(tok, 10, truncate=True)) is None


@pytest.mark.parametrize("key", LOSS_KEYS)
@pytest.mark.parametrize("value", [0, False])
def test_loss_flags_of_a_turn(tok, key, value):
    turns = [
        CHAT[0],
        {"role": "assistant", "content": "one", key: value},
        CHAT[0],
        {"role": "assistant", "content": "two"},
    ]
    assert answers(tok, encode({"messages": turns}, "here", Form(tok, 128))) == "two"
    turns[3] |= {key: 1 - value}
    assert answers(tok, encode({"messages": turns}, "here", Form(tok, 128))) == "two"
    turns[3][key] = value
    with pytest.raises(ValueError, match="no loss-carrying token"):
        encode({"messages": turns}, "here", Form(tok, 128))


def test_loss_on_the_last_answer_alone(tok):
    row = {
        "messages": [CHAT[0], {"role": "assistant", "content": "one"}, CHAT[0], {"role": "assistant", "content": "two"}]
    }
    assert answers(tok, encode(row, "here", Form(tok, 128))) == "onetwo"
    last = encode(row, "here", Form(tok, 128, last_only=True))
    assert answers(tok, last) == "two" and last.tokens == encode(row, "here", Form(tok, 128)).tokens


def test_a_share_of_the_conversations_stands_without_a_chat_form(tok):
    """By what they say and the seed alone; questions, answers and the loss stay what they are; rows with tools keep
    their form.
    """
    last = {"role": "assistant", "content": "last"}
    rows = [{"messages": [*CHAT, {"role": "user", "content": f"more {i}"}, last]} for i in range(200)]
    made = [encode(row, "here", Form(tok, 400, bare=0.25, seed=3)) for row in rows]
    bare = [i for i, example in enumerate(made) if example.bare]
    assert 30 <= len(bare) <= 70
    backwards = [encode(row, "there", Form(tok, 400, bare=0.25, seed=3)).bare for row in reversed(rows)]
    assert backwards == [example.bare for example in reversed(made)]
    assert bare != [i for i, row in enumerate(rows) if encode(row, "here", Form(tok, 400, bare=0.25, seed=4)).bare]
    said = [turn["content"] for turn in CHAT if turn["role"] == "assistant"]
    texts = {tok.decode(list(made[i].tokens)).replace(f"more {i}", "more") for i in bare}
    assert len(texts) == 2 and sum("Question: more\nAnswer: last\n" in text for text in texts) == 1
    assert all("more\n last\n" in text or "Question" in text for text in texts)
    for i in bare[:20]:
        assert answers(tok, made[i]) == "".join(f" {text}\n" for text in [*said, "last"])
        alone = encode(rows[i], "here", Form(tok, 400, bare=0.25, seed=3, last_only=True))
        assert answers(tok, alone) == " last\n"
    chat = next(example for example in made if not example.bare)
    assert chat.tokens == encode(rows[made.index(chat)], "here", Form(tok, 400)).tokens
    with_tools = {"messages": CHAT, "tools": [{"name": "f"}]}
    with pytest.raises(RowError):  # its form has no place for tools, and is asked all the same
        encode(with_tools, "here", Form(tok, 400, bare=1.0))
    assert not encode({"text": "0123456789"}, "here", Form(tok, 128, bare=1.0)).bare


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "tool_calls"])
def test_what_the_chat_form_does_not_read_is_refused(tok, key):
    row = {"messages": [CHAT[0], CHAT[1] | {key: "because"}]}
    with pytest.raises(ValueError, match=f"here: .*{key}"):
        encode(row, "here", Form(tok, 128))
    with pytest.raises(ValueError, match="here: tools are given"):
        encode({"messages": CHAT, "tools": [{"name": "f"}]}, "here", Form(tok, 128))


# -----------------------------------------------------------------------------
# Many rows


def test_bad_rows_are_listed_together_or_left_out_aloud(tok):
    bad, said = Tally(), []
    for i in range(40):
        try:
            assert encode({"prompt": "q", "response": "" if i % 2 else "a"}, f"line {i}", Form(tok, 128)).targets
        except RowError as error:
            bad.append(error)
    with pytest.raises(
        ValueError, match=r"20 rows cannot be used(.|\n)*line 1:(.|\n)*line 19:(.|\n)*and 10 more"
    ) as error:
        settle_bad(bad, skip=False)
    assert "line 21" not in str(error.value) and "--skip_bad" in str(error.value)
    settle_bad(bad, skip=True, say=said.append)
    assert "20 bad rows are left out" in said[0] and bad.counts.total() == 20
    settle_bad([], skip=False)


@pytest.mark.parametrize("row, reason", [
    ({"foo": 1}, "no known form"),
    ({"messages": []}, "no list of turns"),
    ({"messages": [{"role": "user", "content": "q"}]}, "no turn of the assistant"),
    ({"messages": [{"role": "critic", "content": "q"}, *CHAT]}, "an unknown role"),
    ({"messages": [{"role": "user", "content": None}, *CHAT]}, "a turn without text"),
    ({"messages": CHAT, "system": "s"}, "a key that is not read"),
    ({"prompt": "q" * 200, "response": "a"}, "too long"),
    ({"prompt": "q", "response": ""}, "no place in the chat form"),
    ({"text": ""}, "no token carries loss"),
    ({"prompt": "q", "response": "a", "system": 3}, "a field of another type"),
])
def test_every_fault_has_a_reason_to_count_it_by(tok, row, reason):
    with pytest.raises(RowError, match="^here") as error:
        encode(row, "here", Form(tok, 128))
    assert error.value.reason == reason


def test_a_prompt_is_what_stands_before_the_first_answer():
    assert prompt_of(to_messages({"messages": [SYSTEM, *CHAT, *CHAT]}, "here")) == "s\nq"
    assert prompt_of(to_messages({"instruction": "q", "input": "i", "output": "a"}, "here")) == "q\n\ni"
    assert prompt_of(to_messages({"text": "all of it"}, "here")) == "all of it"


# -----------------------------------------------------------------------------
# Drawn at random: a conversation, written in any form that can hold it, is read as itself

EXAMPLES = int(os.environ.get("RT_EXAMPLES", 500))  # by hand: RT_EXAMPLES=10000
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8)
METADATA = ("id", "source", "domain", "split", "category", "score", "model", "lang")
SPELLED = {
    "system": ["system", "System"],
    "user": ["user", "human", "Human"],
    "assistant": ["assistant", "gpt", "chatgpt", "bard", "bing", "model", "GPT"],
}


@st.composite
def conversations(draw) -> list[dict]:
    turns = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        answer = {"role": "assistant", "content": draw(TEXTS)}
        if draw(st.integers(0, 3)) == 0:
            answer["loss"] = False
        turns += [{"role": "user", "content": draw(TEXTS)}, answer]
    return turns


@st.composite
def written_rows(draw) -> tuple[dict, list[dict]]:
    """A row of some form, and the conversation that it holds."""
    turns = draw(conversations())
    flagged = any("loss" in turn for turn in turns)
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    form = draw(st.sampled_from(["messages", "conversations"] if flagged else ["messages", "conversations", "pair"]))
    row = {key: draw(st.one_of(TEXTS, st.integers(), st.none())) for key in draw(st.sets(st.sampled_from(METADATA)))}
    if form == "pair":
        pairs = [
            [user["content"], answer["content"]]
            for user, answer in zip(turns[len(system) :: 2], turns[len(system) + 1 :: 2])
        ]
        question, answer = draw(st.sampled_from(PAIRS))
        row |= {question: pairs[-1][0], answer: pairs[-1][1]}
        if len(pairs) > 1 or draw(st.booleans()):
            row["history"] = pairs[:-1]
        if system or draw(st.booleans()):
            row["system"] = system[0] if system else ""
        return row, turns
    apart = form == "conversations" and system and draw(st.booleans())
    role, content = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    row[form] = [written_turn(draw, turn, role, content) for turn in (turns[1:] if apart else turns)]
    if apart:
        row["system"] = system[0]
    return row, turns


def written_turn(draw, turn: dict, role: str, content: str) -> dict:
    written = {role: draw(st.sampled_from(SPELLED[turn["role"]])), content: turn["content"]}
    if "loss" in turn:
        written[draw(st.sampled_from(LOSS_KEYS))] = draw(st.sampled_from([0, False, 0.0]))
    elif turn["role"] == "assistant" and draw(st.booleans()):
        written[draw(st.sampled_from(LOSS_KEYS))] = draw(st.sampled_from([1, True, None]))
    return written


@hypothesis.settings(max_examples=EXAMPLES)
@given(written_rows())
def test_a_row_of_any_form_is_read_as_the_conversation_that_it_holds(case):
    row, turns = case
    assert to_messages(json.loads(json.dumps(row)), "here") == (turns, None)


@hypothesis.settings(max_examples=EXAMPLES)
@given(written_rows(), st.sampled_from(PROMPT_KEYS), TEXTS)
def test_no_key_that_changes_the_prompt_is_lost(case, key, value):
    """Set on any row: the conversation changes by it, or the row is refused, naming the key."""
    row, turns = case
    if row.get(key):
        return
    value = {"history": [[value, value]], "tools": [{"name": value}]}.get(key, value)
    try:
        assert to_messages({**row, key: value}, "here") != (turns, None)
    except ValueError as error:
        assert key in str(error) and str(error).startswith("here")
