import io

from rich.console import Console

from fusedlm.train import train, trainer
from fusedlm.train.slowdown import Slowdown
from tests.train.runs import SHORT, tiny_recipe


def notes(times, load=8.0):
    watch = Slowdown(cores=2, load=lambda: load)
    return [(i, note) for i, seconds in enumerate(times) if (note := watch.step(seconds)) is not None]


def test_a_collapse_is_told_once_with_its_cause():
    [(at, note)] = notes([0.5] * 20 + [4.0] * 30)
    assert at == 24
    assert note.startswith("steps take 4 s, usually 0.5 s; 8 threads want the 2 cores")


def test_no_cause_is_named_without_load():
    [(_, note)] = notes([0.5] * 20 + [4.0] * 30, load=1.5)
    assert note == "steps take 4 s, usually 0.5 s"


def test_a_second_collapse_is_told_again():
    assert [at for at, _ in notes([0.5] * 20 + [4.0] * 10 + [0.5] * 10 + [4.0] * 10)] == [24, 44]


def test_single_slow_steps_and_slow_drift_are_not_told():
    assert notes(([0.5] * 9 + [5.0]) * 10) == []
    assert notes([0.5 * 1.02**i for i in range(200)]) == []


def test_training_shows_the_note(tmp_path, monkeypatch):
    class Always:
        def step(self, seconds):
            return f"slow: {seconds > 0}"

    monkeypatch.setattr(trainer, "Slowdown", Always)
    output = io.StringIO()
    train(tiny_recipe(tmp_path, *SHORT), tmp_path / "run", console=Console(file=output, width=200))
    assert output.getvalue().count("slow: True\n") == 3
