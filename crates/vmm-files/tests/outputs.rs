//! Files that are written: LiME, flat files, and every plan from any source.

mod support;

use std::fs::File;
use std::ops::{ControlFlow, Range};

use page_reader::{PageReader, RamLayout};
use proptest::prelude::*;
use support::{PAGE, layout, noise, write};
use vmm_files::{ElfMachine, FilePlan, FileWriteError, PlanError, WriteOptions};

/// | bytes | contents |
/// |---|---|
/// | 0..4 | `EMiL`, the magic number 0x4c694d45 |
/// | 4..8 | version 1 |
/// | 8..16, 16..24 | the first and the last address of the range |
/// | 24..32 | zeros |
/// | 32.. | the memory of the range, and then the next header |
#[test]
fn lime_has_a_header_before_each_range() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lime");
    let ram = noise(layout().ram_size());
    write(&path, &FilePlan::lime(&layout()).unwrap(), &ram, true);
    let mut expected = Vec::new();
    for region in layout().regions() {
        expected.extend(0x4c69_4d45_u32.to_le_bytes());
        expected.extend(1_u32.to_le_bytes());
        expected.extend(region.guest_start.to_le_bytes());
        expected.extend((region.guest_end() - 1).to_le_bytes());
        expected.extend([0; 8]);
        expected.extend(&ram[region.offset as usize..region.offset_end() as usize]);
    }
    assert!(std::fs::read(&path).unwrap() == expected);
}

#[test]
fn flat_files_have_the_ranges_in_the_given_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory-ranges");
    let ram = noise(layout().ram_size());
    let mut ranges: Vec<Range<u64>> = layout().addresses().collect();
    ranges.reverse();
    write(
        &path,
        &FilePlan::flat(&layout(), &ranges).unwrap(),
        &ram,
        true,
    );
    let low = 64 * PAGE as usize;
    assert!(std::fs::read(&path).unwrap() == [&ram[low..], &ram[..low]].concat());
    ranges.pop();
    let error = FilePlan::flat(&layout(), &ranges).unwrap_err();
    assert!(matches!(&error, PlanError::OtherRanges { file, .. } if file.starts_with("0x1")));
}

#[test]
fn no_plan_is_longer_than_a_file() {
    let layout = RamLayout::single(0, (1 << 63) - PAGE).unwrap();
    let error = FilePlan::elf(&layout, ElfMachine::X86_64, &[]).unwrap_err();
    assert_eq!(error, PlanError::TooLarge);
    // The header of LiME is shorter than the page that is left.
    FilePlan::lime(&layout).unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn holes_of_the_source_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let source = File::create_new(dir.path().join("ram")).unwrap();
    source.set_len(8 << 30).unwrap();
    if sparse_file::check_holes_are_zeros(&source).is_err() {
        return;
    }
    let reader = Untouched(page_reader::FileReader::range(&source, 0, 8 << 30));
    let plan = FilePlan::lime(&RamLayout::single(0, 8 << 30).unwrap()).unwrap();
    let file = tempfile::tempfile_in(dir.path()).unwrap();
    let go_on = &mut |_| ControlFlow::Continue(());
    let written = plan.write(&file, &reader, &WriteOptions::new(), true, go_on);
    assert_eq!(written.unwrap(), 0);
    assert!(sparse_file::allocated_bytes(&file).unwrap() < 500_000);
}

/// A source that must not be read.
#[cfg(target_os = "linux")]
struct Untouched<'f>(page_reader::FileReader<&'f File>);

#[cfg(target_os = "linux")]
impl PageReader for Untouched<'_> {
    fn read_at(&self, offset: u64, _: &mut [u8]) -> std::io::Result<()> {
        panic!("read at {offset}");
    }

    fn populated(&self, range: Range<u64>) -> page_reader::PopulatedRanges<'_> {
        self.0.populated(range)
    }
}

#[test]
fn writes_can_be_cancelled_at_zeros_and_at_data() {
    for ram in [vec![0; 4 << 20], noise(4 << 20)] {
        let layout = RamLayout::single(0, 4 << 20).unwrap();
        let plan = FilePlan::lime(&layout).unwrap();
        let file = tempfile::tempfile().unwrap();
        let stop = &mut |progress: vmm_files::Progress| match progress.done {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        };
        let error = plan.write(&file, &ram, &WriteOptions::new(), true, stop);
        assert!(matches!(error, Err(FileWriteError::Cancelled)), "{error:?}");
    }
}

/// A source without memory of this process, whose error is at an offset of the RAM.
struct Remote(Vec<u8>, u64);

impl PageReader for Remote {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        match offset <= self.1 && self.1 < offset + buf.len() as u64 {
            true => Err(std::io::Error::other("no memory")),
            false => self.0.as_slice().read_at(offset, buf),
        }
    }
}

#[test]
fn sources_without_host_memory_are_copied() {
    let dir = tempfile::tempdir().unwrap();
    let (mapped, copied) = (dir.path().join("mapped"), dir.path().join("copied"));
    let (layout, ram) = (layout(), noise(layout().ram_size()));
    let plan = FilePlan::elf(&layout, ElfMachine::X86_64, &[]).unwrap();
    write(&mapped, &plan, &ram, false);
    let go_on = &mut |_| ControlFlow::Continue(());
    let file = File::create(&copied).unwrap();
    let source = Remote(ram.clone(), u64::MAX);
    plan.write(&file, &source, &WriteOptions::new(), false, go_on)
        .unwrap();
    assert!(std::fs::read(&mapped).unwrap() == std::fs::read(&copied).unwrap());
    let source = Remote(ram, 100 * PAGE);
    let error = plan.write(&file, &source, &WriteOptions::new(), false, go_on);
    assert!(error.unwrap_err().to_string().contains("no memory"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn written_ram_is_at_its_addresses(
        regions in prop::collection::vec((1..20_u64, 1..20_u64), 1..6),
        data in prop::collection::vec(any::<bool>(), 120),
        skip_zeros in any::<bool>(),
    ) {
        let mut next = 0;
        let regions: Vec<_> = regions.into_iter().map(|(gap, pages)| {
            let start = next + gap * PAGE;
            next = start + pages * PAGE;
            (start, pages * PAGE)
        }).collect();
        let layout = RamLayout::new(regions).unwrap();
        let mut ram = noise(layout.ram_size());
        for (page, bytes) in ram.chunks_mut(PAGE as usize).enumerate() {
            if !data[page] {
                bytes.fill(0);
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lime");
        write(&path, &FilePlan::lime(&layout).unwrap(), &ram, skip_zeros);
        let bytes = std::fs::read(&path).unwrap();
        let mut at = 0;
        for range in layout.addresses() {
            let offset = layout.offset_of(range.start).unwrap() as usize;
            let len = (range.end - range.start) as usize;
            prop_assert!(bytes[at + 32..at + 32 + len] == ram[offset..offset + len]);
            at += 32 + len;
        }
        prop_assert_eq!(at, bytes.len());
    }
}
