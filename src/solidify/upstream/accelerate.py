"""The names of accelerate without documentation that the package uses; of its private names there is none.

`TESTED` is the minor version that they were read and tried in; `tests/upstream/` compares each with the one installed.
"""

from __future__ import annotations

from accelerate.data_loader import DataLoaderShard as DataLoaderShard

TESTED = "1.15"
UNDOCUMENTED = {
    "data_loader.DataLoaderShard": "what `prepare` makes of a loader; its epoch is set by a method of this class",
}
