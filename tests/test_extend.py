"""docs/EXTEND.md is true: its diffs apply to the repository as it stands, and do what the page says.

Run: python -m pytest tests/test_extend.py
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_base, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "EXTEND.md").read_text()
DIFFS = re.findall(r"^```diff\n(.*?)^```", PAGE, re.S | re.M)


def files_of(patch: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.*)", patch, re.M)


def diff_of(*names: str) -> str:
    """The diff of docs/EXTEND.md that changes these files and no other."""
    return next(diff for diff in DIFFS if set(files_of(diff)) == set(names))


def patched(patch: str, folder: Path) -> Path:
    """A copy of the product with a patch applied. Skips without git; fails with what to do where it no longer fits."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, and it applies the patches")
    copy = folder / "copy"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("recipe/*.py"), *ROOT.glob("data/*.py")]:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    subprocess.run(["git", "init", "-q", "."], cwd=copy, check=True)
    done = subprocess.run(["git", "apply", "-"], cwd=copy, input=patch, capture_output=True, text=True)
    if done.returncode:
        files = " ".join(files_of(patch))
        pytest.fail(f"the worked example of docs/EXTEND.md no longer applies to {files}: {done.stderr}Make its changes "
                    f"by hand, put what `git diff -U1 {files}` prints in its place (less `diff` and `index`), and "
                    "take the changes back with git stash", pytrace=False)
    return copy


def run(copy: Path, *words) -> list[str]:
    """Lines that `python WORDS` prints in the patched copy."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


READ_TASK = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from data.tasks import find, read_questions, tasks_named
task, = tasks_named(["commonsense_qa"])
data = Path(sys.argv[1])
for files in (task.files, task.pool):
    print(json.dumps([asdict(question) for question in read_questions(find(data, files), task)]))
"""


def commonsense_row(stem: str, texts: list[str], key: str) -> dict:
    """A row as it is published."""
    choices = [{"label": label, "text": text} for label, text in zip("ABCDE", texts)]
    return {"answerKey": key, "id": "0", "question": {"question_concept": "x", "choices": choices, "stem": stem}}


@pytest.mark.skipif(not (ROOT / "data" / "tasks.py").exists(), reason="the tasks still stand in eval.py here")
def test_a_task_is_one_row(tmp_path):
    """Two made-up rows in the published form become the questions that they hold, and eval.py scores them."""
    copy, data = patched(diff_of("data/tasks.py"), tmp_path), tmp_path / "eval"
    inks = ["pen", "cup", "hat", "sea", "owl"]
    write_jsonl(data / "commonsense_qa/dev_rand_split.jsonl", [commonsense_row("What holds ink?", inks, "A")])
    beds = ["sky", "bed", "jar", "oak", "tin"]
    write_jsonl(data / "commonsense_qa/train_rand_split.jsonl", [commonsense_row("Where do we sleep?", beds, "B")])
    (ink,), (bed,) = map(json.loads, run(copy, "-c", READ_TASK, data))
    assert ink == {"contexts": ["Question: What holds ink?\nAnswer:"] * 5, "choices": inks, "gold": 0}
    assert bed["choices"] == beds and bed["gold"] == 1
    options = "--tasks=commonsense_qa", "--fewshot=0", f"--data={data}", f"--out={tmp_path / 'scores.json'}"
    run(copy, "eval.py", f"--model={write_base(tmp_path / 'base')}", *options)
    assert json.loads((tmp_path / "scores.json").read_text())["results"]["commonsense_qa"]["n"] == 1
    added = [line for line in diff_of("data/tasks.py").splitlines()[2:] if line.startswith("+")]
    assert len(re.findall(r"Task\(", "".join(added))) == 1  # one row, and nothing else
    assert not [line for line in diff_of("data/tasks.py").splitlines()[2:] if line.startswith("-")]


READ_ROWS = """
import json, sys
from data.records import read_records, to_messages
for place, row in read_records(sys.argv[1]):
    print(json.dumps(to_messages(row, place)))
"""


def test_a_form_of_rows(tmp_path):
    """Rows with preferences: the chosen answer is learned from, the rejected one is not in the conversation."""
    row = {"system": "Be brief.", "question": "Two and two?", "chosen": "Four.", "rejected": "Five."}
    rows = write_jsonl(tmp_path / "rows.jsonl", [row, {"prompt": "Name a metal.", "chosen": "Tin."}])
    copy = patched(diff_of("data/records.py"), tmp_path)
    (first, _), (second, _) = map(json.loads, run(copy, "-c", READ_ROWS, rows))
    assert [turn["role"] for turn in first] == ["system", "user", "assistant"]
    assert [turn["content"] for turn in first] == ["Be brief.", "Two and two?", "Four."]
    assert [turn["content"] for turn in second] == ["Name a metal.", "Tin."]


LOGITS = """
import sys, torch
from safetensors.torch import load_file, save_file
import convert_hf
from model import load_model
from router import RouterConfig
folder = sys.argv[1]
convert_hf.convert(f"{folder}/hf", f"{folder}/ours")
convert_hf.convert(f"{folder}/ours", f"{folder}/back", to_hf=True)
model, tokens = load_model(f"{folder}/ours"), load_file(f"{folder}/tokens.safetensors")["tokens"]
result = {"off": model(tokens)[0]}
model.add_routers(RouterConfig.of("both_sequence", (0, 2)))
gates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
for route in ("mask", "gather"):
    result[route] = model(tokens, route=route, gates=gates)[0]
save_file(result, f"{folder}/logits.safetensors")
"""


def test_a_family(tmp_path):
    """A tiny random Gemma of transformers, converted by the patched copy: its logits, and routes that agree."""
    transformers = pytest.importorskip("transformers")
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    copy = patched(diff_of("convert_hf.py", "model.py"), tmp_path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = transformers.GemmaConfig(**sizes, **heads, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, value in theirs.named_parameters():  # large enough that every difference to Llama shows
        value.data.normal_(0.0, 0.3 if "norm" in name else 0.15)
    theirs.save_pretrained(tmp_path / "hf")
    tokens = torch.randint(131, (2, 40))
    safetensors.save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    run(copy, "-c", LOGITS, tmp_path)
    logits = safetensors.load_file(tmp_path / "logits.safetensors")
    expected = theirs(tokens).logits.detach()
    assert expected.abs().max() > 2 and (logits["off"] - expected).abs().max() < 1e-4
    assert (logits["mask"] - logits["gather"]).abs().max() < 1e-4 < (logits["mask"] - expected).abs().max()
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert torch.equal(back(tokens).logits, expected)


def test_a_family_leaves_the_others_alone(tmp_path):
    """A llama that was converted before the patch gives the same logits, bit for bit, and the same fingerprint."""
    copy, base = patched(diff_of("convert_hf.py", "model.py"), tmp_path), write_base(tmp_path / "base")
    program = """
import sys, torch
from model import load_model
model = load_model(sys.argv[1])
print(model.fingerprint, model(torch.arange(20)[None])[0].double().sum().item())
"""
    assert run(copy, "-c", program, base) == run(ROOT, "-c", program, base)
