//! How many interleavings of a model are tried.

use loom::model::Builder;

/// All.
pub(crate) fn exhaustively(model: impl Fn() + Send + Sync + 'static) {
    Builder::new().check(model);
}

/// Those in which a thread that could go on is stopped at most `bound` times.
pub(crate) fn with_preemptions(bound: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(bound);
    builder.check(model);
}
