//! Answers the write faults of a guest.
