//! Checks at compile time which public types threads may send and share.

use crate::{Checksums, ChunkSum, ExtentMap, Footer, FooterError, Header, WritePlan};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<Checksums>();
    shared::<ChunkSum>();
    shared::<ExtentMap>();
    shared::<Footer>();
    shared::<FooterError>();
    shared::<Header>();
    shared::<WritePlan>();
}
