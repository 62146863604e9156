"""More processes for a client's packed encryption and decryption: every call of SEAL holds Python's lock.

Fresh interpreters, never forks, and pipes instead of pickles. The key goes to a worker through its standard input
alone, and a worker ends with it. A message either way is

    to a worker      operation 1 (1 encrypt, 2 decrypt) | count 8 | terms 8 | length 8 | bytes
    from a worker    0 done or 1 refused, 1 | length 8 | bytes, or the reason
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

import ciphertune
from ciphertune.crypto.params import PackedParams
from ciphertune.crypto.secret import SecretKey
from ciphertune.errors import CiphertuneError, FormatError

Vector = npt.NDArray[np.float64]

_ENCRYPT, _DECRYPT = 1, 2
_JOB, _REPLY, _LENGTH = struct.Struct("<BQQQ"), struct.Struct("<BQ"), struct.Struct("<Q")


class Workers:
    """Processes that share the blocks of a vector among them."""

    def __init__(self, params: PackedParams, key: SecretKey, count: int) -> None:
        self._params = params
        self._processes: list[subprocess.Popen[bytes]] = []
        # -P: a file of the working directory must not stand in for a package, next to the key
        command = [sys.executable, "-P", "-m", "ciphertune.crypto.workers"]
        places = [str(Path(ciphertune.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in places if p)}
        try:
            for _ in range(count):
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
                self._processes.append(process)
                for part in (json.dumps(asdict(params)).encode(), key.reveal()):
                    _pipe(process.stdin).write(_LENGTH.pack(len(part)) + part)
        except OSError as error:
            self.close()
            raise _ended(error.strerror) from None

    def encrypt(self, values: Vector) -> bytes:
        """As `PackedSecret.encrypt`, of values within the bound."""
        slots = self._params.slots
        blocks = -(-values.size // slots)
        pieces = [values[a * slots : b * slots] for a, b in self._shares(blocks)]
        return b"".join(self._all(_ENCRYPT, [(p.size, 0, p.tobytes()) for p in pieces]))

    def decrypt(self, body: bytes, count: int, terms: int) -> Vector:
        """As `PackedSecret.decrypt`, of a whole number of blocks for `count` values."""
        slots, size = self._params.slots, self._params.sum_bytes(terms)
        blocks = -(-count // slots)
        jobs = [(min(count, b * slots) - a * slots, terms, body[a * size : b * size]) for a, b in self._shares(blocks)]
        return np.concatenate([np.zeros(0), *(np.frombuffer(x, "<f8") for x in self._all(_DECRYPT, jobs))])

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            with suppress(OSError):  # what a dead process was still to be sent
                _pipe(process.stdin).close()
            process.wait()
            _pipe(process.stdout).close()
        self._processes = []

    def __del__(self) -> None:
        self.close()

    def _shares(self, blocks: int) -> list[tuple[int, int]]:
        """First and last block (exclusive) of each process that has any."""
        edges = np.linspace(0, blocks, len(self._processes) + 1).round().astype(int).tolist()
        return [(a, b) for a, b in pairwise(edges) if a < b]

    def _all(self, operation: int, jobs: Sequence[tuple[int, int, bytes]]) -> list[bytes]:
        # one thread each: a pipe holds less than a message, so all have to be read and written at once
        with ThreadPoolExecutor(len(self._processes)) as threads:
            running = [
                threads.submit(_ask, process, operation, job)
                for process, job in zip(self._processes, jobs, strict=False)
            ]
            return [r.result() for r in running]


def _ask(process: subprocess.Popen[bytes], operation: int, job: tuple[int, int, bytes]) -> bytes:
    count, terms, data = job
    try:
        into = _pipe(process.stdin)
        into.write(_JOB.pack(operation, count, terms, len(data)) + data)
        into.flush()
        refused, length = _REPLY.unpack(_read(_pipe(process.stdout), _REPLY.size))
        answer = _read(_pipe(process.stdout), length)
    except (OSError, EOFError):
        raise _ended(f"status {process.poll()}") from None
    if refused:
        raise FormatError(answer.decode())
    return answer


def _ended(why: str | None) -> CiphertuneError:
    return CiphertuneError(
        f"an encryption process ended ({why}): is there enough memory? One process alone needs less: start the node "
        "with crypto-processes=1"
    )


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """A worker: parameters and key first, then one job after the other until the input ends."""
    from ciphertune.crypto.packed_secret import PackedSecret

    into, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    params, material = (_read(into, *_LENGTH.unpack(_read(into, _LENGTH.size))) for _ in range(2))
    chosen = PackedParams(**json.loads(params))
    secret = PackedSecret(chosen, SecretKey(material, chosen.digest()))
    while head := into.read(_JOB.size):
        operation, count, terms, length = _JOB.unpack(head)
        data = _read(into, length)
        try:
            if operation == _ENCRYPT:
                answer = secret.encrypt(np.frombuffer(data, "<f8"))
            else:
                answer = secret.decrypt(data, count, terms=terms).astype("<f8").tobytes()
            out.write(_REPLY.pack(0, len(answer)) + answer)
        except CiphertuneError as error:
            reason = str(error).encode()
            out.write(_REPLY.pack(1, len(reason)) + reason)
        out.flush()


if __name__ == "__main__":
    main()
