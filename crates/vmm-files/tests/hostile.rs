//! Damaged files of every format: an error or RAM of the stated size, never a panic.

mod support;

use std::path::{Path, PathBuf};

use page_reader::{PageReader, RamLayout};
use proptest::prelude::*;
use support::{PAGE, noise, write};
use vmm_files::{ElfMachine, FilePlan, Format, GuestFile, Machine};

/// Writes a small file of the format. Returns the path to open, the file to damage, and the end of
/// the fields in it.
fn sample(dir: &Path, format: Format) -> (PathBuf, PathBuf, usize) {
    let be = |numbers: &[u64]| -> Vec<u8> {
        numbers
            .iter()
            .flat_map(|number| number.to_be_bytes())
            .collect()
    };
    let path = dir.join("sample.vmsn");
    match format {
        Format::Elf => {
            let layout = RamLayout::new([(0, PAGE), (4 * PAGE, PAGE)]).unwrap();
            let plan = FilePlan::elf(&layout, ElfMachine::X86_64, &[]).unwrap();
            write(&path, &plan, &noise(2 * PAGE), true);
            (path.clone(), path, 240)
        }
        Format::Qemu | Format::Libvirt => {
            let start = if format == Format::Libvirt { 93 } else { 0 };
            let mut bytes = vec![0; start];
            if format == Format::Libvirt {
                bytes[..16].copy_from_slice(b"LibvirtQemudSave");
                bytes[16..32].copy_from_slice(&[2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 6, 0, 0, 0]);
            }
            bytes.extend(b"QEVM\0\0\0\x03\x07\0\0\0\x07microvm");
            bytes.extend(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram");
            bytes.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
            bytes.extend(be(&[(4 * PAGE) | 4]));
            bytes.extend(b"\x06pc.ram");
            bytes.extend(be(&[4 * PAGE]));
            bytes.extend([0, 0, 0, 1]);
            let bitmap = bytes.len() as u64 + 24;
            bytes.extend(be(&[PAGE, bitmap, 4096]));
            let end = bytes.len() + 8;
            bytes.extend([0b1010, 0, 0, 0, 0, 0, 0, 0]);
            bytes.resize(4096, 0);
            bytes.extend(noise(4 * PAGE));
            std::fs::write(&path, bytes).unwrap();
            (path.clone(), path, end)
        }
        Format::CloudHypervisor => {
            let state = dir.join("state.json");
            let text = r#"{"snapshots":{"memory-manager":{"snapshot_data":{"state":"{\"memory_ranges\":{\"data\":[{\"gpa\":0,\"length\":8192}]}}"}}}}"#;
            std::fs::write(&state, text).unwrap();
            std::fs::write(dir.join("memory-ranges"), noise(2 * PAGE)).unwrap();
            (dir.to_owned(), state, text.len())
        }
        _ => {
            let mut bytes = b"\xd2\xbe\xd2\xbe\x08\0\0\0\x01\0\0\0memory".to_vec();
            bytes.resize(76, 0);
            bytes.extend([92, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            bytes.extend(b"\x3f\x05Dummy\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0??ab");
            bytes.extend(b"\x04\x0cregionsCount\x01\0\0\0");
            for (name, value) in [("regionPPN", 1), ("regionPageNum", 0), ("regionSize", 2)] {
                bytes.extend([0x44, name.len() as u8]);
                bytes.extend(name.as_bytes());
                bytes.extend([0, 0, 0, 0, value, 0, 0, 0]);
            }
            bytes.extend([0, 0]);
            let end = bytes.len();
            std::fs::write(&path, bytes).unwrap();
            std::fs::write(dir.join("sample.vmem"), noise(2 * PAGE)).unwrap();
            (path.clone(), path, end)
        }
    }
}

/// Opens a file, and checks that all of the RAM that it states can be read. Returns whether the
/// file opens.
fn open(path: &Path, format: Format) -> bool {
    let options = GuestFile::options().machine(Machine::QemuMicrovm);
    let Ok(guest) = options.open(path, format) else {
        return false;
    };
    let size = guest.layout().ram_size();
    assert!(size > 0);
    for at in [0, size / 2, size.saturating_sub(100)] {
        let mut bytes = [0; 100];
        let end = size.min(at + 100) - at;
        guest.read_at(at, &mut bytes[..end as usize]).unwrap();
    }
    let mut last = 0;
    for range in guest.populated(0..size).take(1000) {
        assert!(last <= range.start && range.start < range.end && range.end <= size);
        last = range.end;
    }
    true
}

#[test]
fn undamaged_samples_open() {
    for format in Format::ALL {
        let dir = tempfile::tempdir().unwrap();
        let (path, _, _) = sample(dir.path(), format);
        assert!(open(&path, format), "{format:?}");
    }
}

#[test]
fn no_number_in_a_file_is_trusted() {
    for format in Format::ALL {
        let dir = tempfile::tempdir().unwrap();
        let (path, file, end) = sample(dir.path(), format);
        let bytes = std::fs::read(&file).unwrap();
        for at in 0..end {
            for len in [1, 8] {
                for value in [0, 0x7f, 0xff] {
                    let mut damaged = bytes.clone();
                    let last = damaged.len().min(at + len);
                    damaged[at..last].fill(value);
                    std::fs::write(&file, damaged).unwrap();
                    open(&path, format);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn damage_is_an_error_or_other_ram(
        number in 0..Format::ALL.len(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let format = Format::ALL[number];
        let dir = tempfile::tempdir().unwrap();
        let (path, file, end) = sample(dir.path(), format);
        let mut bytes = std::fs::read(&file).unwrap();
        for (at, value) in damage {
            bytes[at.index(end)] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        std::fs::write(&file, bytes).unwrap();
        open(&path, format);
    }
}
