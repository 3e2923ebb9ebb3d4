//! Alone in its process, whose memory it measures.
#![cfg(target_os = "linux")]

use memory_writer::MemoryWriter;
use test_machine::tracked::Memory;

/// The most memory that this process had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() << 10
}

#[test]
fn untouched_memory_is_dumped_without_touching_it() {
    const SIZE: u64 = 4 << 30;
    let dir = tempfile::tempdir().unwrap();
    let ram = Memory::new(SIZE).unwrap();
    ram.write(3 << 30, b"!");
    let before = peak();
    for zeros in [false, true] {
        let dest = dir.path().join("mem");
        let options = MemoryWriter::options()
            .skip_untouched(true)
            .skip_zeros(zeros);
        let mut writer = options.open(&dest, SIZE, 4096).unwrap();
        writer.write_full(&ram).unwrap();
        writer.commit().unwrap();
        let file = std::fs::File::open(&dest).unwrap();
        assert!(sparse_file::allocated_bytes(&file).unwrap() <= 64 << 10);
    }
    let grown = peak() - before;
    assert!(grown <= 4 << 20, "{grown} bytes more");
}
