import os
import sys

# A command's own process hears Ctrl-C from its first import on: one that it breaks off would end in a traceback.
for _word in sys.orig_argv[:5]:
    _name = os.path.basename(_word).replace("ssl_ib.cli.", "ssl-ib-")
    if _name.startswith("ssl-ib-") and sys.argv[0] in ("-m", _word):
        from .exits import end_at_interrupts

        end_at_interrupts(_name)
