"""Makes the shared test helpers importable whatever folder pytest starts in."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
