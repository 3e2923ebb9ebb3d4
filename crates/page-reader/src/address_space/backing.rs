//! What is behind a mapping: the contents of its missing pages, and its file.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::makedev;

use crate::mappings::{FlaggedRegion, ProcessRegion};
use crate::sys::open;

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) addresses: Range<u64>,
    pub(super) backing: Backing,
    /// Device and inode of the file; both 0 without a file.
    device: u64,
    inode: u64,
    /// As listed; empty unless the backing is a file.
    name: Vec<u8>,
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

impl Mapping {
    /// Classifies a mapping without knowing its flags: it may be filled by userfaultfd.
    pub(super) fn without_flags(region: ProcessRegion) -> Self {
        let (major, minor) = region.device;
        let device = makedev(major.into(), minor.into());
        // Other names without a file belong to mappings of the kernel: vdso, vvar.
        let name = &region.name[..];
        let of_the_process =
            [&b""[..], b"[heap]", b"[stack]"].contains(&name) || name.starts_with(b"[anon:");
        let backing = match (region.permissions.shared, region.inode, device) {
            (false, 0, 0) if of_the_process => Backing::Anonymous,
            // A private mapping of a file has pages of the file and copies of the process.
            (false, ..) | (true, 0, _) => Backing::Unknown,
            _ if is_system_v_segment(name) => Backing::Unknown,
            (true, ..) => Backing::SharedFile {
                offset: region.offset,
            },
        };
        let name = match backing {
            Backing::SharedFile { .. } => region.name,
            Backing::Anonymous | Backing::Unknown => Vec::new(),
        };
        Self {
            addresses: region.addresses,
            backing,
            device,
            inode: region.inode,
            name,
        }
    }

    /// Classifies a mapping with its flags. Missing pages that userfaultfd, a device or the kernel
    /// provides are neither zeros nor those of the file.
    ///
    /// Only smaps lists the flags of userfaultfd, which is the reason to read it. Huge pages always
    /// have a file, so their flag does not matter.
    pub(super) fn with_flags(mapping: FlaggedRegion) -> Self {
        let usual = mapping
            .flags
            .is_some_and(|flags| !flags.filled_on_fault && !flags.special);
        let mapping = Self::without_flags(mapping.region);
        match usual {
            true => mapping,
            false => Self {
                backing: Backing::Unknown,
                ..mapping
            },
        }
    }
}

/// Returns `true` for the name of a System V segment. Its inode number is its id, counted
/// independently of the numbers of the files on the same device: memfds, and for segments in huge
/// pages those of hugetlbfs. Two segments of different IPC namespaces may have one id.
fn is_system_v_segment(name: &[u8]) -> bool {
    name.starts_with(b"/SYSV")
}

/// Opens the file of a shared mapping of `process`.
///
/// The file is opened through the mapping, which requires `CAP_CHECKPOINT_RESTORE`, or through a
/// descriptor of the process. If `process` denotes another program by now, none of its files is the
/// file of the mapping.
///
/// A descriptor must also have the name of the mapping. The numbers of the other objects in shared
/// memory, such as `/dev/zero` and buffers of graphics drivers, are unique, but a descriptor may
/// belong to a System V segment.
pub(super) fn file_behind(mapping: &Mapping, process: &str) -> Option<File> {
    let Range { start, end } = mapping.addresses;
    let of_mapping = open(format!("{process}/map_files/{start:x}-{end:x}"));
    of_mapping
        .ok()
        .filter(|file| is_behind(file, mapping))
        .or_else(|| {
            let descriptors = fs::read_dir(format!("{process}/fd")).ok()?;
            descriptors.flatten().find_map(|descriptor| {
                let path = descriptor.path();
                let metadata = fs::metadata(&path).ok()?;
                let same = (metadata.dev(), metadata.ino()) == (mapping.device, mapping.inode);
                let file = open(path.to_str().filter(|_| same && metadata.is_file())?).ok()?;
                let same_name = listed_name(&path)? == mapping.name;
                (same_name && is_behind(&file, mapping)).then_some(file)
            })
        })
}

/// Returns the name of an open file as mappings of it are listed.
fn listed_name(descriptor: &Path) -> Option<Vec<u8>> {
    let name = fs::read_link(descriptor).ok()?.into_os_string().into_vec();
    let lines: Vec<_> = name.split(|byte| *byte == b'\n').collect();
    Some(lines.join(&b"\\012"[..]))
}

/// Returns `true` if `file` is the file of the mapping.
fn is_behind(file: &File, mapping: &Mapping) -> bool {
    file.metadata().is_ok_and(|metadata| {
        metadata.is_file() && (metadata.dev(), metadata.ino()) == (mapping.device, mapping.inode)
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::mappings::{maps, smaps};

    fn quick(list: &str) -> Vec<Mapping> {
        let regions = maps(list.as_bytes()).unwrap().into_iter();
        regions.map(Mapping::without_flags).collect()
    }

    fn thorough(list: &str) -> Vec<Mapping> {
        let mappings = smaps(list.as_bytes()).unwrap().into_iter();
        mappings.map(Mapping::with_flags).collect()
    }

    fn backing(header: &str, flags: &str) -> Backing {
        let smaps = format!("{header}\nSize:   4 kB\nRss:    0 kB\nVmFlags: {flags} \n");
        let [mapping] = &thorough(&smaps)[..] else {
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
    #[case::a_system_v_segment(
        "7f0000001000-7f0000002000 rw-s 00000000 00:01 4711   /SYSV0000002a (deleted)",
        "rd wr sh mr mw me ms",
        Backing::Unknown
    )]
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
        assert_eq!(thorough(&smaps)[0].backing, Backing::Unknown);
    }

    #[test]
    fn the_last_entry_of_a_growing_mapping_is_used() {
        let entry = |addresses: &str, flags: &str| {
            format!("{addresses} rw-p 00000000 00:00 0 \nVmFlags: rd wr {flags} \n")
        };
        let smaps = entry("1000-2000", "um") + &entry("3000-4000", "um") + &entry("3000-6000", "");
        let mappings: Vec<_> = thorough(&smaps)
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
        assert_eq!(quick(&maps)[0].backing, expected);
    }

    #[test]
    fn lists_with_and_without_flags_agree() {
        let agree = || {
            let list = |name| fs::read_to_string(format!("/proc/self/{name}")).unwrap();
            let (quick, thorough) = (quick(&list("maps")), thorough(&list("smaps")));
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
