"""The plots of the probes show their results."""

import numpy as np
import pytest

from fusedlm.probes import plots
from fusedlm.report.style import PALETTE


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Plots are figures, not yet drawn."""
    monkeypatch.setattr(plots, "png", lambda figure: figure)


def series(axes) -> dict[str, tuple[list, list, str]]:
    """label -> x, y, colour."""
    return {line.get_label(): (*map(list, line.get_data()), line.get_color()) for line in axes.lines}


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_extend_shows_each_curve_averaged_over_a_training_length():
    """Of length 8 in two buckets; the second has three times the bytes of the first."""
    curves = [{"yarn": None, "bpb": [4.0, 2.0, 3.0, 1.0]}, {"yarn": 2.0, "bpb": [4.0, 4.0, 4.0, 4.0]}]
    result = {"trained_length": 8, "max_multiple": 2, "ends": [4, 8, 12, 16], "bytes": [10, 30] * 2, "curves": curves}
    (axes,) = plots.extend_plot(result).axes
    found = series(axes)
    x, y, colour = found["unstretched"]
    assert x == [1.0, 1.5, 2.0] and y == pytest.approx([(4 + 3 * 2) / 4, (3 * 2 + 3) / 4, (3 + 3 * 1) / 4])
    assert found["YaRN, factor 2"][1] == pytest.approx([4.0] * 3)
    assert (colour, found["YaRN, factor 2"][2]) == PALETTE[:2]
    assert legend(axes) == list(found) and "8 tokens" in axes.get_xlabel()
    low, high = axes.get_ylim()
    assert low < 1.5 and high > 4.0


@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_recall_shows_the_accuracy_of_each_model_and_of_guessing(names):
    accuracies = {"one": [1.0, 0.75], "two": [0.5, 0.25]}
    results = {
        name: [
            {"pairs": pairs, "accuracy": accuracy, "guess": 1 / pairs}
            for pairs, accuracy in zip((2, 8), accuracies[name], strict=True)
        ]
        for name in names
    }
    (axes,) = plots.recall_plot(results).axes
    found = series(axes)
    assert list(found) == legend(axes) == [*names, "guessing a value"]
    for index, name in enumerate(names):
        assert found[name] == ([2, 8], accuracies[name], PALETTE[index])
    assert found["guessing a value"][:2] == ([2, 8], [0.5, 0.125])
    assert axes.get_ylim() == (0, 1) and axes.get_xscale() == "log"


def needles(accuracies: list[list[float]]) -> dict:
    """A result of two depths and three lengths; the gain is twice the accuracy."""
    cells = [
        {"length": 8 * (i + 1), "depth": depth, "accuracy": accuracy, "gain": 2 * accuracy}
        for depth, row in zip((0.0, 0.5), accuracies, strict=True)
        for i, accuracy in enumerate(row)
    ]
    return {"trained_length": 8, "cells": cells[::-1]}


A, B = [[1.0, 0.5, 0.25], [0.75, 0.0, 0.5]], [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


def test_needles_of_one_model_are_its_accuracy_and_its_gain():
    accuracy, gain = plots.needle_plot({"one": needles(A)}).axes
    assert [axes.get_title() for axes in (accuracy, gain)] == ["Accuracy", "Gain, nats per token"]
    for axes, factor, written in ((accuracy, 1, "{:.0%}"), (gain, 2, "{:.1f}")):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), factor * np.array(A))
        assert image.get_clim() == (0, factor)
        texts = {tuple(map(round, text.get_position())): text.get_text() for text in axes.texts}
        assert texts == {(x, y): written.format(factor * A[y][x]) for x in range(3) for y in range(2)}
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1×", "2×", "3×"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "50%"]


def test_needles_of_several_models_are_the_accuracy_of_each():
    every = plots.needle_plot({name: needles(B if name == "b" else A) for name in "abcd"}).axes
    assert [axes.get_title() for axes in every if axes.axison] == list("abcd")
    np.testing.assert_array_equal(every[1].images[0].get_array(), B)
    np.testing.assert_array_equal(every[3].images[0].get_array(), A)
