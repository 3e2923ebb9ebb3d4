//! Read virtual-machine memory snapshots: open, apply a chain of diffs, map copy-on-write.
