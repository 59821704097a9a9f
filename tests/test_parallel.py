"""Work shared out over threads: every piece once, from anywhere, and exceptions come back."""

from __future__ import annotations

import threading

import numpy as np  # noqa: F401  (brings its BLAS)
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from napari_xanes_tomo.ahead import Ahead
from napari_xanes_tomo.model import Cancelled, Progress
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


def test_a_library_that_is_loaded_later_is_limited_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second who asks finds a BLAS that was not there before; in the end everything is as it was."""
    now = {"early": 2}

    class Limits:
        def __init__(self, n: int, user_api: str) -> None:
            self.before = dict(now)
            now.update(dict.fromkeys(now, n))

        def restore_original_limits(self) -> None:
            now.update(self.before)

    monkeypatch.setattr("threadpoolctl.threadpool_limits", Limits)
    one, other = one_blas_thread(), one_blas_thread()
    one.__enter__()
    now["late"] = 3
    other.__enter__()
    assert now == {"early": 1, "late": 1}
    one.__exit__(None, None, None)
    assert now == {"early": 1, "late": 1}
    other.__exit__(None, None, None)
    assert now == {"early": 2, "late": 3}


# ------------------------------------------------------------------------------------------- a call beside the rest


def test_what_is_begun_ahead_is_handed_over() -> None:
    def work(progress: Progress) -> int:
        progress("halves", 1, 2)
        return 7

    said: list[tuple[str, int, int]] = []
    ahead = Ahead(work)
    assert ahead.result(lambda *a: said.append(a)) == 7
    assert set(said) == {("halves", 1, 2)}
    assert not ahead._thread.is_alive()


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for() -> None:
    def work(progress: Progress) -> int:
        raise KeyError("no")

    ahead = Ahead(work)
    with pytest.raises(KeyError, match="no"):
        ahead.result()
    assert not ahead._thread.is_alive()


def test_a_call_that_nobody_waits_for_stops_at_its_next_safe_point() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work(progress: Progress) -> int:
        progress("parts", 0, 1)
        begun.set()
        go_on.wait(30)
        progress("parts", 1, 1)
        raise AssertionError("never reached")

    def cancel(what: str, done: int, total: int) -> None:
        go_on.set()
        raise Cancelled

    ahead = Ahead(work)
    assert begun.wait(30)
    with pytest.raises(Cancelled):
        ahead.result(cancel)
    assert not ahead._thread.is_alive()
