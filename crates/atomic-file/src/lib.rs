//! Replace files atomically and durably: stage beside the destination, sync, rename, sync the directory; one file or a group.
