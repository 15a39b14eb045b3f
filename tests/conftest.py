"""Put the project's root on sys.path, so that tests import its modules by their plain names.

Run all: python -m pytest
"""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # tiny models: a second thread costs more than it gains
# The first call pays for warm-up, hence no deadline; a run must be repeatable.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def one_thread_again():
    """Scripts set the number of threads, which moves last bits of whatever this process computes later."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint folder of four layers, which differ in how much they matter, with data.jsonl in it."""
    from tiny import write_base, write_jsonl

    folder, rows = write_base(tmp_path_factory.mktemp("base")), []
    for i in range(44):
        ask, answer = ("add " if i % 2 else "say ") + "x" * (i % 7), "yes " * (1 + i % 3)
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "split": "heldout" if i % 5 == 0 else "train"})
    write_jsonl(folder / "data.jsonl", rows)
    return folder
