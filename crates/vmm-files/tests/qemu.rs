//! Files of QEMU with `mapped-ram`, and of libvirt, built field by field.
//!
//! Debian 12 has QEMU 7.2, and `mapped-ram` is in QEMU 9.0 and newer. So these files are built from
//! the description of the format: `docs/devel/migration/mapped-ram.rst` of QEMU, and the fields
//! that `migration/savevm.c` and `migration/ram.c` write. `cargo xtask qemu-e2e` reads those of a
//! real QEMU if the installed one is new enough, such as QEMU 10.0 of Debian's backports.

mod support;

use rstest::rstest;
use support::{Golden, PAGE, assert_ram, noise};
use vmm_files::{Format, GuestFile, Machine, OpenError, RamLayout};

/// A stream that is written field by field. All numbers are big-endian.
struct Stream {
    bytes: Vec<u8>,
}

const MIB: u64 = 1 << 20;

impl Stream {
    /// | bytes | contents |
    /// |---|---|
    /// | 0..4, 4..8 | `QEVM`, version 3 |
    /// | 8 | 7, a configuration |
    /// | 9..13, 13.. | length and text of the machine type |
    /// | next | 5, a subsection: length (1 byte) and text of its name, version (4 bytes), and for capabilities their number (4 bytes), and the length (1 byte) and text of each |
    /// | next | 1, the start of a section: id (4 bytes), length (1 byte) and text `ram`, instance and version 4 (4 bytes each) |
    /// | next | the sum of the lengths of all blocks plus 4 (8 bytes), and the blocks |
    fn new(at: u64, machine: &str, capabilities: &[&str], total: u64) -> Self {
        let mut it = Self {
            bytes: vec![0; at as usize],
        };
        it.put(b"QEVM")
            .u32(3)
            .put(&[7])
            .u32(machine.len() as u32)
            .put(machine.as_bytes());
        it.put(&[5]).name("configuration/capabilities").u32(1);
        it.u32(capabilities.len() as u32);
        for capability in capabilities {
            it.name(capability);
        }
        it.put(&[5])
            .name("configuration/uuid")
            .u32(1)
            .put(&[0xab; 16]);
        it.put(&[1]).u32(2).name("ram").u32(0).u32(4).u64(total | 4);
        it
    }

    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend(bytes);
        self
    }

    fn u32(&mut self, number: u32) -> &mut Self {
        self.put(&number.to_be_bytes())
    }

    fn u64(&mut self, number: u64) -> &mut Self {
        self.put(&number.to_be_bytes())
    }

    fn name(&mut self, name: &str) -> &mut Self {
        self.put(&[name.len() as u8]).put(name.as_bytes())
    }

    /// Adds a block, of which the nonzero pages are stored. The length and text of its name, its
    /// length (8 bytes), and a header of 28 bytes: version 1 (4 bytes), page size, position of the
    /// bitmap, position of the pages (8 bytes each). The bitmap follows the header, in
    /// little-endian words of 64 bits, and the pages are at the next multiple of 1 MiB.
    fn block(&mut self, name: &str, ram: &[u8]) -> &mut Self {
        let len = ram.len() as u64;
        let bitmap_at = self.bytes.len() as u64 + 1 + name.len() as u64 + 8 + 28;
        let words = (len / PAGE).div_ceil(64);
        let pages_at = (bitmap_at + words * 8).next_multiple_of(MIB);
        self.name(name)
            .u64(len)
            .u32(1)
            .u64(PAGE)
            .u64(bitmap_at)
            .u64(pages_at);
        let mut bitmap = vec![0; words as usize * 8];
        for (page, bytes) in ram.chunks(PAGE as usize).enumerate() {
            let stored = bytes.iter().any(|byte| *byte != 0);
            bitmap[page / 8] |= u8::from(stored) << (page % 8);
        }
        self.put(&bitmap);
        self.bytes.resize(pages_at as usize, 0xcc);
        for page in ram.chunks(PAGE as usize) {
            // The place of a page that is not stored may have any bytes.
            match page.iter().all(|byte| *byte == 0) {
                true => self.put(&[0xcc; PAGE as usize]),
                false => self.put(page),
            };
        }
        self
    }

    /// Adds the end of the section and the state of a device.
    fn finish(&mut self) -> Golden {
        self.put(&[0x7e]).u32(2).put(&[4]).put(&[0xaa; 500]);
        Golden::new(self.bytes.clone())
    }
}

fn ram() -> Vec<u8> {
    let mut ram = noise(2 * MIB);
    ram[..5 * PAGE as usize].fill(0);
    ram[70 * PAGE as usize..300 * PAGE as usize].fill(0);
    ram
}

fn golden(machine: &str) -> Golden {
    let rom = noise(64 * PAGE);
    let total = 2 * MIB + 2 * 64 * PAGE;
    let mut stream = Stream::new(0, machine, &["mapped-ram", "multifd"], total);
    stream
        .block("pc.bios", &rom)
        .block("pc.ram", &ram())
        .block("vga.vram", &rom);
    stream.finish()
}

#[test]
fn the_ram_of_the_machine_is_read() {
    let guest = golden("pc-q35-9.2").open(Format::Qemu).unwrap();
    assert_eq!(guest.layout(), &Machine::QemuQ35.layout(2 * MIB).unwrap());
    assert_ram(&guest, &ram());
}

#[test]
fn addresses_are_those_of_the_machine_or_given() {
    let golden = golden("none");
    golden.refused(Format::Qemu, 13, "name a machine or the regions");
    let open = |options: vmm_files::GuestFileOptions| options.open(golden.path(), Format::Qemu);
    let guest = open(GuestFile::options().machine(Machine::QemuVirt)).unwrap();
    assert_eq!(guest.layout().to_string(), "0x40000000..0x40200000");
    let regions = RamLayout::new([(0, MIB), (16 * MIB, MIB)]).unwrap();
    let guest = open(GuestFile::options().layout(regions.clone())).unwrap();
    assert_eq!(guest.layout(), &regions);
    let other = RamLayout::single(0, MIB).unwrap();
    let error = open(GuestFile::options().layout(other)).unwrap_err();
    assert!(
        error.to_string().contains("regions of this guest"),
        "{error}"
    );
}

#[test]
fn memory_backends_are_named() {
    let (one, two) = (noise(MIB), ram());
    let mut stream = Stream::new(0, "pc-q35-9.2", &["mapped-ram"], 3 * MIB);
    let golden = stream
        .block("/objects/m0", &one)
        .block("/objects/m1", &two)
        .finish();
    let error = golden.open(Format::Qemu).unwrap_err().to_string();
    assert!(error.contains("/objects/m0, /objects/m1"), "{error}");
    let named = |names: &[&str]| {
        let options = GuestFile::options();
        let options = names
            .iter()
            .fold(options, |options, name| options.block(*name));
        options.open(golden.path(), Format::Qemu)
    };
    let guest = named(&["/objects/m1", "/objects/m0"]).unwrap();
    assert_ram(&guest, &[two, one].concat());
    assert!(
        named(&["m2"])
            .unwrap_err()
            .to_string()
            .contains("no RAM block \"m2\"")
    );
}

#[test]
fn shared_blocks_are_left_out_by_qemu_and_refused() {
    let mut stream = Stream::new(0, "pc-q35-9.2", &["x-ignore-shared", "mapped-ram"], 2 * MIB);
    // With this capability, each block also has an address (8 bytes).
    stream
        .name("pc.ram")
        .u64(2 * MIB)
        .u64(0)
        .u32(1)
        .u64(PAGE)
        .u64(0)
        .u64(0);
    let error = stream.finish().open(Format::Qemu).unwrap_err().to_string();
    assert!(error.contains("dump its memory backend"), "{error}");
}

#[rstest]
#[case::version(7, &[2], 4, "version is 2")]
#[case::no_configuration(8, &[1], 8, "no configuration")]
#[case::long_machine_type(9, &[1], 9, "the file is damaged")]
#[case::unknown_subsection(24, b"x", 22 + 1, "is not known")]
#[case::too_many_capabilities(23 + 1 + 27 + 4, &[9], 23 + 1 + 27 + 4, "capabilities")]
fn damaged_heads_are_refused_where_they_are(
    #[case] at: usize,
    #[case] bytes: &[u8],
    #[case] offset: u64,
    #[case] words: &str,
) {
    golden("pc-q35-9.2")
        .put(at, bytes)
        .refused(Format::Qemu, offset, words);
}

#[test]
fn streams_without_mapped_ram_are_refused() {
    let mut stream = Stream::new(0, "pc-q35-9.2", &[], MIB);
    stream.finish().refused(Format::Qemu, 13, "mapped-ram");
}

#[test]
fn damaged_blocks_are_refused_where_they_are() {
    let stream = || Stream::new(0, "pc-q35-9.2", &["mapped-ram"], 2 * MIB);
    let at = stream().bytes.len() as u64;
    let header = at + 1 + 6 + 8;
    let block = |len: u64, version, page: u64, bitmap: u64, pages: u64| {
        let mut stream = stream();
        stream
            .name("pc.ram")
            .u64(len)
            .u32(version)
            .u64(page)
            .u64(bitmap)
            .u64(pages);
        stream.bytes.resize(8 * MIB as usize, 0);
        stream.finish()
    };
    let refused = |golden: Golden, at, words| golden.refused(Format::Qemu, at, words);
    refused(block(0, 1, PAGE, 500, MIB), at, "0 bytes");
    refused(block(2 * MIB + 1, 1, PAGE, 500, MIB), at, "bytes");
    refused(block(4 * MIB, 1, PAGE, 500, 4096), at, "than their sum");
    refused(block(2 * MIB, 2, PAGE, 500, MIB), header, "version 2");
    refused(block(2 * MIB, 1, 100, 500, MIB), header + 4, "100 bytes");
    refused(
        block(2 * MIB, 1, PAGE, u64::MAX, MIB),
        header + 12,
        "cut short",
    );
    refused(
        block(2 * MIB, 1, PAGE, 500, u64::MAX - PAGE),
        header + 20,
        "cut short",
    );
    refused(
        block(2 * MIB, 1, PAGE, 500, 7 * MIB),
        header + 20,
        "cut short",
    );
}

#[test]
fn cut_files_are_refused() {
    let golden = golden("pc-q35-9.2");
    for len in [3, 5, 10, 20, 60, 100, MIB as usize, 3 * MIB as usize] {
        let cut = Golden::new(golden.bytes[..len].to_vec());
        std::fs::write(cut.path(), &cut.bytes).unwrap();
        let error = GuestFile::open(cut.path(), Format::Qemu).unwrap_err();
        assert!(error.to_string().contains("cut short"), "{len}: {error}");
    }
}

#[test]
fn changed_files_are_noticed() {
    use page_reader::PageReader;
    let golden = golden("pc-q35-9.2");
    let guest = golden.open(Format::Qemu).unwrap();
    guest.check_source().unwrap();
    let file = std::fs::File::options()
        .append(true)
        .open(golden.path())
        .unwrap();
    std::io::Write::write_all(&mut &file, b"more").unwrap();
    let error = guest.check_source().unwrap_err().to_string();
    assert!(error.contains("repeat the copy"), "{error}");
}

/// | bytes | contents |
/// |---|---|
/// | 0..16 | `LibvirtQemudSave`, or `LibvirtQemudPart` while it is written |
/// | 16..20 | version 2, as all numbers little-endian |
/// | 20..24 | length of the XML and the padding after it |
/// | 24..28 | whether the guest ran |
/// | 28..32 | format: 0 raw, 1 gzip, 2 bzip2, 3 xz, 4 lzop, 5 zstd, 6 sparse |
/// | 32..36 | offset of a cookie in the XML |
/// | 36..92 | unused |
/// | 92.. | XML and padding, and then a stream of QEMU with offsets from byte 0 of the file |
fn libvirt() -> Golden {
    let xml = b"<domstatus/>".len() as u64 + 1 + 65_536;
    let mut stream = Stream::new(92 + xml, "pc-i440fx-9.0", &["mapped-ram"], 2 * MIB);
    let mut golden = stream.block("pc.ram", &ram()).finish();
    golden
        .put(0, b"LibvirtQemudSave")
        .put(16, &2_u32.to_le_bytes());
    golden
        .put(20, &(xml as u32).to_le_bytes())
        .put(24, &[1])
        .put(28, &[6]);
    golden.put(92, b"<domstatus/>");
    golden
}

#[test]
fn sparse_saves_of_libvirt_are_read() {
    let guest = libvirt().open(Format::Libvirt).unwrap();
    assert_eq!(guest.layout(), &Machine::QemuPc.layout(2 * MIB).unwrap());
    assert_ram(&guest, &ram());
}

#[rstest]
#[case::interrupted(12, b"Part", 0, "incomplete")]
#[case::other_version(16, &[3], 16, "version is 3")]
#[case::big_endian(16, &[0, 0, 0, 2], 16, "big-endian")]
#[case::compressed(28, &[5], 28, "image format is zstd")]
#[case::unknown_format(28, &[99], 28, "image format is unknown")]
#[case::no_stream(20, &[0], 92 + 65_536, "no migration stream")]
#[case::past_the_end(20, &[0xff; 4], 92 + 0xffff_ffff, "cut short")]
fn other_saves_of_libvirt_are_refused(
    #[case] at: usize,
    #[case] bytes: &[u8],
    #[case] offset: u64,
    #[case] words: &str,
) {
    libvirt()
        .put(at, bytes)
        .refused(Format::Libvirt, offset, words);
}

#[test]
fn files_of_no_format_are_not_guessed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    for bytes in [vec![], vec![0x7f], noise(3 * PAGE)] {
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(Format::detect(&path).unwrap(), None);
        let error = GuestFile::detect(&path).unwrap_err();
        assert!(matches!(error, OpenError::Unrecognized { .. }), "{error}");
    }
    for format in Format::ALL {
        GuestFile::open(&path, format).unwrap_err();
    }
    assert_eq!(Format::detect(dir.path()).unwrap(), None);
}
