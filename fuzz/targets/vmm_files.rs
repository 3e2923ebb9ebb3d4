//! Files of other VMMs that are any bytes: refused, or RAM of the stated size, all of which can be
//! read and is zeros where it is not populated.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use page_reader::PageReader;
use vmm_files::{Format, GuestFile, Machine};

/// RAM of more than this is read only at its borders.
const SMALL: u64 = 1 << 20;

/// A directory of this process.
fn dir() -> &'static PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let name = format!("ramsnap-fuzz-vmm-files-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).expect("a directory");
        fs::write(dir.join("file.vmem"), [7; 8192]).expect("memory of VMware");
        fs::write(dir.join("memory-ranges"), [7; 8192]).expect("memory of Cloud Hypervisor");
        dir
    })
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, bytes)) = input.split_first() else {
        return;
    };
    let format = Format::ALL[usize::from(*kind) % Format::ALL.len()];
    let (path, file) = match format {
        Format::CloudHypervisor => (dir().clone(), dir().join("state.json")),
        _ => (dir().join("file.vmsn"), dir().join("file.vmsn")),
    };
    fs::write(file, bytes).expect("a file");
    let options = GuestFile::options().machine(Machine::QemuMicrovm);
    let Ok(guest) = options.open(path, format) else {
        return;
    };
    let size = guest.layout().ram_size();
    assert!(size > 0 && guest.ram_layout() == Some(guest.layout()));
    let mut last = [0; 100];
    guest
        .read_at(size - 100, &mut last)
        .expect("the end of the RAM");
    guest
        .read_at(size - 99, &mut last)
        .expect_err("past the end");
    if size > SMALL {
        return;
    }
    let mut ram = vec![1; size as usize];
    guest.read_at(0, &mut ram).expect("all of the RAM");
    let mut end = 0;
    for range in guest.populated(0..size).chain([size..size]) {
        assert!(end <= range.start && range.end <= size);
        let skipped = &ram[end as usize..range.start as usize];
        assert!(skipped.iter().all(|byte| *byte == 0));
        end = range.end;
    }
    guest.check_source().expect("the file did not change");
});
