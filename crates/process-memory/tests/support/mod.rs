//! Child processes for tests.

#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each test binary uses a part"
)]
#![allow(unsafe_code)]

pub(crate) mod child;
pub(crate) mod target;

/// Returns from the test `$test` if the machine lacks `$need`.
macro_rules! need {
    ($need:ident, $test:expr) => {
        if !test_machine::Need::$need.met($test) {
            return;
        }
    };
}

pub(crate) use need;
