"""Phases that go on where a killed run left them.  Run: python -m pytest tests/test_journal.py"""

import dataclasses

import pytest
import torch
from tuning import CPU, settings

import train
from recipe import journal
from recipe.journal import Journal, once

SAME = {"lr": 0.1}


def answers(folder, n: int, made: list, *, rt=CPU, about=SAME, stop=None) -> list:
    """What n questions get; `made` collects those that were computed. stop: killed when that one is asked."""
    found = []

    def make(number):
        if number == stop:
            raise KeyboardInterrupt
        made.append(number)
        return torch.full((2,), number / 3), torch.arange(number)

    with Journal(folder, "start", about, rt, seconds=0.0):
        for number in range(n):
            found.append(once(lambda: make(number)))
    return found


def test_what_was_answered_is_not_asked_again(tmp_path):
    first, second = [], []
    with pytest.raises(KeyboardInterrupt):
        answers(tmp_path, 7, first, stop=4)
    found = answers(tmp_path, 7, second)
    assert first == [0, 1, 2, 3] and second == [4, 5, 6]
    expected = answers(tmp_path / "new", 7, [])
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("change", [{"about": {"lr": 0.2}}, {"rt": dataclasses.replace(CPU, world_size=2)}])
def test_answers_of_another_run_are_not_taken(tmp_path, change):
    answers(tmp_path, 3, [])
    made = []
    answers(tmp_path, 3, made, **change)
    assert made == [0, 1, 2]


def test_a_damaged_file_costs_its_own_answers_only(tmp_path, capsys):
    answers(tmp_path, 5, [])
    for number, cut in ((1, 0), (3, 20)):
        path = tmp_path / f"start-rank0-{number:05}.safetensors"
        path.write_bytes(path.read_bytes()[:cut])
    made = []
    answers(tmp_path, 5, made)
    assert made == [1, 3] and capsys.readouterr().out.count("computed again") == 2


def test_without_a_journal_everything_is_computed():
    assert torch.equal(once(lambda: [torch.ones(2)])[0], torch.ones(2))


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_a_run_killed_within_its_phases_goes_on_there(base, tmp_path, monkeypatch, recipe):
    """Killed in three or four places, before and after the steps: the same routers, and no part is computed twice."""
    monkeypatch.setattr(journal, "SECONDS", 0.0)
    answer, computed = Journal.answer, []

    def counted(self, make):
        def killing():
            if killing_at and len(computed) >= killing_at[0]:
                del killing_at[0]
                raise KeyboardInterrupt
            computed.append(self.stem.name)
            return make()

        return answer(self, killing)

    monkeypatch.setattr(Journal, "answer", counted)
    killing_at = []
    train.train(settings(base, tmp_path / "whole", recipe=recipe, steps=2))
    parts, killing_at = len(computed), list(range(3, len(computed), len(computed) // 3))
    computed.clear()
    while killing_at:
        with pytest.raises(KeyboardInterrupt):
            train.train(settings(base, tmp_path / "killed", recipe=recipe, steps=2))
    summary = train.train(settings(base, tmp_path / "killed", recipe=recipe, steps=2))
    assert len(computed) == parts > 10 and {"start-rank0", "end-rank0"} == set(computed)
    ends = [(tmp_path / name / "routers.safetensors").read_bytes() for name in ("whole", "killed")]
    assert ends[0] == ends[1] and not (tmp_path / "killed/progress").exists() and summary["steps"] == 2
