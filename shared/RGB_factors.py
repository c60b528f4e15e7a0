"""Linear maps from latents to preview colours (same name and arguments as in Wan2GP)."""

from __future__ import annotations

# Red, green, blue per latent channel of the Flux VAE, which Z-Image shares.
# Figures: ComfyUI, comfy/latent_formats.py, class Flux.
_FLUX_FACTORS = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
_FLUX_BIAS = (-0.0329, -0.0718, -0.0851)


def get_rgb_factors(
    model_family: str, model_type: str | None = None, sub_family: str | None = None
) -> tuple[list[list[float]] | None, list[float] | None]:
    """(factors: channels x 3, bias: 3) of a family's latent space, or (None, None) where none is known.

    preview = latents @ factors + bias, in [-1, 1]. `sub_family` names a family's other latent space (Wan2GP:
    "flux2").
    """
    if model_family == "flux" and sub_family is None:
        return [list(row) for row in _FLUX_FACTORS], list(_FLUX_BIAS)
    return None, None
