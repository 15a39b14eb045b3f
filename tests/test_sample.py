"""The command line that speaks: streams, batches, chats, routes shown.  Run: python -m pytest tests/test_sample.py"""

import io
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sample
from model import generate, load_model, stream
from router import RouterConfig, RouterMeta, save_routers
from tiny import CONFIG, write_base, write_jsonl
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with room to speak, and router files of two units beside it."""
    folder = write_base(tmp_path_factory.mktemp("speaker") / "base", replace(CONFIG, max_seq_len=512))
    model = load_model(folder)
    for unit in ("sequence", "token"):
        torch.manual_seed(2)
        model.add_routers(RouterConfig.of(f"attn_{unit}", (1, 2, 3)))
        for router in model.routers():
            torch.nn.init.normal_(router.weight)
        save_routers(folder / f"{unit}.safetensors", model, RouterMeta(model.routing, [0.5] * 3, model.fingerprint))
    return folder


def say(folder, monkeypatch, capsys, *words, stdin: str = "") -> str:
    monkeypatch.setattr("sys.argv", ["sample.py", f"--model={folder}", "--threads=1", "--dtype=float32", *words])
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    sample.main()
    return capsys.readouterr().out


def wanted(folder, prompt: str, unit: str | None, n: int) -> str:
    tok, routers = load_tokenizer(folder), unit and folder / f"{unit}.safetensors"
    tokens = generate(load_model(folder, routers), [tok.encode(prompt, bos=tok.adds_bos)], n, stop_tokens=tok.stop_ids)
    return tok.decode(tokens[0], skip_special=True)


def test_one_prompt_streams_what_generate_says_and_its_figures(folder, monkeypatch, capsys):
    out = say(folder, monkeypatch, capsys, "--raw", "--prompt=Once upon", "--max_new_tokens=20")
    text, figures = out.rsplit("\n[", 1)
    assert text == wanted(folder, "Once upon", None, 20)
    assert re.fullmatch(r"9 \+ \d+ tokens \| [\d.,]+ tokens/s \| KV \d+\.\d\d MB\]\n", figures)


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_batches_give_what_single_prompts_give(folder, unit, monkeypatch, capsys):
    prompts = ["Hello", "A much longer prompt than that", "x"]
    path = folder / "prompts.txt"
    path.write_text("\n\n".join(prompts) + "\n")
    routers = f"--routers={folder / unit}.safetensors"
    out = say(folder, monkeypatch, capsys, f"--prompts={path}", routers, "--max_new_tokens=12", "--raw", "--compare",
              "--batch=2")
    for number, prompt in enumerate(prompts, 1):
        part = out.split(f"# {number} of 3\n")[1].split("# ")[0]
        assert wanted(folder, prompt, unit, 12) + "\n[" in part and wanted(folder, prompt, None, 12) in part
        assert "% of routed units skipped" in part and "[dense: " in part


def test_a_budget_per_sequence_holds_for_each_answer(folder, monkeypatch, capsys):
    model, path, prompts = load_model(folder), folder / "first.safetensors", folder / "three.txt"
    torch.manual_seed(2)
    model.add_routers(RouterConfig.of("attn_sequence", (1, 2, 3), reads="first"))
    for router in model.routers():
        torch.nn.init.normal_(router.weight)
    table = {"budgets": [0.7], "thresholds": [[0.5] * 3]}
    save_routers(path, model, RouterMeta(model.routing, [0.5] * 3, model.fingerprint, table))
    prompts.write_text("Hello\nA much longer prompt than that\nx\n")
    words = (f"--prompts={prompts}", f"--routers={path}", "--budget=0.7", "--max_new_tokens=5", "--raw", "--batch=2")
    assert say(folder, monkeypatch, capsys, *words, "--budget_per=sequence").count("33.3% of routed units skipped") == 3
    with pytest.raises(ValueError, match="about routers"):
        say(folder, monkeypatch, capsys, "--prompt=x", "--budget_per=sequence")


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_shares_are_those_of_the_routes(folder, unit):
    model, prompt = load_model(folder, folder / f"{unit}.safetensors"), list(b"A prompt of several words")
    answers = sample.Answers(model, [prompt, prompt[:7]])
    for step in stream(model, answers.prompts, 9):
        answers.add(step)
    for row, own in enumerate(answers.prompts):
        whole = own + answers.tokens[row][:-1]
        gates = model(torch.tensor([whole]), route="mask", prompt_lengths=[len(own)])[1]
        assert answers.ran[row] / answers.units[row] == pytest.approx(gates.mean().item(), abs=1e-6)
        shares = gates.mean(0)[0, len(own):].tolist() if unit == "token" else [gates.mean().item()] * 8
        assert answers.shares[row] == pytest.approx(shares, abs=1e-6)


def test_route_is_shown_below_without_colours_and_in_them_on_a_terminal(folder, monkeypatch, capsys):
    routers = folder / "token.safetensors"
    words = ("--raw", "--prompt=Once", "--max_new_tokens=10", "--show_route", f"--routers={routers}")
    plain = say(folder, monkeypatch, capsys, *words)
    assert "\x1b" not in plain and len(re.findall(r" [01]\.\d\d(?=  |\n)", plain)) == 9
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    coloured = say(folder, monkeypatch, capsys, *words)
    text = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert coloured.count("\x1b[38") > 6 and wanted(folder, "Once", "token", 10) in text
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in say(folder, monkeypatch, capsys, *words)


def test_chat_reads_each_turn_with_all_before_it(folder, monkeypatch, capsys):
    seen, real = [], sample.encode_chat

    def spy(tok, messages, **more):
        seen.append([(turn["role"], turn["content"]) for turn in messages])
        return real(tok, messages, **more)

    monkeypatch.setattr(sample, "encode_chat", spy)
    out = say(folder, monkeypatch, capsys, "--max_new_tokens=6", "--system=Be kind", "--chat=plain",
              stdin="hi\n\n" + "x" * 600 + "\nand you?\n")
    assert [len(turns) for turns in seen] == [2, 4, 4]  # the one that did not fit is left out
    assert [role for role, _ in seen[2]] == ["system", "user", "assistant", "user"]
    assert out.split("\n[")[0] == seen[2][2][1]


def test_a_character_in_two_tokens_is_shown_whole(folder):
    text = sample.Text(load_tokenizer(folder))
    assert [text.add(token) for token in "aé".encode()] == ["a", "", "é"]
    assert text.add(0xC3) == "" and text.add(None) == "\ufffd"


def test_rows_lose_their_last_answer(folder, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "one", "response": "two"}, {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"}]}]
    path, seen, real = write_jsonl(tmp_path / "rows.jsonl", rows), [], sample.encode_chat

    def noted(tok, turns, **more):
        seen.append(turns)
        return real(tok, turns, **more)

    monkeypatch.setattr(sample, "encode_chat", noted)
    say(folder, monkeypatch, capsys, f"--prompts={path}", "--max_new_tokens=2", "--chat=plain")
    assert [turns[-1]["content"] for turns in seen] == ["one", "c"]


@pytest.mark.parametrize("words, said", [
    (("--prompt=a", "--prompts=b.txt"), "leave one away"),
    (("--raw", "--system=x"), "leave it away"),
    (("--compare",), "give --routers"),
    (("--max_new_tokens=0",), "expected 1 or more"),
])
def test_settings_that_contradict_each_other_are_refused(folder, words, said, monkeypatch, capsys):
    with pytest.raises(ValueError, match=said):
        say(folder, monkeypatch, capsys, *words)


def test_ctrl_c_keeps_what_was_said(folder):
    command = [sys.executable, "sample.py", f"--model={folder}", "--raw", "--prompt=Once", "--max_new_tokens=500",
               "--threads=1", "--dtype=float32", "--temperature=2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = process.stdout.read(1)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130) and b"Traceback" not in err
    assert b"tokens/s" in first + out
