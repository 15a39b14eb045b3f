"""Put the project's root on sys.path, so that tests import its modules by their plain names.  Run all: python -m pytest"""

import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # tiny models: a second thread costs more than it gains
settings.register_profile("project", deadline=None, derandomize=True)  # the first call pays for warm-up; a run must be repeatable
settings.load_profile("project")
