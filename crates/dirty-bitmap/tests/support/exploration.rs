//! The number of interleavings that loom tries for a model: all with `RAMSNAP_THOROUGH=1`,
//! otherwise those with few preemptions.

use loom::model::Builder;

/// The most preemptions without `RAMSNAP_THOROUGH=1`. A preemption stops a thread that could
/// continue.
const FEW: usize = 2;

/// Tries all interleavings.
pub(crate) fn exhaustively(model: impl Fn() + Send + Sync + 'static) {
    check(None, model);
}

/// Tries the interleavings with at most `bound` preemptions.
pub(crate) fn with_preemptions(bound: usize, model: impl Fn() + Send + Sync + 'static) {
    check(Some(bound), model);
}

fn check(bound: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let thorough = std::env::var_os("RAMSNAP_THOROUGH").is_some_and(|value| value == "1");
    let mut builder = Builder::new();
    builder.preemption_bound = if thorough {
        bound
    } else {
        Some(bound.map_or(FEW, |bound| bound.min(FEW)))
    };
    builder.check(model);
}
