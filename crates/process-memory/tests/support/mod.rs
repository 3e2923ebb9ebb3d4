//! Child processes for tests.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(unsafe_code)]

pub(crate) mod child;
pub(crate) mod target;
