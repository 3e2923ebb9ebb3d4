//! A small file may claim any amount of RAM. Memory is taken for stored pages only.

#![cfg(target_os = "linux")]

use std::fs;
use std::sync::Mutex;

use lazy_restore::{LazyError, LazyRam, UserfaultfdError, WorkingSet};
use memory_image::Chain;
use page_reader::PageReader;
use test_images::{image_of_zeros, with_little_memory};
use test_machine::needs;

/// Held by each test, because nothing else of the process may take memory at the same time.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn claimed_ram_takes_no_memory() {
    needs!(Userfaultfd);
    let _alone = ALONE.lock().unwrap();
    let dir = tempfile::tempdir().unwrap();
    for ram_size in [40, 44, 46, 48, 52].map(|bits| 1 << bits) {
        let chain = Chain::open_sealed(&[image_of_zeros(dir.path(), ram_size)]).unwrap();
        let started = with_little_memory("restoring", ram_size, || {
            LazyRam::options().start(chain).map(drop)
        });
        match started {
            Ok(())
            | Err(LazyError::Reserve { .. })
            | Err(LazyError::Userfaultfd(UserfaultfdError::Register { .. })) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
}

/// Returns the size of the page tables of this process, in bytes.
fn page_tables() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPTE:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    1024 * kib.unwrap().parse::<u64>().unwrap()
}

/// A working set of all the RAM that an image of zeros merely claims.
#[test]
fn working_set_of_claimed_ram_maps_no_zeros() {
    const RAM: u64 = 64 << 30;
    needs!(Userfaultfd);
    let _alone = ALONE.lock().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut body = RAM.to_le_bytes().to_vec();
    body.extend([0, RAM].iter().flat_map(|word| word.to_le_bytes()));
    let mut bytes = b"RAMSNAPW\x01\0\0\0".to_vec();
    bytes.extend(crc32fast::hash(&body).to_le_bytes());
    bytes.extend(body);
    let set = dir.path().join("set");
    fs::write(&set, bytes).unwrap();
    let working_set = WorkingSet::load(&set).unwrap();
    assert_eq!(working_set.bytes(), RAM);
    let chain = Chain::open_sealed(&[image_of_zeros(dir.path(), RAM)]).unwrap();
    let before = page_tables();
    let options = LazyRam::options().working_set(working_set);
    let ram = match options.start(chain) {
        Ok(ram) => ram,
        // The machine has no address space for it.
        Err(
            LazyError::Reserve { .. } | LazyError::Userfaultfd(UserfaultfdError::Register { .. }),
        ) => return,
        Err(other) => panic!("{other:?}"),
    };
    ram.wait().unwrap();
    // Mapping all of the RAM would take two bytes for each KiB: 128 MiB.
    let taken = page_tables().saturating_sub(before);
    assert!(taken < 8 << 20, "{taken} bytes of page tables");
    let mut last = [1; 4096];
    ram.read_at(RAM - 4096, &mut last).unwrap();
    assert_eq!(last, [0; 4096]);
}
