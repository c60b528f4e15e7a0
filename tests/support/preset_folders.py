"""Folders of preset files to write into and to load."""

import json

import pytest

from shared.app.presets import load_presets
from shared.quant.errors import UserError

HUB = "https://huggingface.co/someone/weights/resolve/main/"
QWEN = "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main/Qwen3/"


class Folders:
    """A defaults and a finetunes folder to write presets into."""

    def __init__(self, root, families):
        self.families = families
        self.defaults, self.finetunes = root / "defaults", root / "finetunes"
        self.defaults.mkdir()
        self.finetunes.mkdir()

    def default(self, preset_id, model=None, **settings):
        return self._write(self.defaults, preset_id, model, settings)

    def finetune(self, preset_id, model=None, **settings):
        return self._write(self.finetunes, preset_id, model, settings)

    def load(self):
        return load_presets([self.defaults, self.finetunes], self.families)

    def _write(self, folder, preset_id, model, settings):
        path = folder / f"{preset_id}.json"
        model = {"name": preset_id, "architecture": "z_image", "URLs": [f"{HUB}{preset_id}_bf16.safetensors"]} | (
            model or {}
        )
        model = {key: value for key, value in model.items() if value is not ...}
        path.write_text(json.dumps({"model": model, **settings}, indent=4), encoding="utf-8")
        return path


def mistake(folders, write):
    """The message for one and the same mistake in defaults/ (raised) and in finetunes/ (a problem, file left out)."""
    path = write(folders.finetune)
    collection = folders.load()
    assert path.stem not in collection.presets
    (problem,) = [line for line in collection.problems if str(path) in line]
    with pytest.raises(UserError) as shown:
        collection.get(path.stem)
    assert str(shown.value) in problem
    path.unlink()

    path = write(folders.default)
    with pytest.raises(UserError, match=f"^{path.parent}") as raised:
        folders.load()
    assert str(shown.value).replace(str(folders.finetunes), str(folders.defaults)) == str(raised.value)
    return str(raised.value)
