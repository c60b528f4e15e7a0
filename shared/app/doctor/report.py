"""What the doctor finds: plain values, as the report and its JSON show them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from shared.app.advice import Advice
from shared.app.kernel_report import KernelChoice


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong. broken: pictures cannot be drawn until it is mended; else a warning."""

    what: str
    to_do: str
    broken: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemFacts:
    """Memory and disk in bytes, None where the system does not tell. checkpoints: where downloads go."""

    python: str
    os: str
    ram: int | None
    checkpoints: str
    disk_free: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFacts:
    """build: "CPU", "CUDA 13.0", "ROCm 7.0" or "Metal". driver: NVIDIA's, "" without one."""

    version: str
    build: str
    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What is computed on. capability: "8.9", "" where there is none. memory: bytes.

    between: what computes between matrix products, and why not something faster.
    """

    kind: str
    name: str
    capability: str
    memory: int | None
    reason: str
    dtype: str
    dtype_reason: str
    between: str


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """One way to compute attention, and why it can or cannot be used here."""

    name: str
    usable: bool
    reason: str


@dataclass(frozen=True, slots=True)
class LibraryFacts:
    """version: "" where the library is not installed."""

    name: str
    version: str
    needed: bool
    purpose: str


@dataclass(frozen=True, slots=True)
class NunchakuFacts:
    """Whether the package called nunchaku is the SVDQuant engine or the unrelated one of the same name."""

    state: Literal["absent", "engine", "impostor"]
    version: str
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """The picture drawn to see whether drawing works. seconds: with loading; words: what came out, or what failed."""

    passed: bool
    seconds: float
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings. device and what follows from it are None or empty when torch cannot be used."""

    system: SystemFacts
    torch: TorchFacts | None
    device: DeviceFacts | None
    kernels: tuple[KernelChoice, ...] = ()
    attention: tuple[AttentionFacts, ...] = ()
    libraries: tuple[LibraryFacts, ...] = ()
    nunchaku: NunchakuFacts
    advice: Advice | None = None
    self_test: SelfTest | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether nothing is broken."""
        return not any(problem.broken for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with `usable`."""
        return {"usable": self.usable} | asdict(self)
