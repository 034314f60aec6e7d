"""Each command imports this before torch, because importing torch takes seconds. Ctrl-C during that import ends the
command at once, without a traceback. Later run.progress.command takes the signals over.
"""

import signal
import sys
from pathlib import Path

script = Path(sys.argv[0]).absolute()  # python -m says -m here, until it has found the file
if script.name == "-m" or script.parent == Path(__file__).absolute().parent.parent:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
