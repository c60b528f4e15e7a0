"""Addresses on the Hugging Face Hub."""

import pytest

from shared.utils.hf import build_hf_url


@pytest.mark.parametrize(
    ("parts", "path"),
    [
        (("Qwen3", "a.safetensors"), "/Qwen3/a.safetensors"),
        (("", "a.safetensors"), "/a.safetensors"),
        (("/Qwen3/", "\\a.json"), "/Qwen3/a.json"),
        ((), ""),
    ],
)
def test_parts_are_joined_to_an_address_in_the_main_branch(parts, path):
    assert build_hf_url("owner/name/", *parts) == f"https://huggingface.co/owner/name/resolve/main{path}"
