"""The one place that says how close is equal: relative to the largest entry of the reference."""

import torch


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |found − expected| / max |expected|."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Equal within the tolerance of the found tensor's dtype, unless another one is given."""
    tolerance = TOLERANCE[found.dtype] if tolerance is None else tolerance
    assert found.shape == expected.shape
    error = relative_error(found, expected)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"
