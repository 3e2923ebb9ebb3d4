//! ELF cores: golden bytes, cores that are written and read again, and gdb.

mod support;

use std::ops::ControlFlow;
use std::process::Command;

use page_reader::RamLayout;
use support::{Golden, PAGE, assert_ram, layout, noise, write};
use test_machine::needs;
use vmm_files::{ElfMachine, FilePlan, Format, GuestFile, find_vmcoreinfo};

/// Returns a core of two segments:
///
/// | bytes | contents |
/// |---|---|
/// | 0..64 | header: 64 bits, little-endian, `ET_CORE` (4), x86-64 (62), version 1; the program headers begin at 64 (field at 32) and there are 3 (at 56) of 56 bytes (at 54) |
/// | 64..120 | `PT_NOTE` (4) of no bytes |
/// | 120..176 | `PT_LOAD` (1): position 0x1000, `p_vaddr` 0, `p_paddr` 0x100000, stored and full size 0x2000 |
/// | 176..232 | `PT_LOAD`: position 0x3000, `p_paddr` 0, stored 0x1000 of 0x3000 |
/// | 0x1000..0x4000 | the memory |
fn golden() -> Golden {
    let mut bytes = vec![0; 0x1000];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &4_u16.to_le_bytes());
    put(18, &62_u16.to_le_bytes());
    put(20, &1_u32.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(52, &64_u16.to_le_bytes());
    put(54, &56_u16.to_le_bytes());
    put(56, &3_u16.to_le_bytes());
    put(64, &4_u32.to_le_bytes());
    for (at, position, address, stored, size) in [
        (120, 0x1000_u64, 0x10_0000_u64, 0x2000_u64, 0x2000_u64),
        (176, 0x3000, 0, 0x1000, 0x3000),
    ] {
        put(at, &1_u32.to_le_bytes());
        put(at + 8, &position.to_le_bytes());
        put(at + 24, &address.to_le_bytes());
        put(at + 32, &stored.to_le_bytes());
        put(at + 40, &size.to_le_bytes());
    }
    bytes.extend(noise(0x3000));
    Golden::new(bytes)
}

/// The RAM of the golden core: its second segment has the lower addresses.
fn golden_ram(golden: &Golden) -> Vec<u8> {
    let mut ram = golden.bytes[0x3000..0x4000].to_vec();
    ram.resize(0x3000, 0);
    ram.extend(&golden.bytes[0x1000..0x3000]);
    ram
}

#[test]
fn segments_are_ram_at_their_physical_addresses() {
    let golden = golden();
    let guest = golden.open(Format::Elf).unwrap();
    assert_eq!(
        guest.layout().to_string(),
        "0x0..0x3000, 0x100000..0x102000"
    );
    assert_ram(&guest, &golden_ram(&golden));
}

#[test]
fn repeated_segments_of_the_same_bytes_are_one() {
    // A dump with paging has a segment for each virtual mapping.
    let mut golden = golden();
    golden.bytes.copy_within(120..176, 64);
    golden.put(64 + 8, &0x2000_u64.to_le_bytes());
    golden.put(64 + 24, &0x10_1000_u64.to_le_bytes());
    golden.put(64 + 32, &0x1000_u64.to_le_bytes());
    golden.put(64 + 40, &0x1000_u64.to_le_bytes());
    assert_ram(&golden.open(Format::Elf).unwrap(), &golden_ram(&golden));
    // The same addresses with other bytes.
    golden.put(64 + 8, &0x1000_u64.to_le_bytes());
    golden.refused(Format::Elf, 64 + 24, "dump it without paging");
}

#[test]
fn damaged_cores_are_refused_where_they_are_damaged() {
    let max = u64::MAX.to_le_bytes();
    golden()
        .put(4, &[1])
        .refused(Format::Elf, 4, "not of 64 bits");
    golden().put(5, &[2]).refused(Format::Elf, 5, "big-endian");
    golden()
        .put(16, &[2])
        .refused(Format::Elf, 16, "not a core");
    golden()
        .put(32, &max)
        .refused(Format::Elf, 32, "copy it again");
    golden().put(54, &[32]).refused(Format::Elf, 54, "32 bytes");
    golden()
        .put(56, &[0])
        .refused(Format::Elf, 56, "no segment");
    golden()
        .put(56, &[0xfe, 0xff])
        .refused(Format::Elf, 32, "copy it again");
    golden()
        .put(128, &max)
        .refused(Format::Elf, 128, "copy it again");
    golden()
        .put(144, &max)
        .refused(Format::Elf, 144, "address space");
    golden()
        .put(152, &[0, 0x30])
        .refused(Format::Elf, 152, "more bytes than it has");
    golden()
        .put(144, &[0, 0x10, 0])
        .refused(Format::Elf, 144, "overlaps");
    // More segments than are read, by PN_XNUM: the field at 44 of a section header.
    let mut many = golden();
    many.put(56, &[0xff, 0xff]).put(40, &256_u64.to_le_bytes());
    many.put(256 + 44, &u32::MAX.to_le_bytes());
    many.refused(Format::Elf, 56, "not supported");
    many.put(40, &max).refused(Format::Elf, 40, "copy it again");
    // Cut in the memory.
    let mut cut = golden();
    cut.bytes.truncate(0x3800);
    cut.refused(Format::Elf, 184, "cut short");
    cut.bytes.truncate(60);
    cut.refused(Format::Elf, 0, "cut short");
}

#[test]
fn unaligned_segments_are_an_error_of_the_layout() {
    let mut golden = golden();
    golden.put(144, &[1]);
    let error = golden.open(Format::Elf).unwrap_err().to_string();
    assert!(error.contains("multiple of 4096"), "{error}");
}

#[test]
fn written_cores_are_read_as_the_same_ram() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("core");
    let mut ram = noise(layout().ram_size());
    ram[10 * PAGE as usize..30 * PAGE as usize].fill(0);
    for (skip_zeros, written) in [(true, 236), (false, 256)] {
        let plan = FilePlan::elf(&layout(), ElfMachine::X86_64, b"some notes").unwrap();
        assert_eq!(write(&path, &plan, &ram, skip_zeros), written * PAGE);
        let guest = GuestFile::open(&path, Format::Elf).unwrap();
        assert_eq!(guest.layout(), &layout());
        assert_ram(&guest, &ram);
    }
}

/// The fields of a written core, at their offsets.
#[test]
fn written_headers_are_those_of_the_elf_specification() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("core");
    let plan = FilePlan::elf(&layout(), ElfMachine::Aarch64, b"notes").unwrap();
    write(&path, &plan, &noise(layout().ram_size()), true);
    let bytes = std::fs::read(&path).unwrap();
    let number = |at: usize, len: usize| {
        let mut field = [0; 8];
        field[..len].copy_from_slice(&bytes[at..at + len]);
        u64::from_le_bytes(field)
    };
    assert_eq!(&bytes[..7], b"\x7fELF\x02\x01\x01");
    let header = [
        (16, 2, 4),
        (18, 2, 183),
        (20, 4, 1),
        (24, 8, 0),
        (32, 8, 64),
        (40, 8, 0),
    ];
    let counts = [
        (48, 4, 0),
        (52, 2, 64),
        (54, 2, 56),
        (56, 2, 3),
        (58, 2, 0),
        (60, 2, 0),
    ];
    for (at, len, expected) in header.into_iter().chain(counts) {
        assert_eq!(number(at, len), expected, "at {at}");
    }
    let segment = |at: usize| {
        let fields = [8, 16, 24, 32, 40, 48].map(|field| number(at + field, 8));
        (number(at, 4), fields)
    };
    assert_eq!(segment(64), (4, [232, 0, 0, 5, 0, 4]));
    assert_eq!(segment(120), (1, [0x1000, 0, 0, 0x4_0000, 0x4_0000, 4096]));
    let high = 4 << 30;
    assert_eq!(
        segment(176),
        (1, [0x4_1000, high, high, 0xc_0000, 0xc_0000, 4096])
    );
    assert_eq!(&bytes[232..237], b"notes");
}

#[test]
fn cores_may_have_more_segments_than_a_16_bit_number() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("core");
    let count = 66_000;
    // Every second page.
    let regions = (0..count).map(|number| (number * 2 * PAGE, PAGE));
    let layout = RamLayout::new(regions).unwrap();
    let plan = FilePlan::elf(&layout, ElfMachine::X86_64, &[]).unwrap();
    let mut ram = vec![0; layout.ram_size() as usize];
    ram[65_999 * PAGE as usize..].fill(7);
    write(&path, &plan, &ram, true);
    let guest = GuestFile::open(&path, Format::Elf).unwrap();
    assert_eq!(guest.layout(), &layout);
    assert_ram(&guest, &ram);
}

/// Returns the note of a Linux kernel: the lengths of name and description, the type 0, the name,
/// and the description.
fn vmcoreinfo(release: &str) -> Vec<u8> {
    let text = format!("OSRELEASE={release}\nPAGESIZE=4096\n");
    let mut note = 11_u32.to_le_bytes().to_vec();
    note.extend((text.len() as u32).to_le_bytes());
    note.extend(b"\0\0\0\0VMCOREINFO\0\0");
    note.extend(text.as_bytes());
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

#[test]
fn the_note_of_a_linux_kernel_is_found_in_its_memory() {
    let note = vmcoreinfo("6.1.0");
    let find = |pages: &[(usize, &[u8])]| {
        let mut ram = vec![0; 3 << 20];
        for (at, bytes) in pages {
            ram[*at..*at + bytes.len()].copy_from_slice(bytes);
        }
        find_vmcoreinfo(&ram, 3 << 20, &mut |_| ControlFlow::Continue(())).unwrap()
    };
    let page = PAGE as usize;
    assert_eq!(find(&[(300 * page, &note)]), Some(note.clone()));
    assert_eq!(find(&[(0, &note), (767 * page, &note)]), Some(note.clone()));
    // Inside a page, cut by the end of the RAM, or with another one.
    assert_eq!(find(&[(300 * page + 8, &note)]), None);
    assert_eq!(
        find(&[(5 * page, &note), (9 * page, &vmcoreinfo("6.2.0"))]),
        None
    );
    let mut long = note.clone();
    long[4..8].copy_from_slice(&60_000_u32.to_le_bytes());
    assert_eq!(find(&[(767 * page, &long)]), None);
    assert_eq!(find(&[(5 * page, &long)]).unwrap().len(), 60_024);
    long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(find(&[(5 * page, &long)]), None);
    let error = find_vmcoreinfo(&vec![1; 4096], 4096, &mut |_| ControlFlow::Break(()));
    assert_eq!(error.unwrap_err().kind(), std::io::ErrorKind::Interrupted);
}

/// drgn reads by both addresses.
#[test]
fn drgn_reads_the_memory_of_a_written_core() {
    needs!(Drgn);
    let dir = tempfile::tempdir().unwrap();
    let (path, script) = (dir.path().join("core"), dir.path().join("read.py"));
    let (layout, ram) = (layout(), noise(layout().ram_size()));
    let plan = FilePlan::elf(&layout, ElfMachine::X86_64, &[]).unwrap();
    write(&path, &plan, &ram, true);
    let address = (4_u64 << 30) + 8;
    let text = format!(
        "import drgn\nprog = drgn.Program()\nprog.set_core_dump('{}')\n\
         print([prog.read({address}, 8, physical).hex() for physical in (False, True)])\n",
        path.display()
    );
    std::fs::write(&script, text).unwrap();
    let mut drgn = Command::new("drgn");
    let output = drgn
        .args(["--no-default-symbols", "-c"])
        .arg(&path)
        .arg(&script);
    let output = output.output().unwrap();
    let at = layout.offset_of(address).unwrap() as usize;
    let word: String = ram[at..at + 8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains(&format!("['{word}', '{word}']")),
        "{output:?}"
    );
}

/// gdb reads guest-physical memory by `p_vaddr`.
#[test]
fn gdb_reads_the_memory_of_a_written_core() {
    needs!(Gdb);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("core");
    let (layout, ram) = (layout(), noise(layout().ram_size()));
    let machine = ElfMachine::of_host().unwrap_or(ElfMachine::X86_64);
    let plan = FilePlan::elf(&layout, machine, &[]).unwrap();
    write(&path, &plan, &ram, true);
    let addresses = [0x5008, 0x3_fff8, 4 << 30, (4 << 30) + 0xb_fff8];
    let mut gdb = Command::new("gdb");
    gdb.args(["-batch", "-nx", "-ex"])
        .arg(format!("core-file {}", path.display()));
    for address in addresses {
        gdb.arg("-ex").arg(format!("x/1gx {address:#x}"));
    }
    let output = gdb.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    for address in addresses {
        let offset = layout.offset_of(address).unwrap() as usize;
        let word = u64::from_le_bytes(ram[offset..offset + 8].try_into().unwrap());
        let line = format!("{address:#x}:\t{word:#018x}");
        assert!(text.contains(&line), "no {line:?} in {output:?}");
    }
}
