"""Settings of every test."""

import signal

from hypothesis import settings

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadlines: a busy machine is not a bug. The same examples every time: a failure must come back when
# looked for.
settings.register_profile("solar_mega", deadline=None, derandomize=True)
settings.load_profile("solar_mega")
