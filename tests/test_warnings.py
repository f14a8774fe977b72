"""Warnings inside ``not_raised`` are shown.

Filters that raise are in force before and after it.
"""

from __future__ import annotations

import threading
import warnings

import pytest

from moe_routing.python_warnings import not_raised


def warn():
    warnings.warn("remark", UserWarning, stacklevel=1)


@pytest.fixture
def shown():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        yield caught


def test_a_warning_inside_is_shown_and_before_and_after_it_is_raised(shown):
    for _ in range(
        2
    ):  # the second block shows it too: nothing of the first one is left in the module's registry
        filters = list(warnings.filters)
        with pytest.raises(UserWarning, match="remark"):
            warn()
        with not_raised():
            warn()
            warn()
        with pytest.raises(UserWarning, match="remark"):
            warn()
        assert warnings.filters == filters
    assert [str(w.message) for w in shown] == ["remark", "remark"]


def test_what_is_ignored_stays_ignored(shown):
    warnings.filterwarnings("ignore", "remark")
    with not_raised():
        warn()
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(w.message) for w in shown] == ["another"]


def test_an_error_inside_leaves_the_filters_as_they_were(shown):
    filters = list(warnings.filters)
    with pytest.raises(OSError, match="disk"), not_raised():
        raise OSError(28, "disk")
    assert warnings.filters == filters
    assert not shown


def test_filters_that_raise_nothing_are_not_touched():
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("always")
        filters = warnings.filters
        with not_raised():
            assert warnings.filters is filters


def test_blocks_that_overlap_in_two_threads_end_with_the_last_one(shown):
    filters = list(warnings.filters)
    opened, close = threading.Event(), threading.Event()

    def other():
        with not_raised():
            opened.set()
            close.wait()
            warn()

    thread = threading.Thread(target=other)
    with not_raised():
        thread.start()
        opened.wait()
        with not_raised():  # and one inside the other
            warn()
    warnings.warn("the other block is open", UserWarning, stacklevel=1)
    close.set()
    thread.join()
    assert warnings.filters == filters
    with pytest.raises(UserWarning, match="remark"):
        warn()
    assert [str(w.message) for w in shown] == ["remark", "the other block is open"]
