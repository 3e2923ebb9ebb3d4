//! The contract of `PageReader`, checked for every source.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::sync::Arc;

use page_reader::{FileReader, HostMemory, Layered, MappedMemory, PageReader, RamLayout};
use test_memory::{Mapping, PAGE, pattern};

/// The sizes of the regions of sources with regions.
const REGIONS: [usize; 3] = [2 * PAGE, PAGE, 3 * PAGE];
const SIZE: usize = 6 * PAGE;

/// Panics unless `source` keeps the contract of the trait, with the bytes of `expected`.
fn conforms(source: &(impl PageReader + ?Sized), expected: &[u8]) {
    check_ranges(source, expected);
    check_chunks(source, expected);
    check_end(source, expected.len());
    check_host_memory(source, expected);
}

/// Returns offsets at, before and after every page border, where all regions and layers start and
/// end.
fn edges(len: usize) -> Vec<usize> {
    let mut edges: Vec<_> = (0..=len)
        .step_by(PAGE)
        .flat_map(|border| [border.saturating_sub(3), border, (border + 5).min(len)])
        .collect();
    edges.sort_unstable();
    edges.dedup();
    edges
}

fn check_ranges(source: &(impl PageReader + ?Sized), expected: &[u8]) {
    let edges = edges(expected.len());
    for &start in &edges {
        for &end in edges.iter().filter(|&&end| end >= start) {
            // One byte more on both sides, to check that only the buffer is written.
            let mut buf = vec![0xee; end - start + 2];
            let inner = 1..end - start + 1;
            source
                .read_at(start as u64, &mut buf[inner.clone()])
                .unwrap();
            assert!(buf[inner] == expected[start..end], "{start}..{end}");
            assert_eq!((buf[0], *buf.last().unwrap()), (0xee, 0xee));
        }
    }
}

fn check_chunks(source: &(impl PageReader + ?Sized), expected: &[u8]) {
    for chunk in [1, 7, 512, PAGE, PAGE + 1, expected.len()] {
        let mut buf = vec![0; expected.len()];
        let mut offset = 0;
        for part in buf.chunks_mut(chunk) {
            source.read_at(offset, part).unwrap();
            offset += part.len() as u64;
        }
        assert!(buf == expected, "in chunks of {chunk}");
    }
}

fn check_end(source: &(impl PageReader + ?Sized), len: usize) {
    let end = len as u64;
    source.read_at(end, &mut []).unwrap();
    assert!(source.host_memory(end, 1).is_none());
    let past = [
        (end, 1),
        (end - 1, 2),
        (0, len + 1),
        (end + 1, 1),
        (i64::MAX as u64 - 1, 2),
        (i64::MAX as u64, PAGE),
        (u64::MAX - 1, 1),
        (u64::MAX, 1),
        (u64::MAX, PAGE),
    ];
    for (offset, len) in past {
        let error = source.read_at(offset, &mut vec![0; len]).unwrap_err();
        assert_eq!(
            error.kind(),
            ErrorKind::UnexpectedEof,
            "{len} at {offset}: {error}"
        );
        if offset >= end {
            assert!(
                source.host_memory(offset, len).is_none(),
                "{len} at {offset}"
            );
        }
    }
    for offset in [end + 1, i64::MAX as u64 + 1, u64::MAX] {
        if let Err(error) = source.read_at(offset, &mut []) {
            assert_eq!(
                error.kind(),
                ErrorKind::UnexpectedEof,
                "empty read at {offset}"
            );
        }
    }
    for offset in [0, 1, end, end + 1, u64::MAX] {
        assert!(
            source.host_memory(offset, 0).is_none(),
            "no bytes at {offset}"
        );
    }
}

fn check_host_memory(source: &(impl PageReader + ?Sized), expected: &[u8]) {
    for start in edges(expected.len()) {
        let rest = expected.len() - start;
        for asked in [1, 3, 512, PAGE, rest.max(1), rest + 1, usize::MAX] {
            let Some(memory) = source.host_memory(start as u64, asked) else {
                continue;
            };
            let len = memory.len();
            assert!(
                (1..=asked.min(rest)).contains(&len),
                "{len} of {asked} at {start}"
            );
            let mut direct = vec![0; len];
            memory.copy_to(&mut direct);
            assert!(
                direct == expected[start..start + len],
                "{len} bytes at {start}"
            );
        }
    }
}

/// Returns `true` if every byte has host memory, as a dump without copies requires.
fn is_all_host_memory(source: &(impl PageReader + ?Sized), len: usize) -> bool {
    let mut offset = 0;
    while offset < len as u64 {
        match source.host_memory(offset, len) {
            Some(memory) => offset += memory.len() as u64,
            None => return false,
        }
    }
    true
}

/// Splits the pattern into three regions.
fn regions(bytes: &[u8]) -> [&[u8]; 3] {
    let (low, rest) = bytes.split_at(REGIONS[0]);
    let (middle, high) = rest.split_at(REGIONS[1]);
    assert_eq!(high.len(), REGIONS[2]);
    [low, middle, high]
}

/// Returns a layout with a gap after the first region, and none between the others.
fn layout() -> RamLayout {
    let [low, middle, high] = REGIONS.map(|size| size as u64);
    RamLayout::new([(0, low), (1 << 32, middle), ((1 << 32) + middle, high)]).unwrap()
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

#[test]
fn byte_slices_vectors_and_arrays_conform() {
    let bytes = pattern(SIZE);
    conforms(&bytes[..], &bytes);
    conforms(&bytes, &bytes);
    let array: [u8; SIZE] = bytes.clone().try_into().unwrap();
    conforms(&array, &bytes);
    assert!(is_all_host_memory(&array, SIZE));
}

#[test]
fn an_empty_source_conforms() {
    let nothing: &[u8] = &[];
    nothing.read_at(0, &mut []).unwrap();
    assert!(nothing.host_memory(0, 1).is_none());
    assert_eq!(
        nothing.read_at(0, &mut [0]).unwrap_err().kind(),
        ErrorKind::UnexpectedEof
    );
}

#[test]
fn pointers_conform_and_forward_host_memory() {
    let bytes = pattern(SIZE);
    let pointers: [Box<dyn PageReader + '_>; 4] = [
        Box::new(&bytes),
        Box::new(Box::new(bytes.clone())),
        Box::new(Arc::new(bytes.clone())),
        Box::new(Arc::<[u8]>::from(&bytes[..])),
    ];
    for pointer in pointers {
        conforms(&pointer, &bytes);
        assert!(is_all_host_memory(&pointer, SIZE));
    }
}

#[test]
fn whole_files_conform() {
    let bytes = pattern(SIZE);
    let file = file_of(&bytes);
    conforms(&FileReader::new(&file), &bytes);
    conforms(&FileReader::new(Arc::new(file)), &bytes);
}

#[test]
fn a_range_inside_a_longer_file_conforms() {
    let file = file_of(&pattern(SIZE + 3 * PAGE));
    let bytes = &pattern(SIZE + PAGE)[PAGE..];
    conforms(&FileReader::range(file, PAGE as u64, SIZE as u64), bytes);
}

#[cfg(target_os = "linux")]
#[test]
fn a_memfd_conforms() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let bytes = pattern(SIZE);
    let mut memfd = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap());
    memfd.write_all(&bytes).unwrap();
    conforms(&FileReader::new(memfd), &bytes);
}

#[test]
fn mapped_memory_conforms() {
    let bytes = pattern(SIZE);
    let mappings = regions(&bytes).map(Mapping::private_with);
    let guest = MappedMemory::new(layout(), mappings.iter().map(Mapping::memory)).unwrap();
    conforms(&guest, &bytes);
    assert!(is_all_host_memory(&guest, SIZE));
}

#[test]
fn mapped_memory_at_odd_host_addresses_conforms() {
    let bytes = pattern(SIZE);
    let padded: [Vec<u8>; 3] = regions(&bytes).map(|region| [b"odd", region].concat());
    let memory = padded.iter().map(|region| HostMemory::from(&region[3..]));
    conforms(&MappedMemory::new(layout(), memory).unwrap(), &bytes);
}

#[test]
fn consecutive_parts_of_one_type_conform() {
    let bytes = pattern(SIZE);
    let files = regions(&bytes).map(|part| (FileReader::new(file_of(part)), part.len() as u64));
    conforms(&Layered::concat(files).unwrap(), &bytes);
}

#[test]
fn layers_of_several_types_conform() {
    let bytes = pattern(SIZE);
    let [_, middle, high] = regions(&bytes);
    // The lower layer has wrong bytes under every overlay.
    let mut below = bytes.clone();
    below[2 * PAGE - 2..].fill(0xee);
    let base = FileReader::new(file_of(&below));
    let low_end = bytes[2 * PAGE - 2..3 * PAGE - 1].to_vec();
    let mapped = Mapping::private_with(high);
    let device_layout = RamLayout::single(0, REGIONS[2] as u64).unwrap();
    let device = MappedMemory::new(device_layout, [mapped.memory()]).unwrap();

    let mut inner = Layered::<&dyn PageReader>::over(&base, SIZE as u64).unwrap();
    let mut overlay = |start: usize, len: usize, source| {
        inner.overlay(start as u64, len as u64, source).unwrap();
    };
    overlay(2 * PAGE - 2, PAGE + 1, &low_end);
    overlay(2 * PAGE, PAGE, &[0xee; PAGE]);
    overlay(2 * PAGE, PAGE, &middle);
    let mut guest = Layered::<&dyn PageReader>::over(&inner, SIZE as u64).unwrap();
    guest
        .overlay(3 * PAGE as u64, 3 * PAGE as u64, &device)
        .unwrap();
    conforms(&guest, &bytes);
}

#[cfg(feature = "vm-memory")]
#[test]
fn guest_memory_of_vm_memory_conforms() {
    use page_reader::GuestMemoryReader;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    let bytes = pattern(SIZE);
    let ranges: Vec<_> = layout()
        .regions()
        .iter()
        .map(|region| (GuestAddress(region.guest_start), region.size as usize))
        .collect();
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    for ((start, _), region) in ranges.iter().zip(regions(&bytes)) {
        memory.write_slice(region, *start).unwrap();
    }
    conforms(&GuestMemoryReader::new(&memory).unwrap(), &bytes);
    let guest = GuestMemoryReader::new(Arc::new(memory)).unwrap();
    conforms(&guest, &bytes);
    assert_eq!(*guest.layout(), layout());
    assert!(is_all_host_memory(&guest, SIZE));
}
