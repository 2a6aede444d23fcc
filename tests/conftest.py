"Fixtures that several files use, and the way to the modules that build the site."

import sys
from pathlib import Path

from tiny_models import tiny, undisturbed  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1] / '.docs'))
