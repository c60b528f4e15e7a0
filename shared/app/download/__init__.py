"""Where weights files are: found on this machine first, downloaded into the first root when missing.

Files are found by their names, as in Wan2GP, so that its folders and ComfyUI's can be used. Repositories share names,
though (`z_image_turbo_nvfp4.safetensors` is two different files), so the origin of every download is remembered in
.cache/origins.json: a file that is known to come from elsewhere is never taken for another, and the other one is
downloaded into a folder of its repository's name. A file that somebody else put there has no known origin; it is taken
by its name, and `locate` says so.

Rooms: store.py (all of it), finding.py (what is here), names.py, listing.py, remembered.py (origins and hashes).
The download itself is hub/'s.
"""

from shared.app.download.finding import Located, default_hub_cache
from shared.app.download.store import FileStore
from shared.app.hub import DownloadCancelled, DownloadProgress

__all__ = ["DownloadCancelled", "DownloadProgress", "FileStore", "Located", "default_hub_cache"]
