"""Do threads that explain with one network get what one alone gets?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import med_gradcam as mg
from tests.engine import nets

METHODS = ("integrated", "gradcam", "hirescam", "integrated")


def _one(net: nn.Module, number: int) -> mg.Explanation:
    return mg.explain(
        nets.volume(seed=number),
        net,
        target=1,
        layer="first" if number % 2 else "rest.0",
        method=METHODS[number % 4],
        reference=nets.volume(seed=50),
    )


@contextmanager
def _hurried() -> Iterator[None]:
    """Threads change places as often as Python lets them."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _four(net: nn.Module) -> list[mg.Explanation]:
    with _hurried(), ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda n: _one(net, n), range(12)))


def test_four_threads_with_one_network_give_the_single_thread_s_maps() -> None:
    net = nets.made(nets.gated).train()
    alone = [_one(net, n) for n in range(12)]
    for made, wanted in zip(_four(net), alone, strict=True):
        assert np.allclose(made.evidence, wanted.evidence, rtol=1e-4, atol=1e-7)
        assert made.score == pytest.approx(wanted.score, rel=1e-5)
    assert all(m.training and "forward" not in m.__dict__ for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_without_the_lock_they_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: a lock that holds nobody back."""

    class Open:
        def __enter__(self) -> None: ...

        def __exit__(self, *_exc: object) -> None: ...

    monkeypatch.setattr(threading, "RLock", Open)
    net = nets.made(nets.gated)
    alone = [_one(nets.made(nets.gated), n) for n in range(12)]

    def differs() -> bool:
        try:
            made = _four(net)
        except Exception:  # noqa: BLE001 - any failure is what is expected here
            return True
        return any(
            not np.allclose(a.evidence, b.evidence, rtol=1e-4, atol=1e-7)
            for a, b in zip(made, alone, strict=True)
        )

    assert any(differs() for _ in range(5))


def test_other_networks_run_beside_each_other() -> None:
    """The lock belongs to one network: another one does not wait for it."""
    busy, free = nets.made(nets.gated), nets.made(nets.gated)
    reached, go = threading.Event(), threading.Event()

    def wait(_step: object) -> None:
        reached.set()
        assert go.wait(20)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: mg.explain(nets.volume(), busy, layer="first", progress=wait))
        assert reached.wait(20)
        mg.explain(nets.volume(), free, layer="first")
        go.set()
        assert first.result(20).layer == "first"


def test_the_thread_count_is_that_of_the_call_and_put_back() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    mg.explain(
        nets.volume(),
        nets.made(nets.gated),
        layer="first",
        threads=1,
        progress=lambda _step: seen.append(torch.get_num_threads()),
    )
    assert set(seen) == {1}
    assert torch.get_num_threads() == before
