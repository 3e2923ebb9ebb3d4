//! Checks at compile time which public types threads may send and share.

use crate::{
    CancelGuard, CancelToken, Capabilities, EngineChoice, Extents, FileIdentity, PageHoles,
    WriteError, WriteOptions,
};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<CancelGuard>();
    shared::<CancelToken>();
    shared::<Capabilities>();
    shared::<EngineChoice>();
    shared::<Extents>();
    shared::<FileIdentity>();
    shared::<PageHoles>();
    shared::<WriteError>();
    shared::<WriteOptions>();
}
