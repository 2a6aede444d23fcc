"Fixtures that several files use."

from tiny_models import tiny, undisturbed  # noqa: F401
