//! A call of a traced child.

use super::calls::Kind;

/// A call that could have failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub kind: &'static Kind,
    /// The first of its kind, in any thread, is 1.
    pub nth: u32,
    /// Bytes, where it can be short.
    pub asked: u64,
    pub result: i64,
}

impl Call {
    pub(super) fn succeeded(&self) -> bool {
        self.result >= 0
    }
}
