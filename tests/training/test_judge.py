"""The judge's table counts what was promised, and nothing else."""

from training.captions import Caption, Promise
from training.checker import Verdict
from training.judge import held_out_captions, shares

KEPT = {"ground": True, "colour": True, "kind": True, "size": True, "place": True, "count": True}


def test_unpromised_attributes_do_not_lift_the_shares() -> None:
    told = Caption("a red star", "white", (Promise("star", "red", None, None),))
    silent = Caption("a shape", None, (Promise(None, None, None, None),))

    report = shares([told, silent, silent], [Verdict(**(KEPT | {"colour": False})), Verdict(**KEPT), Verdict(**KEPT)])

    assert report["all"]["colour"] == 0.0
    assert report["all"]["ground"] == 1.0
    assert report["all"]["everything"] == 0.6667


def test_judge_uses_the_same_captions_for_the_same_seed() -> None:
    first, second = held_out_captions(30, 5), held_out_captions(30, 5)

    assert first == second
    assert sum(len(c.shapes) == 2 for c in first) == 10
    assert sum(c.is_complete for c in first) >= 15
