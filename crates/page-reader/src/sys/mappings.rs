//! The mappings of a process, and what a page that isn't there means: by `/proc/self/maps`, or with flags by `/proc/<pid>/smaps`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek};
use std::mem;
use std::ops::Range;

use crate::process::{ProcessRegion, supersede};

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) addresses: Range<u64>,
    pub(super) backing: Backing,
    /// Device and inode of the file, both 0 where there is none.
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// Where a page comes from that is touched for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// A page of zeros.
    Anonymous,
    /// The file, which shared anonymous memory has too; its position of the first address, in bytes.
    SharedFile { offset: u64 },
    /// Something else.
    Unknown,
}

/// Flags of mappings whose missing pages are neither zeros nor the file's: filled by userfaultfd (um, ui: the reason to read smaps, as
/// no other file says it), of a device (pf, io, mm), made by the kernel (de). From `Documentation/filesystems/proc.rst`. Huge pages (ht) are of a
/// file always, which says what it has.
const UNUSUAL: [&[u8]; 6] = [b"um", b"ui", b"pf", b"io", b"mm", b"de"];

/// Of this process, and soon had. What userfaultfd fills looks like any other.
pub(super) fn without_flags() -> io::Result<Vec<Area>> {
    parse(buffered(&File::open("/proc/self/maps")?), false)
}

/// The kernel looks at every page of the process for it.
pub(super) fn with_flags(mut smaps: &File) -> io::Result<Vec<Area>> {
    smaps.rewind()?;
    parse(buffered(smaps), true)
}

fn buffered(file: &File) -> impl BufRead {
    BufReader::with_capacity(64 << 10, file)
}

fn parse(mut mappings: impl BufRead, flags_follow: bool) -> io::Result<Vec<Area>> {
    let mut areas = Vec::<Area>::new();
    // What the mapping is unless its flags, which come last, say that it's unusual.
    let mut usual = Backing::Unknown;
    let mut line = Vec::new();
    while mappings.read_until(b'\n', &mut line)? > 0 {
        if line
            .first()
            .is_some_and(|first| !first.is_ascii_uppercase())
        {
            let mut area = header(&line).ok_or(io::ErrorKind::InvalidData)?;
            supersede(&mut areas, area.addresses.start, |before| {
                &mut before.addresses
            });
            if flags_follow {
                usual = mem::replace(&mut area.backing, Backing::Unknown);
            }
            areas.push(area);
        } else if let Some(flags) = line.strip_prefix(b"VmFlags:")
            && let Some(area) = areas.last_mut()
            && !words(flags).any(|flag| UNUSUAL.contains(&flag))
        {
            area.backing = usual;
        }
        line.clear();
    }
    Ok(areas)
}

fn header(line: &[u8]) -> Option<Area> {
    let region = ProcessRegion::parse(line.strip_suffix(b"\n")?)?;
    let (major, minor) = region.device;
    let device = nix::sys::stat::makedev(major.into(), minor.into());
    // Another name without a file is of the kernel's making: vdso, vvar.
    let name = &region.name[..];
    let of_the_process =
        [&b""[..], b"[heap]", b"[stack]"].contains(&name) || name.starts_with(b"[anon:");
    let backing = match (region.permissions.shared, region.inode, device) {
        (false, 0, 0) if of_the_process => Backing::Anonymous,
        // A private mapping of a file shows the file's pages, and the process's own over them.
        (false, ..) | (true, 0, _) => Backing::Unknown,
        (true, ..) => Backing::SharedFile {
            offset: region.offset,
        },
    };
    Some(Area {
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
        let [area] = &parse(smaps.as_bytes(), true).unwrap()[..] else {
            panic!("one mapping in {smaps}")
        };
        assert_eq!(area.addresses, 0x7f00_0000_1000..0x7f00_0000_2000);
        area.backing
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
    fn what_a_page_that_is_not_there_means(
        #[case] header: &str,
        #[case] flags: &str,
        #[case] expected: Backing,
    ) {
        assert_eq!(backing(header, flags), expected);
    }

    #[test]
    fn a_mapping_whose_flags_are_not_told_is_unknown() {
        let smaps = format!("{ANONYMOUS}\nSize:   4 kB\n");
        assert_eq!(
            parse(smaps.as_bytes(), true).unwrap()[0].backing,
            Backing::Unknown
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_as_a_whole() {
        for flags_follow in [true, false] {
            assert!(parse(&b"7f0000001000 rw-p\n"[..], flags_follow).is_err());
        }
    }

    #[test]
    fn a_mapping_that_grew_while_the_list_was_read_is_what_it_was_last() {
        let told = |addresses: &str, flags: &str| {
            format!("{addresses} rw-p 00000000 00:00 0 \nVmFlags: rd wr {flags} \n")
        };
        let smaps = told("1000-2000", "um") + &told("3000-4000", "um") + &told("3000-6000", "");
        let areas = parse(smaps.as_bytes(), true).unwrap();
        let areas: Vec<_> = areas
            .into_iter()
            .map(|area| (area.addresses, area.backing))
            .collect();
        assert_eq!(
            areas,
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
    fn a_name_without_a_file_says_whose_the_memory_is(
        #[case] name: &str,
        #[case] expected: Backing,
    ) {
        let maps = format!("{ANONYMOUS}                 {name}\n");
        assert_eq!(parse(maps.as_bytes(), false).unwrap()[0].backing, expected);
    }

    #[test]
    fn without_flags_the_mappings_of_this_process_are_what_they_are_with_them() {
        let agree = || {
            let smaps = File::open("/proc/self/smaps").unwrap();
            let (quick, thorough) = (without_flags().unwrap(), with_flags(&smaps).unwrap());
            let here = &raw const quick as u64;
            let stack = quick.iter().find(|area| area.addresses.contains(&here));
            assert_eq!(stack.unwrap().backing, Backing::Anonymous);
            quick == thorough
        };
        // Other tests map memory meanwhile.
        assert!((0..1000).any(|_| agree()));
    }
}
