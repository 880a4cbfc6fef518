"""Write docs/torture.json."""

from pathlib import Path

from tests.contracts.torture import document

(Path(__file__).parents[3] / "docs" / "torture.json").write_text(document(), "ascii")
