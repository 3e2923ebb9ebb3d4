//! Checks at compile time which public types threads may send and share.

use crate::{
    AddError, AtomicGroup, AtomicWriter, AtomicWriterOptions, CommitError, FileVersion,
    GroupCommitError, OpenError, RecoverError, RecoverReport,
};

fn shared<T: Send + Sync>() {}

#[test]
fn main_types_are_send_and_sync() {
    shared::<AddError>();
    shared::<AtomicGroup>();
    shared::<AtomicWriter>();
    shared::<AtomicWriterOptions>();
    shared::<CommitError>();
    shared::<FileVersion>();
    shared::<GroupCommitError>();
    shared::<OpenError>();
    shared::<RecoverError>();
    shared::<RecoverReport>();
}
