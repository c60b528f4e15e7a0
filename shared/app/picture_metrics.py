"""How far two pictures are apart: PSNR, SSIM, and how alike two changes of a picture are.

    PSNR = 10 log10(255^2 / mean squared difference), in dB: 40 and more is hard to see, below 25 is another picture
    SSIM = mean over pixels and channels of
           (2 mx my + c1)(2 sxy + c2) / ((mx^2 + my^2 + c1)(sx^2 + sy^2 + c2)), c1 = (0.01 * 255)^2, c2 = (0.03 * 255)^2
           m, s: means, variances and covariance under an 11 x 11 Gaussian window of sigma 1.5

Source of SSIM: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", IEEE TIP 13(4), 2004. The five pixels at
each border, where the window has no full support, are left out, as in scikit-image's `structural_similarity` with
`gaussian_weights=True, sigma=1.5, use_sample_covariance=False`, whose values this gives.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import NDArray

PEAK = 255.0
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def psnr(picture: NDArray, reference: NDArray) -> float:
    """Decibels between uint8 pictures, (H, W, 3) or stacks of them; infinite when they are equal."""
    import numpy as np

    error = float(np.square(picture.astype(np.float64) - reference.astype(np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def ssim(picture: NDArray, reference: NDArray) -> float:
    """Structural similarity of two (H, W, 3) uint8 pictures of at least 11 pixels each way; 1 when they are equal."""
    import cv2
    import numpy as np

    if min(picture.shape[:2]) < _WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {_WINDOW} pixels each way, got {picture.shape}")

    def local_mean(values: NDArray) -> NDArray:
        border = _WINDOW // 2
        return cv2.GaussianBlur(values, (_WINDOW, _WINDOW), _SIGMA)[border:-border, border:-border]

    x, y = picture.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return float((likeness / ((mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2))).mean())


def correlation(change: NDArray, reference: NDArray) -> float | None:
    """Pearson's correlation of two arrays of numbers, -1 to 1; None when one of them is constant."""
    import numpy as np

    a, b = change.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else None


def relative_error(found: NDArray, reference: NDArray) -> float:
    """Norm of the difference over the norm of the reference."""
    import numpy as np

    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
