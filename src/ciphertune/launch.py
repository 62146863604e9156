"""`ciphertune run`: a thin front of `flwr run` that checks first, sizes the simulation, and returns the true status.

Flower's own local SuperLink outlives the run and keeps the environment and folder of the first one; ours lives as long
as the run, on a free port of 127.0.0.1, started from an empty folder, and is ended by its own process id.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil

from ciphertune.errors import FederationError, SettingsError
from ciphertune.events import check_log
from ciphertune.progress import MARK
from ciphertune.settings import Settings, compose

_CONNECTION = "ciphertune"
_STARTUP_SECONDS = 60.0


def app_folder(path: Path) -> Path:
    """The folder of the Flower app. Raises SettingsError when it is not one."""
    folder = path.expanduser().resolve()
    try:
        config = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        config["tool"]["flwr"]["app"]["components"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SettingsError(f"{folder} is not the folder of a Flower app: go there, or give --app FOLDER") from None
    return folder


def launch(
    app: Path, overrides: Sequence[str], *, runs_dir: Path, superlink: str | None = None, verbose: bool = False
) -> int:
    """Run the federation and print what happens. 0 when Flower reports the run as completed, else 1.

    Raises SettingsError for a bad override before anything is started, FederationError when Flower cannot be started.
    """
    folder = app_folder(app)
    if superlink is None:
        overrides, runs_dir = _as_before(folder, overrides, runs_dir)
    settings = compose(folder / "conf", overrides)
    if not settings.model.name:
        raise SettingsError("model.name is empty: give a folder, a hub id, or 'embedded'")
    if superlink is None:
        check_simulation(settings)
    name = settings.name or f"{settings.method.name}-{datetime.now():%Y%m%d-%H%M%S}"
    runs = runs_dir.expanduser().resolve()
    if not settings.resume and (runs / name / "settings.yaml").exists():
        raise SettingsError(f"run folder {runs / name} holds another run already: choose another name=...")
    if superlink is None:
        check_runs(runs)
    words = [*overrides, *([] if settings.name else [f"name={name}"])]
    with tempfile.TemporaryDirectory(prefix="ciphertune-", ignore_cleanup_errors=True) as scratch:
        config = {"overrides": _joined(words)} | ({} if superlink else {"runs-dir": str(runs)})
        toml = Path(scratch) / "run.toml"
        lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in config.items()]
        toml.write_text("".join(lines), encoding="utf-8")
        command = [_flwr("flwr"), "run", str(folder), superlink or _CONNECTION, "--run-config", str(toml), "--stream"]
        empty = Path(scratch) / "empty"
        empty.mkdir()
        if superlink:
            return _follow(command, dict(os.environ), empty, superlink, verbose, None)
        command += ["--federation-config", _size_of(settings)]
        with _own_superlink(Path(scratch), empty) as environment:
            log = runs / name / "flower.log"
            return _follow(command, environment, empty, _CONNECTION, verbose, log)


def _as_before(app: Path, overrides: Sequence[str], runs_dir: Path) -> tuple[Sequence[str], Path]:
    """Where a run on this machine is to be resumed: the overrides that it was started with, and what is said now.

    Returns the overrides and the folder that the run's folder is in. Raises ResumeError.
    """
    given = {key: value for key, _, value in (word.partition("=") for word in overrides)}
    if not given.get("resume"):
        return overrides, runs_dir
    from ciphertune import resume

    path = Path(given["resume"]).expanduser()
    path = (path if len(path.parts) > 1 else runs_dir.expanduser() / path).resolve()
    kept = [word for word in resume.overrides(path) if word.partition("=")[0] not in (*given, "name")]
    words = [*kept, *(w for w in overrides if w.partition("=")[0] not in ("resume", "name"))]
    words += [f"resume={path}", f"name={path.name}"]
    resume.find(path, compose(app / "conf", words))
    return words, path.parent


def check_simulation(settings: Settings) -> None:
    """What can be seen on this machine before anything is started. Raises SettingsError."""
    check_log(settings)
    federation, data, model = settings.federation, settings.data, settings.model
    if federation.min_clients > len(federation.clients):
        raise SettingsError(
            f"federation.min_clients={federation.min_clients}, but {len(federation.clients)} clients are simulated: "
            "add some to federation.clients or lower it"
        )
    if data.source == "jsonl" and not (data.path or all(c.data_path for c in federation.clients)):
        raise SettingsError("data=jsonl needs data.path=FILE, which may contain {client}")
    if data.source == "hf" and not data.dataset:
        raise SettingsError("data=hf needs data.dataset=NAME")
    if model.name.startswith(("/", "./", "../", "~")) and not Path(model.name).expanduser().is_dir():
        raise SettingsError(f"model.name={model.name!r} is not a folder on this machine")


def check_runs(runs: Path) -> None:
    """Make the folder that run folders go into. Raises SettingsError when that, or writing in it, is not possible."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingsError(f"no run can be kept in {runs} ({reason}): give another folder by --runs-dir") from None


def _size_of(settings: Settings) -> str:
    """Flower's simulation settings: a node per client, the machine's CPUs shared among those that run at once."""
    clients = len(settings.federation.clients)
    cpus = max(1, (os.cpu_count() or 1) // clients)
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) / clients  # a share of a GPU is enough for Ray to show it
    return f"num-supernodes={clients} client-resources-num-cpus={cpus} client-resources-num-gpus={min(1.0, gpus):.2f}"


def _follow(
    command: list[str], environment: dict[str, str], cwd: Path, connection: str, verbose: bool, log: Path | None
) -> int:
    """Run `flwr run --stream`, print our lines as they come, then ask Flower how the run really ended."""
    run_id = ""
    kept: list[str] = []
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            kept.append(line)
            found = re.search(r"Successfully started run (\d+)", line)
            run_id = found[1] if found else run_id
            if verbose:
                print(line, end="", flush=True)
            elif MARK in line:
                print(line.split(MARK, 1)[1].rstrip().removeprefix(" "), flush=True)
    if log is not None and log.parent.is_dir():
        with log.open("a", encoding="utf-8") as file:
            file.writelines(kept)
    if not run_id:
        raise FederationError("Flower did not start the run:\n" + "".join(kept[-15:]))
    status, details = _status(run_id, environment, cwd, connection)
    if status != "finished:completed":
        print(f"run {run_id} ended as {status or 'unknown'}{': ' + details if details else ''}", file=sys.stderr)
        if not verbose and not any(MARK in line for line in kept):
            print("".join(kept[-25:]), file=sys.stderr)
        return 1
    return 0


def _status(run_id: str, environment: dict[str, str], cwd: Path, connection: str) -> tuple[str, str]:
    """Flower's own word on a run, e.g. `finished:completed`. `flwr run` exits 0 even when the run failed."""
    command = [_flwr("flwr"), "list", connection, "--run-id", run_id, "--format", "json"]
    for _ in range(20):
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        try:
            run = json.loads(done.stdout)["runs"][0]
        except (ValueError, KeyError, IndexError):
            return "", done.stderr.strip()[-300:]
        if str(run["status"]).startswith("finished"):
            return str(run["status"]), str(run.get("details", ""))
        time.sleep(0.5)  # the stream may end a moment before the status is written
    return str(run["status"]), ""


@contextmanager
def _own_superlink(scratch: Path, cwd: Path) -> Iterator[dict[str, str]]:
    """A SuperLink in simulation mode for this run alone; yields the environment that finds it."""
    port = _free_port()
    home = scratch / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n",
        encoding="utf-8",
    )
    environment = os.environ | {
        "FLWR_HOME": str(home),
        # Flower starts its helpers by name, and the virtual environment need not be activated
        "PATH": os.pathsep.join([str(Path(_flwr("flower-superlink")).parent), os.environ.get("PATH", "")]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_DEDUP_LOGS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    log = (scratch / "superlink.log").open("wb")
    command = [_flwr("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with (
        log,
        subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            _wait_until_up(port, process, scratch / "superlink.log")
            yield environment
        finally:
            end_tree(process.pid)


def end_tree(pid: int) -> None:
    """End a process and all that descend from it: the SuperLink, its simulation, Ray. Ended alone, they outlive it."""
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    for one in psutil.wait_procs(family, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def _wait_until_up(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _STARTUP_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise FederationError("Flower's SuperLink did not start:\n" + log.read_text(errors="replace")[-2000:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _flwr(name: str) -> str:
    """Flower's command next to this Python, so that a virtual environment need not be activated."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FederationError(f"{name} is not installed in this environment: pip install 'flwr[simulation]'")
    return found


def _joined(words: Sequence[str]) -> str:
    import shlex

    return shlex.join(words)
