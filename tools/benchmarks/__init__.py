"""What the library costs beside its peers and beside the raw device; see README.md here."""

import sys
from pathlib import Path

# The tools are scripts: they find each other by the folder they lie in.
_TOOLS = str(Path(__file__).resolve().parent.parent)
if _TOOLS not in sys.path:
    sys.path.append(_TOOLS)
