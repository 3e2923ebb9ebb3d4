//! Tests of the write tracker on a simulated machine.

mod checkpoints;
mod faults;
mod machine;
mod oracle;
mod policies;
