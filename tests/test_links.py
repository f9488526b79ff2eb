"""Broken links are refused, not taken for absent files."""

import pytest

from embedport.checkpoint.hub import fetch
from embedport.errors import InputError
from embedport.links import check_links


@pytest.mark.parametrize("target", ["modules.json", "nowhere"])
def test_link_to_nothing(damageable, target):
    """Taken for absent, it would be another model's pooling."""
    (damageable / "modules.json").unlink()
    (damageable / "modules.json").symlink_to(target)
    for look in (fetch, check_links):
        with pytest.raises(InputError, match=r"modules\.json is a link to .* leads to no file"):
            look(damageable)
