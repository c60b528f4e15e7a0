"""The first condition on the compute capability that holds decides about attention."""

import pytest

from shared.app.presets import attention_rule


@pytest.mark.parametrize(
    ("condition", "true_for", "false_for"),
    [
        ("<89", [75, 86], [89, 120]),
        (">=75&<90", [75, 89], [70, 90]),
        ("<=50+>89", [50, 90], [51, 89]),
        ("89", [89], [88, 90]),
        ("= 89 + 120", [89, 120], [100]),
    ],
)
def test_attention_conditions_compare_the_compute_capability(folders, condition, true_for, false_for):
    folders.default("z_image", {"attention": {condition: "sdpa"}})
    preset = folders.load().get("z_image")

    assert [attention_rule(preset, capability) for capability in true_for] == ["sdpa"] * len(true_for)
    assert [attention_rule(preset, capability) for capability in false_for] == [None] * len(false_for)


def test_the_first_attention_condition_that_holds_is_used_and_none_without_a_gpu(folders):
    folders.default("z_image", {"attention": {"<80": "sdpa", "<90": "sage", ">0": "flash"}})
    preset = folders.load().get("z_image")

    assert [attention_rule(preset, capability) for capability in (75, 86, 120)] == ["sdpa", "sage", "flash"]
    assert attention_rule(preset, None) is None
