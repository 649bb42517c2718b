from pathlib import Path

import pytest

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def photographs() -> Path:
    if not DATA.is_dir():
        pytest.skip("no real photographs beside the repository")
    return DATA
