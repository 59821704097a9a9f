"""Work shared out over threads: every piece once, from anywhere, and exceptions come back."""

from __future__ import annotations

import threading

import numpy as np  # noqa: F401  (brings its BLAS)
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from napari_xanes_tomo.parallel import cores, in_threads, one_blas_thread, share


@pytest.mark.parametrize("n", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("threads", [None, 1, 3])
def test_every_piece_is_done_once(n: int, threads: int | None) -> None:
    seen: list[int] = []
    in_threads(n, lambda a, b: seen.extend(range(a, b)), threads=threads)
    assert sorted(seen) == list(range(n))
    assert cores() >= 1


def test_shared_out_work_may_share_out_more_than_there_are_threads() -> None:
    seen: list[tuple[int, int, int]] = []

    def middle(i: int) -> None:
        share(range(20), lambda j: share(range(4), lambda k: seen.append((i, j, k)), threads=2), threads=4)

    share(range(40), middle, threads=8)
    assert len(set(seen)) == len(seen) == 40 * 20 * 4


def test_more_than_one_thread_works() -> None:
    both = threading.Barrier(2, timeout=30)  # passed only when two calls run at the same time
    share(range(2), lambda _: both.wait(), threads=2)


@pytest.mark.parametrize("where", [0, 57])
def test_an_exception_comes_back_and_stops_the_rest(where: int) -> None:
    done: list[int] = []

    def work(i: int) -> None:
        if i == where:
            raise KeyError(i)
        done.append(i)

    with pytest.raises(KeyError, match=str(where)):
        share(range(10000), work, threads=4)
    assert len(done) < 10000


def _blas_threads() -> list[int]:
    return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]


def test_blas_has_one_thread_until_the_last_who_asked_is_done() -> None:
    with threadpool_limits(2, user_api="blas"):
        before = _blas_threads()
        one, other = one_blas_thread(), one_blas_thread()
        one.__enter__()
        other.__enter__()
        assert set(_blas_threads()) == {1}
        one.__exit__(None, None, None)
        assert set(_blas_threads()) == {1}
        other.__exit__(None, None, None)
        assert _blas_threads() == before
