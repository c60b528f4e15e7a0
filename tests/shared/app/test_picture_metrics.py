"""Distances between pictures, against values that scikit-image 0.26.0 computed for the same pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shared.app.picture_metrics import correlation, psnr, relative_error, ssim


@pytest.fixture
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Ramps and a product pattern, and the same with a ripple of up to 15 levels; 56 x 40 pixels."""
    y, x = np.mgrid[0:40, 0:56]
    plain = np.stack([(x * 4) % 256, (y * 6) % 256, (x * y) % 256], -1).astype(np.uint8)
    ripple = ((x * 7 + y * 13) % 31 - 15)[..., None]
    return plain, np.clip(plain.astype(int) + ripple, 0, 255).astype(np.uint8)


def test_ssim_and_psnr_are_those_of_scikit_image(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    plain, rippled = pictures

    # structural_similarity(..., gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2)
    assert ssim(rippled, plain) == pytest.approx(0.7787431021840888, abs=1e-12)
    # peak_signal_noise_ratio(plain, rippled)
    assert psnr(rippled, plain) == pytest.approx(29.244654998907748, abs=1e-12)


def test_equal_pictures_are_infinitely_close(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    plain, _ = pictures

    assert psnr(plain, plain) == math.inf
    assert ssim(plain, plain) == 1.0


def test_a_picture_too_small_for_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(np.zeros((10, 40, 3), np.uint8), np.zeros((10, 40, 3), np.uint8))


def test_correlation_ignores_size_and_offset_of_a_change() -> None:
    change = np.array([1.0, -2.0, 3.0, 0.5])

    assert correlation(3 * change + 7, change) == pytest.approx(1)
    assert correlation(-change, change) == pytest.approx(-1)
    assert correlation(np.zeros(4), change) is None


def test_relative_error_is_measured_against_the_reference() -> None:
    assert relative_error(np.array([3.0, 4.0]), np.array([0.0, 4.0])) == pytest.approx(0.75)
