//! What a file system does with holes and alignment, measured; the extents of a file; positioned writes of runs.
