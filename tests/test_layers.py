"""Imports go down only: the layer table, no cycles, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1]

L0 = ("shared.quant", "shared.samplers", "shared.ops")
HOST_API = (
    "shared.utils.files_locator",
    "shared.utils.hf",
    "shared.RGB_factors",
)  # names that Wan2GP has too

# Package: what of ours it may import besides itself. "models.*" is one family.
MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "shared.quant": ("shared.ops",),
    "shared.samplers": (),
    "shared.ops": (),
    "shared.utils": (),
    "shared.RGB_factors": (),
    "shared.preprocess": L0,
    "models": (),
    "models.*": (*L0, *HOST_API),
    "shared.app": (
        *L0,
        "shared.utils",
        "shared.RGB_factors",
        "shared.preprocess",
    ),  # models by name only, through the handler
    "shared.cli": ("shared.app", "shared.bench", *L0),
    "shared.ui": ("shared.app", *L0),
    "shared.bench": ("shared.app", *L0),
    "shared.tools": ("shared.app", *L0),
    "training": ("models", "shared.preprocess", *L0),
    "wgp": ("shared.cli", "shared.ui", "shared.app", *L0),
    "run": (),
}

# Third-party package: the only places that may import it. mmgp replaces functions of safetensors when it is
# imported and has a licence of its own (NOTICE); gradio belongs to the page. z_image_main tells the step number
# to a host's LoRAs, which mmgp holds: inside a function that does nothing elsewhere. The benchmark opens a file with
# it, in a process of its own.
ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "mmgp": ("shared.app.mmgp_engine", "models.z_image.z_image_main", "models.z_image.bench.opening"),
    "gradio": ("shared.ui",),
}
NOT_AT_LOAD: Mapping[str, tuple[str, ...]] = {"mmgp": ("models.z_image.z_image_main", "models.z_image.bench.opening")}
NEVER_IN: Mapping[str, tuple[str, ...]] = {"torch": ("shared.ui",)}

# "presets" and "--help" answer in half a second: what they load may import these only inside functions.
HEAVY = frozenset({"torch", "transformers", "diffusers", "accelerate", "mmgp", "gradio", "comfy_kitchen", "optimum"})
LIGHT = (
    "wgp",
    "shared.cli",
    "shared.app.context",
    "shared.app.download",
    "shared.app.families",
    "shared.app.presets",
    "shared.app.settings",
    "shared.quant.errors",
    "shared.utils",
)
HANDLERS = "_handler"  # models/<family>/<family>_handler.py


@dataclass(frozen=True)
class Import:
    module: str  # imported name, "package.module" or "package.module.thing"
    line: int
    at_load: bool  # executed when the importing module is loaded, not inside a function


def problems(root: Path) -> list[str]:
    """Every breach of the rules in a source tree, one line each."""
    sources = dict(_sources(root))
    imports = {module: list(_imports(module, path)) for module, path in sources.items()}
    load_graph = {
        module: {target for found in imports[module] if found.at_load and (target := _ours(found, sources))}
        for module in sources
    }
    return sorted([*_layer_breaches(imports, sources), *_cycles(load_graph), *_heavy_loads(imports, load_graph)])


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    folders = ("models", "shared", "training")
    for path in [*root.glob("*.py"), *(path for folder in folders for path in (root / folder).rglob("*.py"))]:
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(module: str, path: Path) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for name in names:
                    yield Import(name.name, node.lineno, at_load)
            case ast.ImportFrom(module=source, names=names, level=level):
                base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                prefix = ".".join([*base, *([source] if source else [])])
                for name in names:
                    yield Import(f"{prefix}.{name.name}", node.lineno, at_load)
            case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"), orelse=orelse):
                yield from (found for child in node.body for found in visit(child, False))
                yield from (found for child in orelse for found in visit(child, at_load))
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from (found for child in ast.iter_child_nodes(node) for found in visit(child, False))
            case _:
                yield from (found for child in ast.iter_child_nodes(node) for found in visit(child, at_load))

    return visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), True)


def _ours(found: Import, sources: Mapping[str, Path]) -> str | None:
    """The module of ours that an import loads: the name itself, or the module it takes a thing from."""
    if found.module in sources:
        return found.module
    parent = found.module.rpartition(".")[0]
    return parent if parent in sources else None


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _package(module: str) -> str | None:
    """The entry of MAY_IMPORT that a module belongs to."""
    parts = module.split(".")
    if parts[0] == "models":
        return "models" if len(parts) == 1 else "models.*"
    name = ".".join(parts[:2]) if parts[0] == "shared" else parts[0]
    return name if name in MAY_IMPORT else None


def _layer_breaches(imports: Mapping[str, list[Import]], sources: Mapping[str, Path]) -> Iterator[str]:
    for module, found_imports in imports.items():
        package = _package(module)
        if package is None:
            yield f"{module}: its package is not in the layer table"
            continue
        own = ".".join(module.split(".")[:2]) if package == "models.*" else package
        for found in found_imports:
            where, top = f"{module}:{found.line}", found.module.split(".")[0]
            target = _ours(found, sources)
            if target is not None and not _within(target, (own, *MAY_IMPORT[package])):
                yield f"{where}: {package} may not import {target}"
            if top in ONLY_IN and not _within(module, ONLY_IN[top]):
                yield f"{where}: only {', '.join(ONLY_IN[top])} may import {top}"
            if top in NOT_AT_LOAD and _within(module, NOT_AT_LOAD[top]) and found.at_load:
                yield f"{where}: {module} may import {top} inside functions only"
            if top in NEVER_IN and _within(module, NEVER_IN[top]):
                yield f"{where}: {package} may not import {top}"


def _cycles(load_graph: Mapping[str, set[str]]) -> Iterator[str]:
    graph = {module: targets - {module} for module, targets in load_graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "import cycle: " + " -> ".join(reversed(error.args[1]))


def _heavy_loads(imports: Mapping[str, list[Import]], load_graph: Mapping[str, set[str]]) -> Iterator[str]:
    """Heavy packages loaded by importing a light module, with the module that does it."""
    for light in sorted(module for module in imports if _within(module, LIGHT) or module.endswith(HANDLERS)):
        reached, waiting = {light}, [light]
        while waiting:
            fresh = load_graph[waiting.pop()] - reached
            reached |= fresh
            waiting += fresh
        for module in sorted(reached):
            for found in imports[module]:
                if found.at_load and found.module.split(".")[0] in HEAVY:
                    by = "" if module == light else f" (through {module})"
                    yield f"{light}: loads {found.module.split('.')[0]} when imported{by}"


# ---------------------------------------------------------------------------------------------- the real tree


@functools.cache
def _problems_here() -> list[str]:
    return problems(PROGRAM)


def test_imports_go_down_only() -> None:
    assert _problems_here() == []


# ---------------------------------------------------------------------------------------------- the rules see


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"shared/quant/a.py": "import shared.app.b", "shared/app/b.py": ""},
            ["shared.quant may not import"],
        ),
        (
            {"shared/quant/a.py": "from shared.app import b", "shared/app/b.py": ""},
            ["may not import shared.app.b"],
        ),
        (
            {"shared/quant/a.py": "def f():\n    from ..app import b", "shared/app/b.py": ""},
            ["a:2: shared.quant"],
        ),
        ({"models/x/m.py": "import models.y.n", "models/y/n.py": ""}, ["models.* may not import models.y.n"]),
        ({"models/x/m.py": "import shared.utils.other", "shared/utils/other.py": ""}, ["may not import"]),
        (
            {"shared/app/a.py": "import models.x.m", "models/x/m.py": ""},
            ["shared.app may not import models.x.m"],
        ),
        (
            {"shared/ui/a.py": "import shared.cli.b", "shared/cli/b.py": ""},
            ["shared.ui may not import shared.cli"],
        ),
        ({"shared/ui/a.py": "def f():\n    import torch"}, ["shared.ui may not import torch"]),
        (
            {"shared/app/a.py": "def f():\n    import mmgp.offload"},
            ["only shared.app.mmgp_engine"],
        ),
        ({"models/z_image/z_image_main.py": "import mmgp"}, ["may import mmgp inside functions only"]),
        ({"shared/app/a.py": "import gradio"}, ["only shared.ui may import gradio"]),
        ({"shared/new/a.py": ""}, ["its package is not in the layer table"]),
        (
            {"shared/app/a.py": "import shared.app.b", "shared/app/b.py": "import shared.app.a"},
            ["import cycle"],
        ),
        (
            {"shared/cli/a.py": "from shared.app import b", "shared/app/b.py": "import torch.nn"},
            ["shared.cli.a: loads torch when imported (through shared.app.b)"],
        ),
        ({"models/x/x_handler.py": "import transformers"}, ["models.x.x_handler: loads transformers"]),
    ],
)
def test_a_breach_is_seen(tmp_path: Path, files: Mapping[str, str], expected: list[str]) -> None:
    found = problems(_tree(tmp_path, files))

    assert len(found) == len(expected)
    assert all(words in problem for words, problem in zip(expected, found, strict=True)), found


@pytest.mark.parametrize(
    "files",
    [
        {"shared/app/a.py": "import shared.quant.b", "shared/quant/b.py": "import torch"},
        {"models/x/m.py": "from shared.utils.hf import build_hf_url", "shared/utils/hf.py": ""},
        {"shared/cli/a.py": "def f():\n    import torch"},
        {"training/a.py": "import training.b, models.x.m", "training/b.py": "", "models/x/m.py": ""},
        {"shared/cli/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"},
        {"shared/app/mmgp_engine.py": "import mmgp"},
        {"shared/app/a.py": "import shared.app.b", "shared/app/b.py": "def f():\n    import shared.app.a"},
        {"shared/app/__init__.py": "", "shared/app/a.py": "from . import b", "shared/app/b.py": ""},
    ],
)
def test_what_is_allowed_is_left_alone(tmp_path: Path, files: Mapping[str, str]) -> None:
    assert problems(_tree(tmp_path, files)) == []


def _tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root
