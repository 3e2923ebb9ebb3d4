//! Checks at compile time which public types threads may send and share.

use crate::{
    AdoptError, Event, Filled, OpenError, RegisterError, Stop, Userfaultfd, UserfaultfdOptions,
};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<AdoptError>();
    shared::<Event>();
    shared::<Filled>();
    shared::<OpenError>();
    shared::<RegisterError>();
    shared::<Stop>();
    shared::<Userfaultfd>();
    shared::<UserfaultfdOptions>();
}

/// Callers name these types without a dependency of their own.
#[test]
fn crates_of_public_signatures_are_reexported() {
    shared::<crate::bitflags::parser::ParseError>();
}
