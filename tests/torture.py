"""Runs that are killed, starved and damaged at random moments must end in the same routers, or say one clear sentence.

    python tests/torture.py [--trials=120] [--seed=1] [--launcher=6]

Not a test of the suite: it takes some 20 minutes. Each trial harms a run on a tiny base in one way, then gives the same
command again until it ends. Prints the count by kind and outcome, and every failure with its output; status 1 if any.
"""

import contextlib
import fcntl
import io
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from safetensors.torch import load, load_file  # noqa: E402
from tiny import write_base, write_jsonl  # noqa: E402

import runtime  # noqa: E402
import train  # noqa: E402
from runtime import setting  # noqa: E402

NOBODY = 65534
PIPE_BYTES = 2**20
OUTPUT: dict[int, tuple[int, Path]] = {}  # of each running rank: a pipe, and the file for what comes out of it
HELD_BACK = {signal.SIGINT, signal.SIGTERM}
TIMEOUT = 240.0  # seconds after which a run hangs
SETTINGS = {"layers": "1-3", "dtype": "float32", "batch_size": 8, "micro_batch": 2, "steps": 4, "save_every": 2,
            "select_samples": 4, "cost_samples": 4, "benefit_samples": 4, "calibrate_samples": 6, "heldout_samples": 4,
            "lr": 0.1, "rank_timeout": 0.15}


@dataclass
class Settings:
    trials: int = setting(120, "harmed runs of one or two ranks that are forked")
    seed: int = setting(1, "of moments and kinds")
    launcher: int = setting(6, "harmed runs under torchrun, which are slow")


class Failed(Exception):
    """A run that neither ended alike nor said a sentence."""


# -----------------------------------------------------------------------------
# Runs


@dataclass
class Bench:
    """Where trials happen."""

    folder: Path
    base: Path
    data: Path
    draw: random.Random
    expected: dict[int, bytes]  # ranks -> routers of a run that nobody harms
    seconds: dict[int, float]  # ranks -> what it takes

    def words(self, out: Path, **more) -> list[str]:
        values = {"model": self.base, "data": self.data, "out": out, **SETTINGS, **more}
        return [f"--{name}={value}" for name, value in values.items()]

    def moment(self, ranks: int) -> float:
        return self.draw.uniform(0.0, 1.1 * self.seconds[ranks])


def child(words: list[str], sink: int, env: dict[str, str], limit: int | None, user: int | None) -> None:
    """What a forked rank does, with signals held back until now; never returns."""
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # a pipe, whatever it was
        os.environ.update(env)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if user is not None:
            os.setgid(user)
            os.setuid(user)
        sys.argv = ["train.py", *words]
        runtime.run_main(train.main)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(words: list[str], log: Path, ranks: int = 1, limit: int | None = None, user: int | None = None) -> list[int]:
    """Fork the ranks of a run; returns their process ids. `wait` puts the output of each into LOG.RANK."""
    sys.stdout.flush()
    port, pids = free_port(), []
    for rank in range(ranks):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {name: str(value) for name, value in env.items()} if ranks > 1 else {}
        said, sink = os.pipe()  # no file, whose size would be limited too
        fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)  # one must not find the child within this function
        pids.append(os.fork())
        if pids[-1] == 0:
            child(words, sink, env, limit, user)
        os.close(sink)
        OUTPUT[pids[-1]] = said, log.with_name(f"{log.name}.{rank}")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
    return pids


def wait(pids: list[int], seconds: float = TIMEOUT) -> list[int]:
    """Exit codes, negative for signals. Kills what still runs after these seconds and fails."""
    codes, until = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                keep_output(pid)
        if time.monotonic() > until:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise Failed(f"hung for {seconds:.0f} s")
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def keep_output(pid: int) -> None:
    said, path = OUTPUT.pop(pid)
    path.write_bytes(os.read(said, PIPE_BYTES))
    os.close(said)


def shown(log: Path, ranks: int) -> str:
    return "".join(log.with_name(f"{log.name}.{rank}").read_text() for rank in range(ranks))


def check_sentences(log: Path, codes: list[int], killed: set[int] = frozenset()) -> None:
    """A rank that ended badly by itself said one sentence."""
    for rank, code in enumerate(codes):
        said = log.with_name(f"{log.name}.{rank}").read_text()
        if rank in killed or code in (0, 130, 143, -signal.SIGTERM):
            continue
        if code not in (1, 2) or said.count("error: ") != 1 or "Traceback" in said:
            raise Failed(f"rank {rank} ended with {code}:\n{said}")


def finish(bench: Bench, out: Path, ranks: int, log: Path) -> str:
    """Give the command again until it ends as one that nobody harmed. A sentence is answered by --overwrite, once."""
    words = bench.words(out)
    codes = wait(start(words, log, ranks))
    check_sentences(log, codes)
    outcome = "same routers"
    if any(codes):
        outcome = "a sentence, then anew"
        codes = wait(start([*words, "--overwrite"], log, ranks))
    if any(codes) or (out / "routers.safetensors").read_bytes() != bench.expected[ranks]:
        raise Failed(f"ended with {codes} and other routers:\n{shown(log, ranks)}")
    left = [path.name for path in out.rglob("*") if path.suffix == ".tmp" or path.name == "progress"]
    if left:
        raise Failed(f"left behind: {left}")
    return outcome


# -----------------------------------------------------------------------------
# Harms: each returns an outcome


def kill(bench: Bench, out: Path, log: Path, ranks: int, victims: set[int], number: int) -> str:
    pids = start(bench.words(out), log, ranks)
    time.sleep(bench.moment(ranks))
    for rank in victims:
        os.kill(pids[rank], number)
    check_sentences(log, wait(pids), victims if number == signal.SIGKILL else frozenset())
    return finish(bench, out, ranks, log)


def kill_the_only_one(bench: Bench, out: Path, log: Path) -> str:
    return kill(bench, out, log, 1, {0}, signal.SIGKILL)


def ask_the_only_one(bench: Bench, out: Path, log: Path) -> str:
    return kill(bench, out, log, 1, {0}, bench.draw.choice([signal.SIGTERM, signal.SIGINT]))


def kill_one_of_two(bench: Bench, out: Path, log: Path) -> str:
    return kill(bench, out, log, 2, {bench.draw.randrange(2)}, signal.SIGKILL)


def kill_both(bench: Bench, out: Path, log: Path) -> str:
    return kill(bench, out, log, 2, {0, 1}, signal.SIGKILL)


def ask_both(bench: Bench, out: Path, log: Path) -> str:
    return kill(bench, out, log, 2, {0, 1}, signal.SIGTERM)


def stop_one_of_two(bench: Bench, out: Path, log: Path) -> str:
    """A rank hangs; the other one gives up by itself."""
    pids, victim = start(bench.words(out), log, 2), bench.draw.randrange(2)
    time.sleep(bench.moment(2))
    os.kill(pids[victim], signal.SIGSTOP)
    try:
        codes = wait([pids[1 - victim]])
    finally:
        os.kill(pids[victim], signal.SIGKILL)
        os.waitpid(pids[victim], 0)
    check_sentences(log, codes if victim else [0, *codes], {victim})
    return finish(bench, out, 2, log)


def fill_the_disk(bench: Bench, out: Path, log: Path) -> str:
    """No file may grow beyond a random size."""
    ranks = bench.draw.choice([1, 1, 2])
    check_sentences(log, wait(start(bench.words(out), log, ranks, limit=int(2 ** bench.draw.uniform(6, 18)))))
    return finish(bench, out, ranks, log)


def take_the_write_bit(bench: Bench, out: Path, log: Path) -> str:
    """At a random moment, from an unprivileged user."""
    if os.getuid():
        return "left out: only root can become another user"
    out.mkdir()
    os.chown(out, NOBODY, NOBODY)
    pids = start(bench.words(out), log, user=NOBODY)
    time.sleep(bench.moment(1))
    folders = [out, *(path for path in out.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        codes = wait(pids)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    check_sentences(log, codes)
    return finish(bench, out, 1, log)


def change_the_data(bench: Bench, out: Path, log: Path) -> str:
    """A row is changed while the run lies killed: it is refused by name, or had nothing to keep; then it is mended."""
    pids, good = start(bench.words(out), log), bench.data.read_bytes()
    time.sleep(bench.moment(1))
    os.kill(pids[0], signal.SIGKILL)
    wait(pids)
    begun = (out / "checkpoint.safetensors").exists()
    lines = good.splitlines(keepends=True)
    number = bench.draw.randrange(len(lines))
    lines[number] = bench.draw.choice([b"", lines[number].replace(b"yes", b"no"), lines[number][: 20] + b"\n"])
    try:
        bench.data.write_bytes(b"".join(lines))
        codes = wait(start(bench.words(out), log))
        check_sentences(log, codes)
        if begun and codes == [0] and b"".join(lines) != good:
            raise Failed(f"went on with other data:\n{shown(log, 1)}")
    finally:
        bench.data.write_bytes(good)
    return finish(bench, out, 1, log)


def truncate_a_file(bench: Bench, out: Path, log: Path) -> str:
    """One of those that a run leaves, killed at a random moment or finished."""
    ranks = bench.draw.choice([1, 1, 2])
    pids = start(bench.words(out), log, ranks)
    if bench.draw.random() < 0.7:
        time.sleep(bench.moment(ranks))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    wait(pids)
    files = sorted(path for path in out.rglob("*") if path.is_file()) if out.exists() else []
    if files:
        path = bench.draw.choice(files)
        os.truncate(path, bench.draw.randrange(path.stat().st_size + 1))
    return finish(bench, out, ranks, log)


def change_the_ranks(bench: Bench, out: Path, log: Path) -> str:
    """Begun on one number of ranks, killed, ended on another: the same routers but for the order of sums."""
    begun, ended = bench.draw.sample([1, 2], 2)
    pids = start(bench.words(out), log, begun)
    time.sleep(bench.moment(begun))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait(pids)
    codes = wait(start(bench.words(out), log, ended))
    if any(codes):
        raise Failed(f"ended with {codes}:\n{shown(log, ended)}")
    found, expected = load_file(out / "routers.safetensors"), load(bench.expected[ended])
    apart = max((found[name] - expected[name]).abs().max().item() for name in expected)
    if apart > 1e-6:
        raise Failed(f"begun on {begun} ranks, ended on {ended}: routers differ by {apart:.2g}")
    return "same routers within 1e-6"


HARMS = [kill_the_only_one, ask_the_only_one, kill_one_of_two, kill_both, ask_both, stop_one_of_two, fill_the_disk,
         take_the_write_bit, change_the_data, truncate_a_file, change_the_ranks]


# -----------------------------------------------------------------------------
# Under torchrun


def workers(launcher: int) -> list[int]:
    """Its children that run train.py."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True).stdout
    return [int(word) for word in listed.split()]


def launch(bench: Bench, out: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3",
               "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(ROOT / "train.py")]
    command += bench.words(out, rank_timeout=0.5)  # minutes: a worker's imports take some seconds
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as sink:
        return subprocess.Popen(command, stdout=sink, stderr=sink, env=env, start_new_session=True)


def harm_a_launch(bench: Bench, out: Path, log: Path, what: str) -> str:
    """A worker that is killed or hangs: torchrun ends by itself with the same routers. The launcher: as ever."""
    process = launch(bench, out, log)
    until = time.monotonic() + TIMEOUT
    while not list(out.glob("checkpoint.safetensors")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    time.sleep(bench.draw.uniform(0.0, 0.5 * bench.seconds[2]))
    own, all_of_them = bench.draw.randrange(2), workers(process.pid)
    if what == "launcher":
        process.send_signal(bench.draw.choice([signal.SIGKILL, signal.SIGTERM]))
    elif len(all_of_them) > own:
        os.kill(all_of_them[own], signal.SIGKILL if what == "killed worker" else signal.SIGSTOP)
    try:
        code = process.wait(3 * TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise Failed(f"hung:\n{log.read_text()}") from None
    if what == "launcher":
        for pid in all_of_them:  # orphans end by themselves, or stand in nobody's way
            wait_for_orphan(pid)
        return finish(bench, out, 2, log)
    if code or (out / "routers.safetensors").read_bytes() != bench.expected[2]:
        raise Failed(f"torchrun ended with {code}:\n{log.read_text()}")
    return "same routers"


def wait_for_orphan(pid: int) -> None:
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until and Path(f"/proc/{pid}").exists():
        time.sleep(0.1)


# -----------------------------------------------------------------------------
# All of them


def prepare(folder: Path, seed: int) -> Bench:
    folder.chmod(0o755)
    base, rows = write_base(folder / "base"), []
    for i in range(44):
        ask, answer = "add " + "x" * (i % 7), "yes " * (1 + i % 3)
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "split": "heldout" if i % 5 == 0 else "train"})
    data = write_jsonl(folder / "data.jsonl", rows)
    bench = Bench(folder, base, data, random.Random(seed), {}, {})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.train(runtime.cli(train.TrainConfig, bench.words(folder / "warm")))  # imports, once for all forks
    for ranks in (1, 2):
        out, started = folder / f"whole{ranks}", time.monotonic()
        codes = wait(start(bench.words(out), folder / "log", ranks))
        bench.seconds[ranks] = time.monotonic() - started
        if any(codes):
            raise Failed(shown(folder / "log", ranks))
        bench.expected[ranks] = (out / "routers.safetensors").read_bytes()
    print(f"unharmed: {bench.seconds[1]:.1f} s on one rank, {bench.seconds[2]:.1f} s on two", flush=True)
    return bench


def attempt(bench: Bench, number: int, name: str, harm: Callable[[Path, Path], str], counts: Counter) -> None:
    out, log = bench.folder / f"out{number}", bench.folder / "log"
    started = time.monotonic()
    try:
        outcome = harm(out, log)
    except Failed as error:
        outcome = "FAILED"
        print(f"trial {number}: {name}: {error}", flush=True)
    counts[name, outcome] += 1
    print(f"trial {number}: {name}: {outcome}, {time.monotonic() - started:.1f} s", flush=True)
    shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    settings = runtime.cli(Settings)
    counts = Counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(Path(folder), settings.seed)
        for number in range(settings.trials):
            harm = HARMS[number % len(HARMS)]
            attempt(bench, number, harm.__name__, lambda out, log, harm=harm: harm(bench, out, log), counts)
        for number in range(settings.launcher):
            what = ("killed worker", "hanging worker", "launcher")[number % 3]
            how = lambda out, log, what=what: harm_a_launch(bench, out, log, what)  # noqa: E731
            attempt(bench, settings.trials + number, f"torchrun, {what}", how, counts)
    print(f"\n{sum(counts.values())} trials, seed {settings.seed}")
    for (name, outcome), count in sorted(counts.items()):
        print(f"{name:28} {outcome:44} {count}")
    sys.exit(any(outcome == "FAILED" for _, outcome in counts))


if __name__ == "__main__":
    main()
