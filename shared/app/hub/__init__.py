"""One file of the Hugging Face Hub: its address, and its download, resumed and verified.

huggingface_hub looks the file up and carries the request (login, proxy, mirror, offline mode). The transfer
itself is here, because hf_hub_download (2.4) starts a cut download from zero in the next run and compares
only the length. Here the bytes go to "<name>.<hash>.part" beside the target, a later run goes on behind them,
and the file gets its name only after its hash has been compared with the one that the Hub states.

Rooms: address.py, look_up.py (what the Hub states), transfer.py (the bytes), explain.py (errors in words), progress.py
(what is told on the way), one_file.py (all of it in order).
"""

from shared.app.hub.address import HubFile, by_hand, hub_endpoint, parse_hub_url
from shared.app.hub.one_file import download, received_bytes
from shared.app.hub.progress import DownloadCancelled, DownloadProgress, OnProgress, ShouldStop

__all__ = [
    "DownloadCancelled",
    "DownloadProgress",
    "HubFile",
    "OnProgress",
    "ShouldStop",
    "by_hand",
    "download",
    "hub_endpoint",
    "parse_hub_url",
    "received_bytes",
]
