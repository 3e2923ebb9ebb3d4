//! Checks at compile time which public types threads may send and share.

use crate::{AlignedBuffer, HostMemory, PastEnd, SecretBuffer};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<AlignedBuffer>();
    shared::<HostMemory>();
    shared::<PastEnd>();
    shared::<SecretBuffer>();
}
