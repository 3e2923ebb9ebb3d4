//! Which pages of a guest changed: lock-free marking, epochs that give marks back, live rebuilding at another page size.
