"""Settings of every test."""

from hypothesis import settings

# No deadlines: a busy machine is not a bug. The same examples every time: a failure must come back when
# looked for.
settings.register_profile("solar_mega", deadline=None, derandomize=True)
settings.load_profile("solar_mega")
