"""What tests of bad input share."""

import pytest


def assert_refused(call, error: type[Exception], pattern: str) -> None:
    """`call()` raises `error` with a text of one line that matches `pattern`."""
    with pytest.raises(error, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value), "one line"
