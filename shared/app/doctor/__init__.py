"""`doctor`: what this machine has, what is wrong with it, which preset to use, and whether a picture can be drawn.

    examine(ctx)          facts, problems and advice; imports torch and nothing heavier
    examine(..., self_test=True)   draws one picture with the weights that come with the program, too

Everything is a frozen dataclass of plain values; `Report.as_dict()` is the JSON.

Rooms: software.py, nunchaku.py, device_facts.py and self_test.py look, problems.py judges, report.py is what comes of
it, examination.py goes through them all.
"""

from shared.app.doctor.examination import examine
from shared.app.doctor.report import (
    AttentionFacts,
    DeviceFacts,
    LibraryFacts,
    NunchakuFacts,
    Problem,
    Report,
    SelfTest,
    SystemFacts,
    TorchFacts,
)

__all__ = [
    "AttentionFacts",
    "DeviceFacts",
    "LibraryFacts",
    "NunchakuFacts",
    "Problem",
    "Report",
    "SelfTest",
    "SystemFacts",
    "TorchFacts",
    "examine",
]
