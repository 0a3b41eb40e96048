"""Write this format version's vectors, once: ``python tests/cache/format/make_vectors.py``."""

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from helpers.caches import VOCABULARY_MAP, make_manifest, write_domain
from test_format import DATA, KINDS, ROWS

import ddk_cache
from ddk_cache.cache.writer import open_writer

for kind, target in KINDS.items():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "cache"
        with open_writer(str(folder), make_manifest("code", target=target), VOCABULARY_MAP) as writer:
            write_domain(writer, "code", 1)
        with zipfile.ZipFile(DATA / f"v3_{kind}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                archive.write(path, path.relative_to(folder))
        rows: Any = ddk_cache.open_cache(str(folder))["code"].train.read(ROWS).arrays()
        np.savez_compressed(DATA / f"v3_{kind}_rows.npz", **rows)
