"""Addresses of files on the Hugging Face Hub (same name and arguments as in Wan2GP)."""

from __future__ import annotations

HUB = "https://huggingface.co"


def build_hf_url(repo_id: str, *path_parts: str) -> str:
    """Download address of a file in a repository's main branch; empty parts are skipped.

    ("owner/name", "folder", "a.json") -> "https://huggingface.co/owner/name/resolve/main/folder/a.json"
    """
    parts = [part.strip("/\\") for part in path_parts if part]
    return "/".join([HUB, repo_id.strip("/"), "resolve", "main", *parts])
