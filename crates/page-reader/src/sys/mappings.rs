//! The mappings of a process and the contents of their missing pages, from `/proc/self/maps`, or
//! with flags from `/proc/<pid>/smaps`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek};
use std::mem;
use std::ops::Range;

use crate::process::{ProcessRegion, merge_newer};

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) addresses: Range<u64>,
    pub(super) backing: Backing,
    /// Device and inode of the file; both 0 without a file.
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// The contents of a page that is accessed for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// Zeros.
    Anonymous,
    /// The file, which shared anonymous memory has too. `offset` is the position in the file of the
    /// first address.
    SharedFile { offset: u64 },
    /// Anything else.
    Unknown,
}

/// Flags of mappings whose missing pages are neither zeros nor those of the file: filled by
/// userfaultfd (um, ui), of a device (pf, io, mm), created by the kernel (de). From
/// `Documentation/filesystems/proc.rst`.
///
/// Only smaps lists um and ui, which is the reason to read it. Huge pages (ht) always have a file,
/// so they are not included.
const UNUSUAL: [&[u8]; 6] = [b"um", b"ui", b"pf", b"io", b"mm", b"de"];

/// Returns the mappings of this process, quickly. Mappings filled by userfaultfd are not
/// distinguished.
pub(super) fn without_flags() -> io::Result<Vec<Mapping>> {
    parse(buffered(&File::open("/proc/self/maps")?), false)
}

/// Returns the mappings with the effect of their flags, for which the kernel visits every page of
/// the process.
pub(super) fn with_flags(mut smaps: &File) -> io::Result<Vec<Mapping>> {
    smaps.rewind()?;
    parse(buffered(smaps), true)
}

fn buffered(file: &File) -> impl BufRead {
    BufReader::with_capacity(64 << 10, file)
}

fn parse(mut text: impl BufRead, flags_follow: bool) -> io::Result<Vec<Mapping>> {
    let mut mappings = Vec::<Mapping>::new();
    // The backing of the mapping unless its flags, which come last, are unusual.
    let mut usual = Backing::Unknown;
    let mut line = Vec::new();
    while text.read_until(b'\n', &mut line)? > 0 {
        if line
            .first()
            .is_some_and(|first| !first.is_ascii_uppercase())
        {
            let mut mapping = header(&line).ok_or(io::ErrorKind::InvalidData)?;
            merge_newer(&mut mappings, mapping.addresses.start, |before| {
                &mut before.addresses
            });
            if flags_follow {
                usual = mem::replace(&mut mapping.backing, Backing::Unknown);
            }
            mappings.push(mapping);
        } else if let Some(flags) = line.strip_prefix(b"VmFlags:")
            && let Some(mapping) = mappings.last_mut()
            && !words(flags).any(|flag| UNUSUAL.contains(&flag))
        {
            mapping.backing = usual;
        }
        line.clear();
    }
    Ok(mappings)
}

fn header(line: &[u8]) -> Option<Mapping> {
    let region = ProcessRegion::parse(line.strip_suffix(b"\n")?)?;
    let (major, minor) = region.device;
    let device = nix::sys::stat::makedev(major.into(), minor.into());
    // Other names without a file belong to mappings of the kernel: vdso, vvar.
    let name = &region.name[..];
    let of_the_process =
        [&b""[..], b"[heap]", b"[stack]"].contains(&name) || name.starts_with(b"[anon:");
    let backing = match (region.permissions.shared, region.inode, device) {
        (false, 0, 0) if of_the_process => Backing::Anonymous,
        // A private mapping of a file has pages of the file and copies of the process.
        (false, ..) | (true, 0, _) => Backing::Unknown,
        (true, ..) => Backing::SharedFile {
            offset: region.offset,
        },
    };
    Some(Mapping {
        addresses: region.addresses,
        backing,
        device,
        inode: region.inode,
    })
}

fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn backing(header: &str, flags: &str) -> Backing {
        let smaps = format!("{header}\nSize:   4 kB\nRss:    0 kB\nVmFlags: {flags} \n");
        let [mapping] = &parse(smaps.as_bytes(), true).unwrap()[..] else {
            panic!("one mapping in {smaps}")
        };
        assert_eq!(mapping.addresses, 0x7f00_0000_1000..0x7f00_0000_2000);
        mapping.backing
    }

    const ANONYMOUS: &str = "7f0000001000-7f0000002000 rw-p 00000000 00:00 0 ";
    const SHARED: &str =
        "7f0000001000-7f0000002000 rw-s 00003000 00:01 4711   /memfd:a b\\012VmFlags (deleted)";

    #[rstest]
    #[case::anonymous(ANONYMOUS, "rd wr mr mw me ac", Backing::Anonymous)]
    #[case::write_protected_by_userfaultfd(ANONYMOUS, "rd wr mr mw me uw ac", Backing::Anonymous)]
    #[case::filled_by_userfaultfd_on_first_touch(
        ANONYMOUS,
        "rd wr mr mw me um ac",
        Backing::Unknown
    )]
    #[case::of_the_kernel(ANONYMOUS, "rd mr pf io de dd", Backing::Unknown)]
    #[case::shared(SHARED, "rd wr sh mr mw me ms", Backing::SharedFile { offset: 0x3000 })]
    #[case::shared_and_filled_on_first_touch(SHARED, "rd wr sh um", Backing::Unknown)]
    #[case::shared_and_mapped_on_first_touch(SHARED, "rd wr sh ui", Backing::Unknown)]
    #[case::huge_pages(SHARED, "rd wr sh mr mw me ms ht", Backing::SharedFile { offset: 0x3000 })]
    #[case::a_file_mapped_privately(
        "7f0000001000-7f0000002000 rw-p 00000000 fe:00 4711  /image",
        "rd wr mr mw me",
        Backing::Unknown
    )]
    fn the_backing_depends_on_header_and_flags(
        #[case] header: &str,
        #[case] flags: &str,
        #[case] expected: Backing,
    ) {
        assert_eq!(backing(header, flags), expected);
    }

    #[test]
    fn a_mapping_without_flags_is_unknown() {
        let smaps = format!("{ANONYMOUS}\nSize:   4 kB\n");
        assert_eq!(
            parse(smaps.as_bytes(), true).unwrap()[0].backing,
            Backing::Unknown
        );
    }

    #[test]
    fn an_invalid_list_is_refused() {
        for flags_follow in [true, false] {
            assert!(parse(&b"7f0000001000 rw-p\n"[..], flags_follow).is_err());
        }
    }

    #[test]
    fn the_last_entry_of_a_growing_mapping_is_used() {
        let entry = |addresses: &str, flags: &str| {
            format!("{addresses} rw-p 00000000 00:00 0 \nVmFlags: rd wr {flags} \n")
        };
        let smaps = entry("1000-2000", "um") + &entry("3000-4000", "um") + &entry("3000-6000", "");
        let mappings = parse(smaps.as_bytes(), true).unwrap();
        let mappings: Vec<_> = mappings
            .into_iter()
            .map(|mapping| (mapping.addresses, mapping.backing))
            .collect();
        assert_eq!(
            mappings,
            [
                (0x1000..0x2000, Backing::Unknown),
                (0x3000..0x6000, Backing::Anonymous),
            ]
        );
    }

    #[rstest]
    #[case::nameless("", Backing::Anonymous)]
    #[case::heap("[heap]", Backing::Anonymous)]
    #[case::stack("[stack]", Backing::Anonymous)]
    #[case::named_by_the_process("[anon:guest ram]", Backing::Anonymous)]
    #[case::code_of_the_kernel("[vdso]", Backing::Unknown)]
    #[case::data_of_the_kernel("[vvar]", Backing::Unknown)]
    fn memory_without_a_file_is_classified_by_its_name(
        #[case] name: &str,
        #[case] expected: Backing,
    ) {
        let maps = format!("{ANONYMOUS}                 {name}\n");
        assert_eq!(parse(maps.as_bytes(), false).unwrap()[0].backing, expected);
    }

    #[test]
    fn lists_with_and_without_flags_agree() {
        let agree = || {
            let smaps = File::open("/proc/self/smaps").unwrap();
            let (quick, thorough) = (without_flags().unwrap(), with_flags(&smaps).unwrap());
            let here = &raw const quick as u64;
            let stack = quick
                .iter()
                .find(|mapping| mapping.addresses.contains(&here));
            assert_eq!(stack.unwrap().backing, Backing::Anonymous);
            quick == thorough
        };
        // Other tests may map memory between the two lists.
        assert!((0..1000).any(|_| agree()));
    }
}
