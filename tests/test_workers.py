"""More processes for encryption: the same numbers, the same refusals, and the key in nobody's argument list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ciphertune.crypto import packed_secret
from ciphertune.crypto.packed_secret import PackedSecret, generate_key
from ciphertune.crypto.params import PackedParams
from ciphertune.crypto.secret import SecretKey
from ciphertune.errors import CiphertuneError, FormatError, RangeError

PARAMS = PackedParams("ckks", 4096, 40, 64.0, 1000)


@pytest.fixture(scope="module")
def key() -> SecretKey:
    return generate_key(PARAMS)


@pytest.fixture
def alone(key: SecretKey) -> PackedSecret:
    return PackedSecret(PARAMS, key)


@pytest.fixture
def helped(key: SecretKey, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackedSecret]:
    monkeypatch.setattr(packed_secret, "PARALLEL", 1)
    secret = PackedSecret(PARAMS, key, processes=2)
    yield secret
    secret.close()


@pytest.mark.parametrize("count", [1, 4096, 4097, 5 * 4096 - 3])
def test_two_processes_encrypt_what_one_decrypts_and_the_other_way_round(
    alone: PackedSecret, helped: PackedSecret, count: int
) -> None:
    values = np.random.default_rng(count).normal(size=count)
    assert np.abs(alone._decrypted(helped.encrypt(values), count, 1) - values).max() <= PARAMS.error_bound(1, 8.0)
    body = alone._encrypted(values)
    total = alone.public.aggregator()
    total.add(body)
    total.add(body)
    summed = total.result(total.blocks())
    assert np.abs(helped.decrypt(summed, count, terms=2) - 2 * values).max() <= PARAMS.error_bound(2, 16.0)
    assert helped._workers is not None and len(helped._workers._processes) == 2


def test_few_values_start_no_process(key: SecretKey) -> None:
    secret = PackedSecret(PARAMS, key, processes=2)
    secret.decrypt(secret.encrypt(np.zeros(10)), 10)
    assert secret._workers is None


def test_what_one_process_refuses_two_refuse_too(helped: PackedSecret) -> None:
    with pytest.raises(RangeError, match="NaN or infinite"):
        helped.encrypt(np.full(10_000, np.nan))
    body = bytearray(helped.encrypt(np.zeros(3 * 4096)))
    with pytest.raises(FormatError, match="are no sum of"):
        helped.decrypt(bytes(body[:-1]), 3 * 4096)
    body[-5:] = b"\xff" * 5
    with pytest.raises(FormatError, match="not below its modulus"):
        helped.decrypt(bytes(body), 3 * 4096)
    assert np.abs(helped.decrypt(helped.encrypt(np.ones(9000)), 9000) - 1).max() < 1e-5  # still there


def test_a_process_that_died_is_one_clear_error(helped: PackedSecret) -> None:
    helped.encrypt(np.zeros(9000))
    assert helped._workers is not None
    helped._workers._processes[1].kill()
    helped._workers._processes[1].wait()
    with pytest.raises(CiphertuneError, match=r"an encryption process ended.*crypto-processes=1"):
        helped.encrypt(np.zeros(9000))


def test_the_key_reaches_a_process_through_its_input_alone(helped: PackedSecret, key: SecretKey) -> None:
    helped.encrypt(np.zeros(9000))
    assert helped._workers is not None
    for process in helped._workers._processes:
        visible = Path(f"/proc/{process.pid}/cmdline").read_bytes() + Path(f"/proc/{process.pid}/environ").read_bytes()
        material = key.reveal()[:64]
        assert material not in visible and material.hex().encode() not in visible


def test_processes_end_with_the_secret_that_started_them(key: SecretKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_secret, "PARALLEL", 1)
    secret = PackedSecret(PARAMS, key, processes=2)
    secret.encrypt(np.zeros(9000))
    assert secret._workers is not None
    processes = list(secret._workers._processes)
    del secret
    assert [process.wait(30) for process in processes] == [0, 0]
