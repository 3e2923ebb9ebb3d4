//! Error types: one per operation, each naming the affected path.

mod commit;
mod kind;
mod open;
mod recover;

pub use commit::{CommitError, CommitStep, GroupCommitError, Leftover};
pub use open::{Obstacle, OpenError};
pub use recover::{RecoverError, SweepError};
