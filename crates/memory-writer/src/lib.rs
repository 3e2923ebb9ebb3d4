//! Write virtual-machine memory snapshots: full dumps and diffs of dirty pages, committed atomically.
