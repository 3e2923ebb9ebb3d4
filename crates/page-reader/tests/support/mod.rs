//! Helpers of several test binaries.

#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod populated;
