"""Preview colours."""

from shared.RGB_factors import get_rgb_factors


def test_flux_factors_are_comfyuis():
    factors, bias = get_rgb_factors("flux")

    # first and last rows and the sum of comfy/latent_formats.py, class Flux
    assert (factors[0], factors[15]) == ([-0.0346, 0.0244, 0.0681], [-0.1262, -0.0982, -0.0778])
    assert bias == [-0.0329, -0.0718, -0.0851]
    assert round(sum(map(sum, factors)), 4) == 0.2563


def test_a_caller_may_change_its_copy():
    get_rgb_factors("flux")[0][0][0] = 9.0

    assert get_rgb_factors("flux")[0][0][0] == -0.0346


def test_other_latent_spaces_have_no_preview_colours():
    assert get_rgb_factors("wan") == (None, None)
    assert get_rgb_factors("flux", sub_family="flux2") == (None, None)
