"""Stands in for hypothesis on a machine without it (ci/gpu.sh): the same tests on random examples, and nothing more.

No shrinking, no database; the values drawn are printed, and pytest shows them with a failure.
"""

import functools
import inspect
import random

from . import strategies


def settings(max_examples=100, **_):
    """Sets how many examples a test gets."""

    def decorate(test):
        test.examples = max_examples
        return test

    return decorate


def given(**wanted):
    """Calls the test with values drawn, once for each example."""

    def decorate(test):
        @functools.wraps(test)
        def run(**fixtures):
            for _ in range(run.examples):
                drawn = {name: strategy.draw(random) for name, strategy in wanted.items()}
                print("example:", drawn)
                test(**fixtures, **drawn)

        run.examples = 100
        signature = inspect.signature(test)
        left = [p for name, p in signature.parameters.items() if name not in wanted]
        run.__signature__ = signature.replace(parameters=left)  # pytest takes these for fixtures
        return run

    return decorate


__all__ = ["given", "settings", "strategies"]
