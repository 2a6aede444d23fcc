"Fixtures that several files use, and the way to the modules that build the site."

import signal
import sys
from pathlib import Path

from tiny_models import tiny, undisturbed  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1] / '.docs'))

# a shell without job control has its background jobs ignore Ctrl-C, and their children inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
