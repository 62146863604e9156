"""`ciphertune check`: every line when all is well, and what each says when it is not."""

from __future__ import annotations

import http.server
import importlib.util
import json
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import CONF, ROOT
from federations import Lab
from safetensors.numpy import load_file
from tiny import SENTENCES, write_lines

from ciphertune import check_link, check_node, check_room
from ciphertune.check_link import Link
from ciphertune.check_node import Line
from ciphertune.cli import main
from ciphertune.crypto import keys
from ciphertune.flower import node_config
from ciphertune.settings import compose

NAMES = (
    "python", "packages", "settings", "key", "data", "model", "device", "disk", "memory", "superlink", "certificate",
    "clock",
)  # fmt: skip
Look = Callable[..., dict[str, Line]]


def script() -> ModuleType:
    """deploy/certificates.py."""
    spec = importlib.util.spec_from_file_location("certificates", ROOT / "deploy/certificates.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("authority")
    script().make(folder, ["127.0.0.1"])
    return folder


@contextmanager
def serving(folder: Path | None, *, date: timedelta | None = timedelta(0), status: int = 200) -> Iterator[str]:
    """A server on 127.0.0.1 with the certificate in `folder`, whose clock is off by `date`; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status if self.path == "/health" else 404)
            if date is not None:
                self.send_header("Date", format_datetime(datetime.now(UTC) + date, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:  # clients that break off a handshake
            pass

    server = Server(("127.0.0.1", 0), Handler)
    if folder is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server/server.crt", folder / "server/server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def made() -> Any:
    from ciphertune.build_client import generate_key

    return generate_key(compose(CONF).crypto)


@pytest.fixture
def node(tmp_path: Path, llama: Path, made: Any) -> dict[str, str]:
    """What a node's parts are, as text for the command line; all of them good."""
    keys.save(made, tmp_path / "lab.key")
    rows = [{"text": text} for text in SENTENCES]
    data = write_lines(tmp_path / "data.jsonl", rows)
    return {
        "config": f'name="lab-a" rank=4 data-path="{data}" key-file="{tmp_path}/lab.key" run-dir="{tmp_path}/runs" '
        'device="cpu"',
        "overrides": f"data=jsonl model=hf model.name={llama} model.max_length=32",
    }


@pytest.fixture
def look(node: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Look:
    """All lines by name, with something put in the place of the good parts. Memory is not measured unless asked for."""

    def call(
        *, config: str | None = None, overrides: str = "", link: Link | None = None, measure: bool = False
    ) -> dict[str, Line]:
        if not measure:
            monkeypatch.setattr(check_node, "memory", lambda node: "not measured")
        lines = check_node.check_node(
            lambda: compose(CONF, f"{node['overrides']} {overrides}"),
            lambda: node_config(node["config"] if config is None else config),
            CONF,
            link,
        )
        assert tuple(line.name for line in lines) == NAMES
        return {line.name: line for line in lines}

    return call


def failed(lines: dict[str, Line]) -> list[str]:
    return [name for name, line in lines.items() if line.ok is False]


# --- all is well ------------------------------------------------------------------------------------------------------


def test_a_node_on_which_all_is_well_gets_ok_in_every_line_and_exit_status_0(
    node: dict[str, str],
    authority: Path,
    made: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    with serving(authority) as address:
        words = ["check", *node["overrides"].split(), "--node-config", node["config"], "--superlink", address]
        words += ["--root-certificates", str(authority / "public/ca.crt")]
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert main([*words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
    assert [line.split()[:2] for line in shown.splitlines() if line[:1] != " "] == [[name, "ok"] for name in NAMES]
    assert found["ok"] is True and [line["name"] for line in found["lines"]] == list(NAMES)
    text = {line["name"]: line["text"] for line in found["lines"]}
    assert made.fingerprint.hex() in text["key"]
    assert "7 texts to train on, 1 held out" in text["data"]
    assert "4 layers adapted" in text["model"]  # q_proj and v_proj of two blocks
    assert text["certificate"].endswith(f"{script().SERVER_DAYS - 1} days")
    assert "TLS verified" in text["superlink"] and text["device"] == "cpu"
    assert made.reveal()[:16].hex() not in shown


def test_without_a_superlink_its_lines_are_open_and_the_others_decide(look: Look) -> None:
    lines = look()
    assert failed(lines) == [] and [n for n, line in lines.items() if line.ok is None] == list(NAMES[-3:])


def test_a_command_with_something_to_do_ends_with_1_and_names_it(
    node: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(check_node, "memory", lambda node: "not measured")
    (tmp_path / "lab.key").chmod(0o640)
    assert main(["check", *node["overrides"].split(), "--node-config", node["config"]]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "chmod 600" in shown and shown.endswith("to do: key")


# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_python_out_of_range_is_named_with_the_remedy(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    line = look()["python"]
    assert line.ok is False and "Python 3.10.4, want >=3.11" in line.text and "virtual environment" in line.text


def test_packages_that_are_absent_or_out_of_range_are_named_with_the_remedy(
    look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["flwr[simulation]~=0.9", "numpy>=2", "no-such-package>=3", "also-absent; extra == 'dev'"]
    monkeypatch.setattr(check_node, "requires", lambda name: wanted)
    lines = look()
    assert failed(lines) == ["packages"]
    text = lines["packages"].text
    assert "flwr is 1." in text and "(want ~=0.9)" in text and "no-such-package is absent" in text
    assert "pip install 'flwr[simulation]~=0.9' 'no-such-package>=3'" in text and "numpy" not in text


# --- settings, key ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "overrides", "text"),
    [
        ('nme="a" key-file="k"', "", "unknown node setting nme"),
        ('name="a" rank=0 key-file="k"', "", "rank=0 is out of range"),
        ('name="a" rank=4', "", "ciphertune keys create"),
        ('name="a" key-file="k"', "method=she_lora", "allow-clear=true"),
        ('name="a" key-file="k"', "method=nonsense", "unknown method=nonsense"),
        ('name="a" key-file="k"', "federation.rounds=0", "federation.rounds=0"),
        ('name=lab-a key-file="k"', "", "cannot be read"),
        ('name="a" on the bench', "", "'on', which Flower passes over"),
        ("/no/such/node=1.toml", "", "cannot be read"),
        ("partition-id=0 num-partitions=3", "", "ciphertune keys create"),
    ],
)
def test_settings_that_a_node_would_refuse_are_one_line_and_what_follows_waits(
    look: Look, config: str, overrides: str, text: str
) -> None:
    lines = look(config=config, overrides=overrides)
    assert failed(lines) == ["settings"] and text in lines["settings"].text
    assert lines["key"].ok is None and lines["key"].text == "not looked at: settings first"


def test_a_key_that_is_absent_open_damaged_or_for_other_parameters_is_refused_with_the_remedy(
    look: Look, tmp_path: Path
) -> None:
    path = tmp_path / "lab.key"
    whole = path.read_bytes()
    assert "made for crypto=ckks_packed, not for those of this run (ckks)" in look(overrides="crypto=ckks")["key"].text
    path.chmod(0o644)
    assert "chmod 600" in look()["key"].text
    path.chmod(0o600)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is damaged: copy it again" in look()["key"].text
    path.unlink()
    lines = look()
    assert failed(lines) == ["key"] and "does not exist: make one" in lines["key"].text
    lines = look(overrides="method=local crypto=clear", config='name="a" allow-clear=true rank=4 data-path="x"')
    assert lines["key"].ok is True


# --- data, model, device ----------------------------------------------------------------------------------------------


def test_text_that_cannot_be_used_is_named_by_file_and_line(look: Look, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_lines(path, [{"text": "one"}, {"txt": "two"}])
    lines = look()
    assert failed(lines) == ["data"] and "data.jsonl" in lines["data"].text and "2" in lines["data"].text
    assert lines["disk"].text == "not looked at: data first"
    path.write_text("")
    assert look()["data"].ok is False
    path.unlink()
    assert "data.jsonl" in look()["data"].text
    write_lines(path, [{"text": "one", "label": "maybe"}] * 3)
    text = look(overrides="model.task=classification data.labels=[no,yes]")["data"].text
    assert "maybe" in text and "yes" in text
    text = look(config=f'name="a" key-file="{tmp_path}/lab.key"', overrides="data=embedded")["data"].text
    assert "partition-id=K" in text


def test_a_model_that_is_absent_incomplete_or_too_small_for_the_rank_is_named_with_the_remedy(
    look: Look, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, text in (
        (f"{tmp_path}/none", "copy the model there"),
        ("somebody/something", "hf download somebody/something"),
        (str(tmp_path), "has no config.json"),
    ):
        lines = look(overrides=f"model.name={name}")
        assert failed(lines) == ["model"] and text in lines["model"].text
        assert lines["memory"].text == "not looked at: model first"
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    (copy / "tokenizer.json").unlink()
    assert "has no tokenizer" in look(overrides=f"model.name={copy}")["model"].text
    (copy / "model.safetensors").unlink()
    assert "has no weights" in look(overrides=f"model.name={copy}")["model"].text
    (copy / "config.json").write_text("{")
    assert look(overrides=f"model.name={llama} model.targets=[nothing]")["model"].ok is False
    big = look(config=f'name="a" rank=300 key-file="{tmp_path}/lab.key" data-path="{tmp_path}/data.jsonl"')
    assert "rank 300 is above" in big["model"].text


def test_a_model_of_an_unknown_family_is_said_to_be_unchecked_and_hinders_nothing(
    look: Look, llama: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "brand_new"}
    (copy / "config.json").write_text(json.dumps(config))
    lines = look(overrides=f"model.name={copy}", measure=True)
    assert failed(lines) == [] and "not checked" in lines["model"].text


def test_a_device_that_this_machine_lacks_is_named(look: Look, node: dict[str, str]) -> None:
    lines = look(config=node["config"].replace('"cpu"', '"cuda:77"'))
    assert failed(lines) == ["device"] and "cuda:77" in lines["device"].text
    assert "model.quantization" in look(overrides="model.quantization=4bit")["device"].text


# --- room -------------------------------------------------------------------------------------------------------------


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_named(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
        lines = look()
        assert failed(lines) == ["disk"] and "make room, or set run-dir" in lines["disk"].text
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot be written by this user" in look()["disk"].text


def test_too_little_memory_is_named(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000_000))
    lines = look(measure=True)
    assert failed(lines) == ["memory"] and "100.0 MB available" in lines["memory"].text


def test_the_weights_are_counted_as_they_are_in_the_file(llama: Path) -> None:
    want = sum(values.size for path in llama.glob("*.safetensors") for values in load_file(path).values())
    assert check_room.parameters(llama) == want > 10_000


def test_a_run_writes_no_more_than_the_disk_line_says_and_not_a_tenth_of_it(lab: Lab, tmp_path: Path) -> None:
    run = lab("crypto=clear method=fedavg federation.rounds=3 model.release=float32 record_updates=true")
    settings = compose(CONF, f"{lab.base} crypto=clear method=fedavg federation.rounds=3 record_updates=true")
    config = f'name="client-3" rank=8 data-path="{tmp_path}/lab-3.jsonl" allow-clear=true'
    found = check_node._node(settings, node_config(config), CONF)
    wrote = sum(p.stat().st_size for p in (run / "clients/client-3").rglob("*") if p.is_file())
    assert wrote / 10 < check_room.disk_needed(found) and wrote < check_room.disk_needed(found) * 1.5


# --- the way to the SuperLink -----------------------------------------------------------------------------------------


def test_a_superlink_that_does_not_answer_as_it_should_is_told_from_one_that_does(
    look: Look, authority: Path, tmp_path: Path
) -> None:
    roots = str(authority / "public/ca.crt")
    other = tmp_path / "other"
    script().make(other, ["superlink.example"])
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = f"127.0.0.1:{closed.getsockname()[1]}"
        cases = [
            (Link(refused, roots), "refuses the connection"),
            (Link("no-such-host.invalid:8443", roots), "no such host"),
            (Link("https://superlink.example:8443", roots), "want HOST:PORT"),
            (Link("superlink.example", roots), "want HOST:PORT"),
            (Link(refused, str(tmp_path / "none.crt")), "does not exist: get ca.crt"),
            (Link(refused, str(authority / "superexec/secret")), "holds no certificate"),
        ]
        with serving(authority) as address, serving(None) as plain, serving(authority, status=502) as proxy:
            cases += [
                (Link(address, str(other / "public/ca.crt")), f"not signed by {other}"),
                (Link(address), "give --root-certificates ca.crt"),
                (Link(plain, roots), "does not answer in TLS"),
                (Link(address, roots, insecure=True), "it may want TLS"),
                (Link(proxy, roots), "502: the proxy is up, the SuperLink behind it is not"),
            ]
            for link, text in cases:
                lines = look(link=link)
                assert failed(lines) == ["superlink"] and text in lines["superlink"].text, (link, lines["superlink"])
                assert lines["clock"].text == "not looked at: superlink first"
            assert failed(look(link=Link(plain, insecure=True))) == []


def test_a_certificate_for_another_name_or_another_time_is_told_from_a_wrong_authority(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = script()
    monkeypatch.setattr(make, "_general", lambda name: make.x509.DNSName("elsewhere.example"))
    make.make(tmp_path / "name", ["elsewhere.example"])
    with serving(tmp_path / "name") as address:
        text = look(link=Link(address, str(tmp_path / "name/public/ca.crt")))["superlink"].text
        assert "is not for 127.0.0.1" in text
    for folder, days, early, want in (
        ("over", -1, timedelta(days=9), "has expired"),
        ("early", 90, timedelta(days=-1), "is not valid yet"),
    ):
        make = script()
        make.make(tmp_path / folder, ["127.0.0.1"])
        shutil.rmtree(tmp_path / folder / "server")
        monkeypatch.setattr(make, "SERVER_DAYS", days)
        monkeypatch.setattr(make, "_EARLY", early)
        make.make(tmp_path / folder, ["127.0.0.1"])
        with serving(tmp_path / folder) as address:
            assert want in look(link=Link(address, str(tmp_path / folder / "public/ca.crt")))["superlink"].text


def test_a_certificate_that_soon_expires_is_named(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = script()
    monkeypatch.setattr(make, "SERVER_DAYS", 5)
    make.make(tmp_path / "soon", ["127.0.0.1"])
    with serving(tmp_path / "soon") as address:
        lines = look(link=Link(address, str(tmp_path / "soon/public/ca.crt")))
    assert failed(lines) == ["certificate"] and "4 days: ask the server's operator" in lines["certificate"].text


@pytest.mark.parametrize(
    ("off", "ok", "text"),
    [
        (timedelta(seconds=0), True, "within a second or two"),
        (timedelta(seconds=120), True, "120 s behind the server's: close enough"),
        (timedelta(seconds=-30), False, "30 s ahead of the server's"),
        (timedelta(seconds=600), False, "600 s behind the server's"),
        (None, False, "sends no Date"),
    ],
)
def test_a_clock_for_which_a_node_would_be_refused_is_named(
    look: Look, authority: Path, off: timedelta | None, ok: bool, text: str
) -> None:
    with serving(authority, date=off) as address:
        line = look(link=Link(address, str(authority / "public/ca.crt")))["clock"]
    assert line.ok is ok and (text in line.text or (off and str(round(abs(off.total_seconds())) + 1) in line.text))


def test_the_clocks_limits_are_flowers() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert check_link._AHEAD == SYSTEM_TIME_TOLERANCE and check_link._BEHIND <= TIMESTAMP_TOLERANCE


# --- whatever happens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["key", "data", "model", "device", "disk", "certificate"])
def test_a_surprise_in_one_line_is_one_line_and_hides_no_other(
    look: Look, authority: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def surprise(*_: object) -> str:
        raise RuntimeError("out of the\nblue")

    monkeypatch.setattr(check_node, name, surprise)
    with serving(authority) as address:
        lines = look(link=Link(address, str(authority / "public/ca.crt")))
    assert failed(lines) == [name] and lines[name].text == "unexpected RuntimeError: out of the blue"
