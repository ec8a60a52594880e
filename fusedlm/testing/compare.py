"""Comparison by the relative error of a tensor."""

import torch


def error_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN anywhere gives NaN."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-300)).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: float, what: str = "value") -> None:
    """Fails unless the shapes agree and the error ratio is at most bound; NaN never passes."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    ratio = error_ratio(actual, expected)
    assert ratio <= bound, f"{what}: error ratio {ratio:.3e} exceeds {bound:.1e}"
