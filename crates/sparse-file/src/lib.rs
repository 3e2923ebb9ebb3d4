//! What a file system does with holes and alignment, measured; the extents of a file; positioned writes of runs.

mod buffer;
mod extents;
mod limit;
mod memory;
mod probe;
mod space;
mod sys;
mod write;

pub use extents::{Extent, Extents, Kind, Knowledge, extents};
pub use memory::Memory;
pub use probe::{AlignmentBasis, Capabilities, DirectIo, HoleSupport, ProbeError, Punch, SeekHole};
pub use space::{SpaceError, allocated_bytes, grow, punch_hole, reserve};
pub use write::{Engine, Source, WriteError, WriteOptions, write_runs};
