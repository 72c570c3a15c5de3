from tests.train.conftest import inputs  # noqa: F401  (a fixture)
