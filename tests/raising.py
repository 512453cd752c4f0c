"""What an actor of a test may raise."""

from __future__ import annotations

import sys
from typing import NoReturn

from ray import cloudpickle

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker process cannot import it


def raise_what_does_not_unpickle() -> NoReturn:
    """As a library's exception may be: made of two arguments, and pickled as if made of its message alone."""

    class OfTwo(Exception):
        def __init__(self, first: str, second: str):
            super().__init__(f"{first} {second}")

    raise OfTwo("no unpickling", "of this")
