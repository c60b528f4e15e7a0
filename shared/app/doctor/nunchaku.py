"""Whether the package called nunchaku is the SVDQuant engine or the unrelated one of the same name."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder

from shared.app.doctor.report import NunchakuFacts, TorchFacts
from shared.app.doctor.software import version_of

ENGINE_RELEASES = "https://github.com/nunchaku-tech/nunchaku/releases"


def nunchaku_facts(torch_facts: TorchFacts | None, search: Sequence[str] | None = None) -> NunchakuFacts:
    """Look for the package `nunchaku` without importing it. search: folders instead of sys.path, and no metadata.

    The engine is a compiled module `_C`; the package of that name on the package index, a statistics library, has none.
    """
    spec = PathFinder.find_spec("nunchaku", search)
    version = version_of("nunchaku") if search is None else ""
    if not version and (spec is None or spec.loader is None):  # a folder that merely has the name is no package
        return NunchakuFacts("absent", "", f"not installed, and not needed; {engine_words(torch_facts)}")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if places and PathFinder.find_spec("nunchaku._C", places) is not None:
        return NunchakuFacts("engine", version, "the SVDQuant engine is installed")
    words = (
        "the installed package nunchaku is an unrelated statistics package (it fits straight lines to curves), "
        f"not the SVDQuant engine; {engine_words(torch_facts)}"
    )
    return NunchakuFacts("impostor", version, words)


def engine_words(torch_facts: TorchFacts | None) -> str:
    """Where the genuine engine comes from, and how the file for this Python, torch and CUDA is named."""
    if torch_facts is None or not torch_facts.build.startswith("CUDA "):
        return "the engine needs a CUDA build of torch"
    torch_version = ".".join(torch_facts.version.split(".")[:2])
    cuda = torch_facts.build.removeprefix("CUDA ")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return (
        f"the engine's wheels are at {ENGINE_RELEASES}: the one for this machine, if there is one, is named like "
        f"nunchaku-<version>+cu{cuda}torch{torch_version}-{tag}-{tag}-{_wheel_platform()}.whl"
    )


def _wheel_platform() -> str:
    if sys.platform == "win32":
        return "win_amd64"
    return f"{sys.platform}_{platform.machine()}"
