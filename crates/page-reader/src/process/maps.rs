//! The mappings of a process, from `/proc/<pid>/maps`.

use std::cmp::Reverse;
use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;

/// The mappings of a process at the time of the call.
///
/// The regions of a guest's RAM are found by name if the VMM names them (a memfd, a file), by
/// address if the VMM reports it, or else guessed by size. [`ProcessMemory`](crate::ProcessMemory)
/// reads them.
///
/// # Examples
/// ```
/// use page_reader::{PageReader, ProcessMaps, ProcessMemory};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pid = std::process::id();
/// let maps = ProcessMaps::of(pid)?;
/// let stack = maps.named("[stack]")?;
/// assert!(stack.permissions.read && stack.permissions.write);
///
/// let memory = ProcessMemory::open(pid, [(stack.addresses.start, stack.size())])?;
/// let mut word = [0; 8];
/// memory.read_at(stack.size() - 8, &mut word)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ProcessMaps {
    pid: u32,
    /// Ascending by address.
    regions: Vec<ProcessRegion>,
}

/// A range of addresses that a process has mapped.
///
/// A region is a line of `/proc/<pid>/maps`, or several adjacent lines with consecutive parts of
/// one file: the kernel splits a mapping when a part of it is treated differently. Anonymous memory
/// is not joined.
///
/// [`Display`](fmt::Display) writes one line without control characters, even if the name has some.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessRegion {
    /// The addresses in the process. Regions are not empty and do not overlap.
    pub addresses: Range<u64>,
    /// The access that the process has.
    pub permissions: Permissions,
    /// The position of the first byte in the file, in bytes; 0 without a file.
    pub offset: u64,
    /// The major and minor number of the file's device; both 0 without a file.
    pub device: (u32, u32),
    /// The inode number of the file; 0 without a file.
    pub inode: u64,
    /// The name as written by the kernel, possibly not UTF-8: a path, `/memfd:ram (deleted)`,
    /// `[heap]`, or empty for most anonymous memory. A line feed is written as `\012`, any other
    /// byte as itself.
    pub name: Vec<u8>,
}

/// The access that a process has to a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// The process may read.
    pub read: bool,
    /// The process may write.
    pub write: bool,
    /// The process may execute.
    pub execute: bool,
    /// Writes are visible to all users of the file. If `false`, the process has its own copy.
    pub shared: bool,
}

/// An error of listing or finding the regions of a process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessMapsError {
    /// The process does not exist or has ended.
    #[error(
        "process {pid} does not exist or has no memory: check that it runs and is not a kernel \
         thread"
    )]
    Gone {
        /// The process id.
        pid: u32,
    },
    /// The list cannot be read.
    #[error(
        "failed to read /proc/{pid}/maps: check that this process may trace it (same user, or \
         CAP_SYS_PTRACE)"
    )]
    Read {
        /// The process id.
        pid: u32,
        /// The system error.
        source: io::Error,
    },
    /// A line of the list is not a mapping.
    #[error("line {line} of /proc/{pid}/maps is not a mapping: {text}")]
    Line {
        /// The process id.
        pid: u32,
        /// The line number, from 1.
        line: usize,
        /// The line, control characters escaped.
        text: String,
    },
    /// No region has this name.
    #[error(
        "process {pid} has no mapping whose name contains {name:?}; its largest writable regions \
         are:{}",
        list(regions)
    )]
    NotFound {
        /// The process id.
        pid: u32,
        /// The name searched for.
        name: String,
        /// The largest [candidates](ProcessMaps::candidates), at most 8.
        regions: Vec<ProcessRegion>,
    },
    /// Several regions have this name.
    #[error(
        "process {pid} has {} mappings whose name contains {name:?}: give the address of one of \
         them:{}",
        regions.len(),
        list(regions)
    )]
    Ambiguous {
        /// The process id.
        pid: u32,
        /// The name searched for.
        name: String,
        /// All regions with this name.
        regions: Vec<ProcessRegion>,
    },
}

/// The maximum number of candidates in an error.
const MAX_LISTED: usize = 8;

impl ProcessMaps {
    /// Returns the mappings of process `pid`.
    ///
    /// # Errors
    /// Returns an error if the process has ended, may not be examined, or if the list has an
    /// unknown format.
    pub fn of(pid: u32) -> Result<Self, ProcessMapsError> {
        Self::list(&format!("/proc/{pid}"), pid)
    }

    /// Returns the mappings of the calling process.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    pub fn of_this_process() -> Result<Self, ProcessMapsError> {
        // By "self": if /proc belongs to another PID namespace, the number is that of another
        // process.
        Self::list("/proc/self", std::process::id())
    }

    /// Returns the mappings of `process`, a directory in `/proc`.
    pub(super) fn list(process: &str, pid: u32) -> Result<Self, ProcessMapsError> {
        let text =
            fs::read(format!("{process}/maps")).map_err(|source| {
                match super::is_not_found(&source) {
                    true => ProcessMapsError::Gone { pid },
                    false => ProcessMapsError::Read { pid, source },
                }
            })?;
        let maps = Self::parse(pid, &text)?;
        // A zombie process has no memory.
        if maps.regions.is_empty() {
            return Err(ProcessMapsError::Gone { pid });
        }
        Ok(maps)
    }

    fn parse(pid: u32, text: &[u8]) -> Result<Self, ProcessMapsError> {
        let mut regions = Vec::<ProcessRegion>::new();
        let lines = text.strip_suffix(b"\n").unwrap_or(text);
        for (index, line) in lines.split(|byte| *byte == b'\n').enumerate() {
            if text.is_empty() {
                break;
            }
            let region = ProcessRegion::parse(line).ok_or_else(|| ProcessMapsError::Line {
                pid,
                line: index + 1,
                text: printable(line),
            })?;
            merge_newer(&mut regions, region.addresses.start, |before| {
                &mut before.addresses
            });
            match regions.last_mut() {
                Some(last) if last.is_continued_by(&region) => {
                    last.addresses.end = region.addresses.end
                }
                _ => regions.push(region),
            }
        }
        Ok(Self { pid, regions })
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns all regions, ascending by address.
    #[must_use]
    pub fn regions(&self) -> &[ProcessRegion] {
        &self.regions
    }

    /// Returns the region that contains `address`.
    #[must_use]
    pub fn at(&self, address: u64) -> Option<&ProcessRegion> {
        let index = self
            .regions
            .partition_point(|region| region.addresses.end <= address);
        self.regions
            .get(index)
            .filter(|region| region.addresses.contains(&address))
    }

    /// Returns the regions with this name, ascending by address. If there are none, returns those
    /// whose name contains it.
    ///
    /// ` (deleted)` at the end of a region's name is optional in `name`: every memfd has it. A
    /// guest with a gap in its RAM may have a region on each side of the gap, both of one file.
    /// Their [`offset`](ProcessRegion::offset) determines their order.
    #[must_use]
    pub fn all_named(&self, name: impl AsRef<[u8]>) -> Vec<&ProcessRegion> {
        let name = name.as_ref();
        let named = |is: fn(&[u8], &[u8]) -> bool| -> Vec<_> {
            let regions = self.regions.iter();
            regions.filter(|region| is(&region.name, name)).collect()
        };
        let exactly =
            named(|has, name| has == name || has.strip_suffix(b" (deleted)") == Some(name));
        if exactly.is_empty() && !name.is_empty() {
            named(|has, name| has.windows(name.len()).any(|part| part == name))
        } else {
            exactly
        }
    }

    /// Returns the only region with this name, or whose name contains it, as in
    /// [`all_named`](Self::all_named).
    ///
    /// # Errors
    /// Returns an error if there is no such region or several. The error lists the alternatives.
    pub fn named(&self, name: impl AsRef<[u8]>) -> Result<&ProcessRegion, ProcessMapsError> {
        let name = name.as_ref();
        let found = self.all_named(name);
        let pid = self.pid;
        let printable = || String::from_utf8_lossy(name).into_owned();
        let owned = |regions: &[&ProcessRegion]| regions.iter().copied().cloned().collect();
        match found[..] {
            [one] => Ok(one),
            [] => {
                let mut regions = self.candidates();
                regions.truncate(MAX_LISTED);
                Err(ProcessMapsError::NotFound {
                    pid,
                    name: printable(),
                    regions: owned(&regions),
                })
            }
            _ => Err(ProcessMapsError::Ambiguous {
                pid,
                name: printable(),
                regions: owned(&found),
            }),
        }
    }

    /// Returns the regions that may be a guest's RAM: readable and writable memory, the largest
    /// first.
    ///
    /// The first region is a good guess for a VMM with one guest whose RAM is contiguous. Ask the
    /// user to confirm it. Mappings of devices and other special files (`anon_inode:`) are
    /// excluded.
    #[must_use]
    pub fn candidates(&self) -> Vec<&ProcessRegion> {
        let may_be_ram = |region: &&ProcessRegion| {
            region.permissions.read
                && region.permissions.write
                && !region.name.starts_with(b"anon_inode:")
        };
        let mut candidates: Vec<_> = self.regions.iter().filter(may_be_ram).collect();
        candidates.sort_by_key(|region| Reverse(region.size()));
        candidates
    }
}

/// Removes or cuts the mappings at the end of `listed` that a newer mapping, which starts at
/// `start`, replaces.
///
/// The kernel produces a list in several reads. A mapping that grows between two of them is listed
/// again, and the later entry is valid.
pub(crate) fn merge_newer<T>(
    listed: &mut Vec<T>,
    start: u64,
    addresses: impl Fn(&mut T) -> &mut Range<u64>,
) {
    while listed
        .pop_if(|before| start <= addresses(before).start)
        .is_some()
    {}
    if let Some(before) = listed.last_mut() {
        let before = addresses(before);
        before.end = before.end.min(start);
    }
}

impl ProcessRegion {
    /// Parses a line of `/proc/<pid>/maps` without its line feed:
    /// `start-end perms offset major:minor inode   name`. From
    /// `Documentation/filesystems/proc.rst`.
    pub(crate) fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        let mut field = || str::from_utf8(fields.next()?).ok();
        let hex = |digits: &str| {
            let all_digits = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            u64::from_str_radix(digits, 16).ok().filter(|_| all_digits)
        };
        let (start, end) = field()?.split_once('-')?;
        let addresses = hex(start)?..hex(end)?;
        let permissions = Permissions::parse(field()?)?;
        let offset = hex(field()?)?;
        let (major, minor) = field()?.split_once(':')?;
        let device = (hex(major)?.try_into().ok()?, hex(minor)?.try_into().ok()?);
        let inode = field()?;
        let inode = inode.parse().ok().filter(|_| !inode.starts_with('+'))?;
        let name = fields.next().unwrap_or_default();
        let padding = name.iter().take_while(|byte| **byte == b' ').count();
        (!addresses.is_empty()).then(|| Self {
            addresses,
            permissions,
            offset,
            device,
            inode,
            name: name[padding..].to_vec(),
        })
    }

    /// Returns the size of the region in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }

    /// Returns `true` if `next` is adjacent to this region and maps the next part of the same file
    /// in the same way.
    fn is_continued_by(&self, next: &Self) -> bool {
        self.inode != 0
            && self.addresses.end == next.addresses.start
            && self.offset.checked_add(self.size()) == Some(next.offset)
            && (self.permissions, self.device, self.inode, &self.name)
                == (next.permissions, next.device, next.inode, &next.name)
    }
}

impl Permissions {
    fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; 4] = text.as_bytes().try_into().ok()?;
        let one_of = |index: usize, set, unset| match bytes[index] {
            byte if byte == set => Some(true),
            byte if byte == unset => Some(false),
            _ => None,
        };
        Some(Self {
            read: one_of(0, b'r', b'-')?,
            write: one_of(1, b'w', b'-')?,
            execute: one_of(2, b'x', b'-')?,
            shared: one_of(3, b's', b'p')?,
        })
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |set, letter| if set { letter } else { '-' };
        let (read, write) = (letter(self.read, 'r'), letter(self.write, 'w'));
        let execute = letter(self.execute, 'x');
        let shared = if self.shared { 's' } else { 'p' };
        write!(f, "{read}{write}{execute}{shared}")
    }
}

impl fmt::Display for ProcessRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end } = self.addresses;
        let (permissions, kib) = (self.permissions, self.size() >> 10);
        write!(f, "{start:#x}-{end:#x} {permissions} {kib} KiB")?;
        if self.inode != 0 {
            write!(f, " from offset {:#x} of", self.offset)?;
        }
        match &self.name[..] {
            [] => f.write_str(" (no name)"),
            name => write!(f, " {}", printable(name)),
        }
    }
}

/// Formats each region on a separate line.
fn list(regions: &[ProcessRegion]) -> String {
    let line = |region| format!("\n  {region}");
    regions.iter().map(line).collect()
}

/// Returns text that is safe for a terminal: control characters, which another process chose, are
/// escaped.
pub(super) fn printable(bytes: &[u8]) -> String {
    let mut printable = String::new();
    for char in String::from_utf8_lossy(bytes).chars() {
        match char {
            '\\' | '"' | '\'' => printable.push(char),
            _ => printable.extend(char.escape_debug()),
        }
    }
    printable
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    const VMM: &str = "\
55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0040000000 rw-s 00000000 00:01 1027                       /memfd:ram (deleted)
7f0040000000-7f0040001000 ---p 00000000 00:00 0 
7f0040001000-7f0040003000 rw-s 00000000 00:01 1028                       /memfd:ram2 (deleted)
7f0041000000-7f00c1000000 rw-s 40000000 00:01 1027                       /memfd:ram (deleted)
7f00d0000000-7f00d0001000 r--p 00001000 fe:00 4711                       /a b\\012c/vm.img
7f00d0001000-7f00d0002000 r--p 00002000 fe:00 4711                       /a b\\012c/vm.img
7f00d0002000-7f00d0003000 rw-p 00003000 fe:00 4711                       /a b\\012c/vm.img
7f00e0000000-7f0ae0000000 rw-s 00000000 00:0e 9                          anon_inode:[vfio-device]
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0                          [stack]
";

    fn vmm() -> ProcessMaps {
        ProcessMaps::parse(7, VMM.as_bytes()).unwrap()
    }

    #[test]
    fn every_field_of_a_line_is_parsed() {
        let maps = vmm();
        let image = maps.at(0x7f00_d000_0000).unwrap();
        let expected = ProcessRegion {
            addresses: 0x7f00_d000_0000..0x7f00_d000_2000,
            permissions: Permissions {
                read: true,
                write: false,
                execute: false,
                shared: false,
            },
            offset: 0x1000,
            device: (0xfe, 0),
            inode: 4711,
            name: b"/a b\\012c/vm.img".to_vec(),
        };
        assert_eq!(*image, expected);
        assert_eq!(
            image.to_string(),
            "0x7f00d0000000-0x7f00d0002000 r--p 8 KiB from offset 0x1000 of /a b\\012c/vm.img"
        );
        let guard = maps.at(0x7f00_4000_0000).unwrap();
        assert_eq!(
            guard.to_string(),
            "0x7f0040000000-0x7f0040001000 ---p 4 KiB (no name)"
        );
    }

    #[test]
    fn only_consecutive_parts_of_one_file_are_joined() {
        let starts: Vec<_> = vmm()
            .regions()
            .iter()
            .map(|region| region.addresses.start)
            .collect();
        let skipped = 0x7f00_d000_1000;
        assert_eq!(starts.len(), VMM.lines().count() - 1);
        assert!(!starts.contains(&skipped));
        let anonymous = "1000-2000 rw-p 00000000 00:00 0 \n2000-3000 rw-p 00000000 00:00 0 \n";
        let maps = ProcessMaps::parse(7, anonymous.as_bytes()).unwrap();
        assert_eq!(maps.regions().len(), 2);
    }

    #[rstest]
    #[case::whole("[heap]", 0x55d0_c000_0000)]
    #[case::without_the_suffix_deleted("/memfd:ram2", 0x7f00_4000_1000)]
    #[case::in_part("ram2", 0x7f00_4000_1000)]
    #[case::with_an_escape("b\\012c/vm.img", 0)]
    fn a_region_is_found_by_its_name(#[case] name: &str, #[case] start: u64) {
        match vmm().named(name) {
            Ok(region) => assert_eq!(region.addresses.start, start),
            Err(ProcessMapsError::Ambiguous { regions, .. }) => {
                assert_eq!(
                    (start, regions.len()),
                    (0, 2),
                    "another protection is another region"
                );
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn an_ambiguous_name_is_refused_with_all_matches() {
        let error = vmm().named("/memfd:ram").unwrap_err().to_string();
        assert_eq!(
            error,
            "process 7 has 2 mappings whose name contains \"/memfd:ram\": \
             give the address of one of them:\n  \
             0x7f0000000000-0x7f0040000000 rw-s 1048576 KiB from offset 0x0 of \
             /memfd:ram (deleted)\n  \
             0x7f0041000000-0x7f00c1000000 rw-s 2097152 KiB from offset 0x40000000 of \
             /memfd:ram (deleted)"
        );
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_largest_regions() {
        match vmm().named("pc.ram\x1b[2J").unwrap_err() {
            error @ ProcessMapsError::NotFound { .. } => {
                let text = error.to_string();
                assert!(!text.contains('\x1b'), "{text}");
                let ProcessMapsError::NotFound { regions, .. } = error else {
                    unreachable!("matched above")
                };
                assert_eq!(regions[0].addresses.start, 0x7f00_4100_0000);
            }
            other => panic!("{other}"),
        }
        assert!(vmm().all_named("pc.ram").is_empty());
    }

    #[rstest]
    #[case(0x7f00_0000_0000, true)]
    #[case(0x7f00_3fff_ffff, true)]
    #[case(0x7f00_4000_3000, false)]
    #[case(0, false)]
    #[case(u64::MAX, false)]
    fn a_region_is_found_by_any_address_inside(#[case] address: u64, #[case] found: bool) {
        assert_eq!(vmm().at(address).is_some(), found);
    }

    #[test]
    fn candidates_are_sorted_by_size_without_devices() {
        let maps = vmm();
        let sizes: Vec<_> = maps
            .candidates()
            .iter()
            .map(|region| region.size())
            .collect();
        assert_eq!(sizes[..2], [2 << 30, 1 << 30]);
        assert_eq!(sizes.len(), 6);
    }

    #[rstest]
    #[case::empty("")]
    #[case::no_end("1000 rw-p 0 00:00 0 ")]
    #[case::empty_range("1000-1000 rw-p 0 00:00 0 ")]
    #[case::backwards("2000-1000 rw-p 0 00:00 0 ")]
    #[case::invalid_digit("1000-2z00 rw-p 0 00:00 0 ")]
    #[case::signed("+1000-2000 rw-p 0 00:00 0 ")]
    #[case::signed_inode("1000-2000 rw-p 0 00:00 +1 ")]
    #[case::too_large("1000-10000000000000000 rw-p 0 00:00 0 ")]
    #[case::unknown_permission("1000-2000 rwzp 0 00:00 0 ")]
    #[case::too_many_permissions("1000-2000 rwxpp 0 00:00 0 ")]
    #[case::device_without_colon("1000-2000 rw-p 0 0000 0 ")]
    #[case::large_device("1000-2000 rw-p 0 100000000:00 0 ")]
    #[case::no_inode("1000-2000 rw-p 0 00:00")]
    fn an_invalid_line_is_reported_with_its_number(#[case] line: &str) {
        let text = format!("0-1000 rw-p 00000000 00:00 0 \n{line}\n");
        match ProcessMaps::parse(7, text.as_bytes()).unwrap_err() {
            ProcessMapsError::Line { line: 2, text, .. } => assert_eq!(text, line),
            other => panic!("{other}"),
        }
    }

    #[rstest]
    #[case::upwards(&["1000-2000", "3000-4000", "3000-6000"], &[0x1000..0x2000, 0x3000..0x6000])]
    #[case::over_its_neighbors(
        &["1000-2000", "2000-3000", "3000-4000", "1000-5000"],
        &[0x1000..0x5000]
    )]
    #[case::another_starts_inside(&["1000-4000", "2000-5000"], &[0x1000..0x2000, 0x2000..0x5000])]
    fn the_last_entry_of_a_growing_mapping_is_used(
        #[case] listed: &[&str],
        #[case] expected: &[Range<u64>],
    ) {
        let line = |addresses: &&str| format!("{addresses} rw-p 00000000 00:00 0 \n");
        let text: String = listed.iter().map(line).collect();
        let maps = ProcessMaps::parse(7, text.as_bytes()).unwrap();
        let regions = maps.regions().iter();
        let addresses: Vec<_> = regions.map(|region| region.addresses.clone()).collect();
        assert_eq!(addresses, expected);
    }

    #[test]
    fn control_characters_in_names_are_escaped() {
        let name = b"/memfd:\x1b]0;\x07\r\x7f\xff\xc2\x9b\xe2\x80\xae'\\\"";
        let line = [b"1000-2000 rw-s 00000000 00:01 5     ", &name[..]].concat();
        let region = ProcessRegion::parse(&line).unwrap();
        assert_eq!(region.name, name);
        assert_eq!(
            region.to_string(),
            "0x1000-0x2000 rw-s 4 KiB from offset 0x0 of \
             /memfd:\\u{1b}]0;\\u{7}\\r\\u{7f}\u{fffd}\\u{9b}\\u{202e}'\\\""
        );
        let error = ProcessMaps::parse(7, b"\x1b[2J\n").unwrap_err();
        assert!(!error.to_string().contains('\x1b'), "{error}");
    }

    proptest! {
        #[test]
        fn any_list_is_parsed_or_refused(
            text in prop::collection::vec(
                prop_oneof![
                    "[0-9a-f]{1,17}-[0-9a-f]{1,17} [r-][w-][x-][sp] [0-9a-f]{1,9} \
                     [0-9a-f]{2}:[0-9a-f]{2} [0-9]{1,21} {0,9}.{0,9}"
                        .prop_map(String::into_bytes),
                    prop::collection::vec(any::<u8>(), 0..60),
                ],
                0..6,
            ),
        ) {
            if let Ok(maps) = ProcessMaps::parse(7, &text.join(&b'\n')) {
                let regions = maps.regions();
                prop_assert!(
                    regions.is_sorted_by(|a, b| a.addresses.end <= b.addresses.start)
                );
                prop_assert!(maps.regions().iter().all(|region| !region.addresses.is_empty()));
            }
        }

        #[test]
        fn a_formatted_region_is_parsed_unchanged(
            start in 0..u64::MAX / 2, size in 1..u64::MAX / 2, offset: u64,
            major: u32, minor: u32, inode: u64,
            flags: [bool; 4], name in "(/[^\n]{0,20})?",
        ) {
            let [read, write, execute, shared] = flags;
            let region = ProcessRegion {
                addresses: start..start + size,
                permissions: Permissions { read, write, execute, shared },
                offset,
                device: (major, minor),
                inode,
                name: name.clone().into_bytes(),
            };
            let permissions = region.permissions;
            let line = format!(
                "{start:08x}-{:08x} {permissions} {offset:08x} {major:02x}:{minor:02x} \
                 {inode}    {name}",
                start + size
            );
            prop_assert_eq!(ProcessRegion::parse(line.as_bytes()), Some(region));
        }
    }
}
