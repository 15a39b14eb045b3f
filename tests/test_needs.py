"""What a run says it will need.  Run: python -m pytest tests/test_needs.py"""

import re
from dataclasses import replace

import pytest
import tiny
import torch
from tuning import CPU, begun, settings

import train
from model import Transformer
from recipe.needs import disk_needed, kept_elements, seconds_per_example
from recipe.passes import Workload
from recipe.lora import let_train
from router import RouterConfig


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("first", [0, 3])
def test_kept_elements_are_what_autograd_keeps(first, recompute):
    config, kept = replace(tiny.CONFIG, n_layers=8, dim=64, hidden_dim=160, head_dim=16), {}
    model = Transformer(config, RouterConfig.of("attn_sequence", range(first, 8)))
    let_train(model, "routers")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = torch.randn(3, 40, config.dim)

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes() // tensor.element_size(), tensor)  # held: none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.hidden(None, x=x, first_layer=first, route="mask", recompute=recompute)
    found, expected = sum(size for size, _ in kept.values()), kept_elements(config, first, 3 * 40, recompute)
    if recompute:  # what one block keeps meanwhile is not seen from outside
        expected -= kept_elements(config, 7, 3 * 40, False)
    assert found == pytest.approx(expected, rel=0.35)


def test_disk_and_time_grow_with_the_data(base):
    run = begun(base)
    some, all_of_them = run.data.train[:5], run.data.train
    assert disk_needed(run.model, some, 1e9, 0) < disk_needed(run.model, all_of_them, 1e9, 0) < 1e9
    assert disk_needed(run.model, all_of_them, 1000.0, 0) == 1000
    assert 0 < seconds_per_example(Workload(run.model, some, CPU), 2) < 1


def test_a_run_says_what_it_needs_before_its_first_phase(base, tmp_path, capsys):
    train.train(settings(base, tmp_path, steps=1))
    shown = capsys.readouterr()
    needs = re.search(r"needs about: [\d.]+ GB of memory a rank, up to [\d.]+ GB of disk in \S+ \([\d,.]+ GB are "
                      r"free\), [\d,.]+ minutes \(an example takes [\d.]+ s forward, measured\)", shown.out)
    assert needs and shown.out.index("needs about") < shown.out.index("cost of skipping")
