"""The rules of the house: who may import what, and that the server can hold no secret."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

SOURCE = ROOT / "src" / "ciphertune"
FILES = sorted(SOURCE.rglob("*.py"))
TORCH = {"torch", "transformers", "peft", "datasets", "flwr_datasets", "tokenizers"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_each_file_imports_only_what_its_room_may(path: Path) -> None:
    room, found = path.relative_to(SOURCE).as_posix(), tops(path)
    if not room.startswith(("crypto/ckks", "crypto/packed")):
        assert "tenseal" not in found
    if not room.startswith(("lm/", "audit/")):
        assert not found & TORCH
    if not room.startswith("audit/"):
        assert not found & {"scipy", "rouge_score"}
    if room != "settings.py":
        assert not found & {"hydra", "omegaconf"}
    if room != "flower.py":
        assert "flwr" not in found
    if not room.startswith(("report/", "charts.py")):
        assert not found & {"jinja2", "matplotlib"}


@pytest.mark.parametrize("path", [*FILES, *sorted(ROOT.glob("*_app/*.py"))], ids=lambda p: p.name)
def test_no_file_is_longer_than_300_lines_and_none_unpickles(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    assert not tops(path) & {"pickle", "dill", "cloudpickle", "joblib"}
    assert not re.search(r"trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True", text)
    for call in re.findall(r"torch\.load\([^)]*\)", text):
        assert "weights_only=True" in call


def _server_modules() -> dict[str, list[str]]:
    """What the server loads once it has the public parts of every backend: module -> its names."""
    code = """
import json, pathlib, sys
import server_app.app, server_app.strategy, ciphertune.report.page, ciphertune.events
from ciphertune.build import public_part
from ciphertune.settings import compose
for file in pathlib.Path("conf/crypto").glob("*.yaml"):
    method = "fedavg" if file.stem == "clear" else "she_lora" if file.stem == "ckks_product" else "full_he"
    public_part(compose(pathlib.Path("conf"), [f"method={method}", f"crypto={file.stem}"]).crypto).aggregator()
ours = {n: m for n, m in sys.modules.items() if n.split('.')[0] in ('ciphertune', 'server_app')}
print(json.dumps({n: sorted(vars(m)) for n, m in ours.items()}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_no_module_the_server_loads_exposes_a_type_that_can_hold_a_secret() -> None:
    modules = _server_modules()
    assert {f"ciphertune.{n}" for n in ("crypto.ckks", "crypto.packed", "crypto.clear", "aggregation")} <= set(modules)
    for name in (
        "crypto.secret",
        "crypto.masks",
        "crypto.indices",
        "crypto.ckks_secret",
        "crypto.packed_secret",
        "crypto.workers",
        "crypto.clear_secret",
        "crypto.keys",
        "crypto.handover",
        "crypto.recipients",
        "build_client",
        "exchange",
    ):
        assert f"ciphertune.{name}" not in modules
    for name, exposed in modules.items():
        assert not [x for x in exposed if re.search("secret|decrypt", x, re.IGNORECASE)], name


def test_the_servers_context_has_no_key_and_cannot_decrypt() -> None:
    from ciphertune.crypto.ckks import CkksPublic
    from ciphertune.settings import CryptoSettings, ckks_params

    context = CkksPublic(ckks_params(CryptoSettings())).context
    assert not context.has_secret_key() and not context.has_galois_keys() and not context.has_relin_keys()
    with pytest.raises(ValueError, match="Secret key"):
        context.secret_key()
    import tenseal as ts

    with pytest.raises(ValueError):
        ts.ckks_vector(context, [1.0])  # symmetric: without the key not even encryption is possible


def test_the_apps_import_nothing_heavy_before_a_message_needs_it() -> None:
    code = (
        "import sys, client_app.app, server_app.app; "
        "print(sorted({'torch','transformers','peft','matplotlib','jinja2','tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_flowers_dependency_installation_finds_nothing_to_install() -> None:
    """Flower runs `uv sync` on the bundle; what is not excluded would be downloaded at every run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["project"]["dependencies"], *(x for extra in extras for x in extra)]
    names = {re.split(r"[\[<>=~! ]", x)[0].lower() for x in wanted} - {"ciphertune"}
    assert names == set(project["tool"]["uv"]["exclude-dependencies"])


def test_the_bundle_carries_the_apps_and_the_configuration_and_nothing_else(tmp_path: Path) -> None:
    import zipfile
    from io import BytesIO

    from flwr.cli.build import build_fab_from_disk

    (ROOT / "stray.json").write_text("{}")
    try:
        names = zipfile.ZipFile(BytesIO(build_fab_from_disk(ROOT))).namelist()
    finally:
        (ROOT / "stray.json").unlink()
    allowed = re.compile(
        r"(server_app|client_app)/\w+\.py|conf/(\w+/)?\w+\.yaml|README\.md|LICENSE|pyproject\.toml|\.info/.*"
    )
    assert [n for n in names if not allowed.fullmatch(n)] == []
    assert {"server_app/app.py", "client_app/app.py", "conf/config.yaml"} <= set(names)
