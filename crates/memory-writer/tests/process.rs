//! A guest in another process that exits during a snapshot.

#![cfg(target_os = "linux")]

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::process::{Child, Command};

use memory_writer::{MemoryIoStep, MemoryWriter, MemoryWriterOptions, SnapshotError};
use page_reader::{PageReader, PopulatedRanges};
use process_memory::{ProcessMaps, ProcessMemory, ProcessMemoryError};
use rstest::rstest;

/// Kills the process on the query for populated pages, or on the second read.
struct Killing {
    memory: ProcessMemory,
    process: RefCell<Child>,
    on_asking: bool,
    read: RefCell<bool>,
}

impl Killing {
    fn kill(&self) {
        let mut process = self.process.borrow_mut();
        process.kill().unwrap();
        process.wait().unwrap();
    }
}

impl PageReader for Killing {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.read.replace(true) {
            self.kill();
        }
        self.memory.read_at(offset, buf)
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        let populated = self.memory.populated(range);
        if self.on_asking {
            self.kill();
        }
        populated
    }
}

#[rstest]
fn exit_of_the_process_fails_the_snapshot(
    #[values(true, false)] skip: bool,
    #[values(true, false)] on_asking: bool,
) {
    let process = Command::new("sleep").arg("60").spawn().unwrap();
    let maps = ProcessMaps::of(process.id()).unwrap();
    let stack = maps.named("[stack]").unwrap();
    let range = (stack.addresses.start, stack.size());
    let page = 4096;
    let guest = Killing {
        memory: ProcessMemory::open(process.id(), [range; 64]).unwrap(),
        process: RefCell::new(process),
        on_asking,
        read: RefCell::new(false),
    };
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("ram");
    let options: MemoryWriterOptions = MemoryWriter::options()
        .skip_zeros(skip)
        .skip_untouched(skip);
    let mut writer = options.open(&dest, 64 * stack.size(), page).unwrap();
    match writer.write_full(&guest).unwrap_err() {
        SnapshotError::MemoryIo {
            step: MemoryIoStep::Read,
            source,
            ..
        } => {
            let error: ProcessMemoryError = source.downcast().unwrap();
            assert!(matches!(error, ProcessMemoryError::Gone { .. }), "{error}");
        }
        other => panic!("{other}"),
    }
    writer.commit().unwrap_err();
    assert!(!dest.exists());
}
