"""Settings of every test."""

import random
import signal

import pytest
import torch
from hypothesis import settings

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadlines: a busy machine is not a bug. The same examples every time: a failure must come back when
# looked for.
settings.register_profile("solar_mega", deadline=None, derandomize=True)
settings.load_profile("solar_mega")


def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _seed()  # once more: which test makes a shared fixture depends on how the tests are dealt to processes
