//! Replace files atomically and durably.

mod destination;
mod directory;
mod error;
mod group;
mod options;
mod outcome;
mod record;
mod recover;
mod stage;
mod sweep;
mod sys;
mod writer;

pub use error::{
    AddError, CommitError, CommitStep, GroupCommitError, Leftover, OpenError, RecoverError,
    Refusal, SweepError,
};
pub use group::AtomicGroup;
pub use options::{Durability, Options, Symlinks};
pub use recover::{RecoverReport, recover};
pub use sweep::{Kept, SweepReport, sweep};
pub use writer::AtomicWriter;
