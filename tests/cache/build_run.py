"""A builder that the tests kill: its shards take a while."""

import sys
import time

from limbeck.cache.build import build
from tests.cache.conftest import make_loader, make_teacher

if __name__ == "__main__":
    build(
        make_teacher(),
        make_loader(),
        sys.argv[1],
        views=4,
        batch=6,
        shard_rows=18,
        progress=lambda done, total: time.sleep(0.01),
    )
