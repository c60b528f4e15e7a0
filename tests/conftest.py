"""Shared fixtures: no network, no telemetry, fixed seeds."""

from __future__ import annotations

import os
import random
import socket
import sys

import pytest

# Read when huggingface_hub, gradio and tokenizers are first imported, therefore before any test module is.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_IMPLICIT_TOKEN="1",  # a developer's own login is never sent to a test server
    GRADIO_ANALYTICS_ENABLED="False",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("HF_ENDPOINT", None)


@pytest.fixture(autouse=True)
def _only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches out of this machine fails with the address it tried."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0] if isinstance(address, tuple) else str(address)
            loopback = host in ("localhost", "::1") or host.startswith("127.")
            assert loopback, f"a test tried to connect to {address}"
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from seed 0; torch and NumPy only where a test module has imported them already."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
