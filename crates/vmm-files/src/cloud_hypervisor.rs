//! Snapshots of Cloud Hypervisor.
//!
//! A snapshot is a directory of `config.json`, `state.json` and `memory-ranges`. The last one has
//! the ranges of the RAM one after another, in the order of the list `memory_ranges` of the state
//! `memory-manager` in `state.json`, which is not always the order of their addresses. RAM in files
//! that the guest maps shared is not in the directory.

use std::ops::Range;
use std::path::{Path, PathBuf};

use page_reader::RamLayout;
use serde::Deserialize;

use crate::error::OpenError;
use crate::format::Format;
use crate::guest_file::{Contents, Part, Stored};
use crate::source::Source;

const MEMORY: &str = "memory-ranges";
const STATE: &str = "state.json";
const CONFIG: &str = "config.json";

/// A larger state is not read: it is kept in memory.
const MAX_STATE: u64 = 64 << 20;

/// The directory of a snapshot, of which the memory is another file: to write the memory of a guest
/// in the same form.
///
/// # Examples
/// ```no_run
/// use vmm_files::CloudHypervisorSnapshot;
///
/// let snapshot = CloudHypervisorSnapshot::open("/var/lib/guest/snapshot")?;
/// for range in snapshot.ranges() {
///     println!("RAM at {range:#x?}");
/// }
/// # Ok::<(), vmm_files::OpenError>(())
/// ```
#[derive(Debug)]
pub struct CloudHypervisorSnapshot {
    dir: PathBuf,
    ranges: Vec<Range<u64>>,
}

impl CloudHypervisorSnapshot {
    /// The name of the file with the memory.
    pub const MEMORY: &str = MEMORY;
    /// The names of the other files.
    pub const OTHERS: [&str; 2] = [CONFIG, STATE];

    /// Reads the ranges of the RAM from `state.json` in the directory.
    ///
    /// # Errors
    /// Returns an [`OpenError`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, OpenError> {
        let dir = dir.as_ref();
        let state = Source::open(&dir.join(STATE), Format::CloudHypervisor)?;
        Ok(Self {
            dir: dir.to_owned(),
            ranges: ranges(&state)?,
        })
    }

    /// Returns the directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the addresses of the RAM, in the order of the file with the memory.
    #[must_use]
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }
}

pub(crate) fn read(dir: &Path) -> Result<Contents, OpenError> {
    let CloudHypervisorSnapshot { ranges, .. } = CloudHypervisorSnapshot::open(dir)?;
    let memory = Source::open(&dir.join(MEMORY), Format::CloudHypervisor)?;
    let regions = ranges
        .iter()
        .map(|range| (range.start, range.end - range.start));
    let layout = RamLayout::new(regions).map_err(|source| OpenError::Layout {
        path: dir.join(STATE),
        source,
    })?;
    if memory.len != layout.ram_size() {
        let problem = format!(
            "it has {} bytes, and the ranges in state.json have {}: the file is cut short or of another snapshot",
            memory.len,
            layout.ram_size()
        );
        return Err(memory.invalid(memory.len.min(layout.ram_size()), problem));
    }
    let mut position = 0;
    let parts = ranges.iter().map(|range| {
        let len = range.end - range.start;
        let part = Part {
            // A region of the layout begins there.
            start: layout.offset_of(range.start).unwrap_or(0),
            len,
            source: 0,
            stored: Stored::Bytes(position),
        };
        position += len;
        part
    });
    let mut parts: Vec<_> = parts.collect();
    parts.sort_by_key(|part| part.start);
    Ok(Contents {
        sources: vec![memory],
        layout,
        parts,
    })
}

/// Returns the ranges of the memory file, which are not checked to be apart.
fn ranges(source: &Source) -> Result<Vec<Range<u64>>, OpenError> {
    if source.len > MAX_STATE {
        let problem = format!(
            "it has {} bytes, and more than 64 MiB are not supported",
            source.len
        );
        return Err(source.invalid(0, problem));
    }
    let mut bytes = vec![0; source.len as usize];
    source.read(0, &mut bytes)?;
    let invalid_json =
        |error| source.invalid(0, format!("it is no valid JSON: {error}: copy it again"));
    let outer: Snapshot = serde_json::from_slice(&bytes).map_err(invalid_json)?;
    drop(bytes);
    let state = outer.snapshots.and_then(|it| it.memory_manager);
    let state = state.and_then(|it| it.snapshot_data).map(|it| it.state);
    let Some(state) = state else {
        let problem = "it has no state of the memory manager: take the snapshot with a newer Cloud Hypervisor";
        return Err(source.invalid(0, problem));
    };
    let manager: MemoryManager = serde_json::from_str(&state).map_err(invalid_json)?;
    let mut ranges = Vec::with_capacity(manager.memory_ranges.data.len());
    for MemoryRange { gpa, length } in manager.memory_ranges.data {
        let Some(end) = gpa.checked_add(length).filter(|_| length > 0) else {
            let problem =
                format!("the range of memory at {gpa:#x} has {length} bytes: the file is damaged");
            return Err(source.invalid(0, problem));
        };
        ranges.push(gpa..end);
    }
    check_complete(source, &manager.guest_ram_mappings, &ranges)?;
    Ok(ranges)
}

/// Refuses a snapshot that lacks RAM, because it is in files that the guest maps shared.
fn check_complete(
    source: &Source,
    mappings: &[RamMapping],
    ranges: &[Range<u64>],
) -> Result<(), OpenError> {
    let mut sorted: Vec<_> = ranges
        .iter()
        .map(|range| (range.start, range.end))
        .collect();
    sorted.sort_unstable();
    for RamMapping { gpa, virtio_mem } in mappings {
        let after = sorted.partition_point(|(start, _)| start <= gpa);
        let is_saved = sorted[..after].last().is_some_and(|(_, end)| gpa < end);
        // virtio-mem maps more than is plugged.
        if !is_saved && !virtio_mem {
            let problem = format!(
                "the RAM at {gpa:#x} is not in the snapshot, because the guest maps a file shared there: dump \
                 that file instead"
            );
            return Err(source.invalid(0, problem));
        }
    }
    Ok(())
}

/// The fields that are used. All others are skipped without being kept.
#[derive(Deserialize)]
struct Snapshot {
    snapshots: Option<Snapshots>,
}

#[derive(Deserialize)]
struct Snapshots {
    #[serde(rename = "memory-manager")]
    memory_manager: Option<Component>,
}

#[derive(Deserialize)]
struct Component {
    snapshot_data: Option<SnapshotData>,
}

/// The state is JSON in a string.
#[derive(Deserialize)]
struct SnapshotData {
    state: String,
}

#[derive(Deserialize)]
struct MemoryManager {
    memory_ranges: MemoryRanges,
    #[serde(default)]
    guest_ram_mappings: Vec<RamMapping>,
}

#[derive(Deserialize)]
struct MemoryRanges {
    data: Vec<MemoryRange>,
}

#[derive(Deserialize)]
struct MemoryRange {
    gpa: u64,
    length: u64,
}

#[derive(Deserialize)]
struct RamMapping {
    gpa: u64,
    #[serde(default)]
    virtio_mem: bool,
}
