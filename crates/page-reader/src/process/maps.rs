//! `/proc/<pid>/maps`: what a process has mapped, to find its guest's RAM among it.

use std::cmp::Reverse;
use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;

/// What a process has mapped, as it was when it was asked.
///
/// The regions of a guest's RAM are found by name where the monitor gives it one (a memfd, a file), by address where the monitor tells it,
/// or else guessed by size. Then [`ProcessMemory`](crate::ProcessMemory) reads them.
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
    /// Ascending.
    regions: Vec<ProcessRegion>,
}

/// A range of addresses that a process has mapped.
///
/// It's a line of `/proc/<pid>/maps`, or several that go on with one file where the one before ends: the kernel splits a mapping of
/// which a part is treated in another way. Anonymous memory is left as it's split.
///
/// Shown, it's one line without control characters, whatever name the process chose.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProcessRegion {
    /// Addresses in the process; neither is empty nor overlaps another's.
    pub addresses: Range<u64>,
    /// What the process may do there.
    pub permissions: Permissions,
    /// The position of the first byte in the file, in bytes; 0 where there's no file.
    pub offset: u64,
    /// Major and minor number of the device that has the file, both 0 where there's none.
    pub device: (u32, u32),
    /// The inode number of the file, 0 where there's none.
    pub inode: u64,
    /// As the kernel writes it, which may be no UTF-8: a path, `/memfd:ram (deleted)`, `[heap]`, empty for most anonymous memory.
    /// A line feed is `\012` in it, any other byte is itself.
    pub name: Vec<u8>,
}

/// What a process may do in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// It may read.
    pub read: bool,
    /// It may write.
    pub write: bool,
    /// It may execute.
    pub execute: bool,
    /// What it writes, whoever else has the file sees; `false`: it's the process's own.
    pub shared: bool,
}

/// Why the regions of a process aren't known, or which of them is meant.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessMapsError {
    /// There's no such process, or it has ended.
    #[error("process {pid} isn't there, or has no memory: it has ended, or is one of the kernel's")]
    Gone {
        /// The process.
        pid: u32,
    },
    /// The list can't be read.
    #[error(
        "reading /proc/{pid}/maps: the process must be traceable by this one (same user, or CAP_SYS_PTRACE)"
    )]
    Read {
        /// The process.
        pid: u32,
        /// What the system says.
        source: io::Error,
    },
    /// A line of the list says nothing that makes sense.
    #[error("/proc/{pid}/maps, line {line}: no mapping: {text}")]
    Line {
        /// The process.
        pid: u32,
        /// The line, from 1.
        line: usize,
        /// What it says, control characters escaped.
        text: String,
    },
    /// No region has this name.
    #[error(
        "process {pid} has mapped nothing of which the name contains {name:?}; its largest writable regions are:{}",
        list(regions)
    )]
    NotFound {
        /// The process.
        pid: u32,
        /// What was looked for.
        name: String,
        /// The largest [candidates](ProcessMaps::candidates), 8 at most.
        regions: Vec<ProcessRegion>,
    },
    /// Several regions have this name.
    #[error("process {pid} has mapped {} regions of which the name contains {name:?}, give the address of the one meant:{}", regions.len(), list(regions))]
    Ambiguous {
        /// The process.
        pid: u32,
        /// What was looked for.
        name: String,
        /// All of them.
        regions: Vec<ProcessRegion>,
    },
}

/// How many candidates an error names.
const NAMED: usize = 8;

impl ProcessMaps {
    /// Those of process `pid`.
    ///
    /// # Errors
    /// The process has ended, may not be looked into, or the list isn't understood.
    pub fn of(pid: u32) -> Result<Self, ProcessMapsError> {
        Self::list(&format!("/proc/{pid}"), pid)
    }

    /// Returns those of the calling process.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    pub fn of_this_process() -> Result<Self, ProcessMapsError> {
        // By "self": where /proc belongs to another PID namespace, the number is another process's.
        Self::list("/proc/self", std::process::id())
    }

    /// Returns those of `process`, a directory in `/proc`.
    pub(super) fn list(process: &str, pid: u32) -> Result<Self, ProcessMapsError> {
        let text =
            fs::read(format!("{process}/maps")).map_err(|source| {
                match super::is_not_there(&source) {
                    true => ProcessMapsError::Gone { pid },
                    false => ProcessMapsError::Read { pid, source },
                }
            })?;
        let maps = Self::parse(pid, &text)?;
        // A process that has ended and is still to be waited for has no memory.
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
            supersede(&mut regions, region.addresses.start, |before| {
                &mut before.addresses
            });
            match regions.last_mut() {
                Some(last) if last.goes_on_in(&region) => last.addresses.end = region.addresses.end,
                _ => regions.push(region),
            }
        }
        Ok(Self { pid, regions })
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// All regions, by ascending address.
    #[must_use]
    pub fn regions(&self) -> &[ProcessRegion] {
        &self.regions
    }

    /// The region that `address` is in.
    #[must_use]
    pub fn at(&self, address: u64) -> Option<&ProcessRegion> {
        let index = self
            .regions
            .partition_point(|region| region.addresses.end <= address);
        self.regions
            .get(index)
            .filter(|region| region.addresses.contains(&address))
    }

    /// The regions of this name, by ascending address; where there are none, those whose name contains it.
    ///
    /// ` (deleted)` at the end of a region's name may be left out: every memfd has it. A guest whose RAM has a gap may have a region on each
    /// side of it, of one file: their [`offset`](ProcessRegion::offset) says which comes first.
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

    /// The one region of this name, or the one whose name contains it: as [`all_named`](Self::all_named).
    ///
    /// # Errors
    /// There are none or several; the error lists what there is to choose from.
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
                regions.truncate(NAMED);
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

    /// The regions that may be a guest's RAM: readable and writable memory, the largest first.
    ///
    /// The first is a good guess where a monitor runs one guest, whose RAM is in one piece. It's a guess: show it to whoever can tell.
    /// Left out are what devices and other special files map (`anon_inode:`).
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

/// Makes room for a mapping that begins at `start` after those `told` before it. The kernel tells a list in parts, and between two of them
/// a mapping may grow, which is then told once more: what is told later holds.
pub(crate) fn supersede<T>(
    told: &mut Vec<T>,
    start: u64,
    addresses: impl Fn(&mut T) -> &mut Range<u64>,
) {
    while told
        .pop_if(|before| start <= addresses(before).start)
        .is_some()
    {}
    if let Some(before) = told.last_mut() {
        let before = addresses(before);
        before.end = before.end.min(start);
    }
}

impl ProcessRegion {
    /// A line of `/proc/<pid>/maps`, without its end: `start-end perms offset major:minor inode   name`. From
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

    /// In bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }

    fn goes_on_in(&self, next: &Self) -> bool {
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

/// Each on a line of its own.
fn list(regions: &[ProcessRegion]) -> String {
    let line = |region| format!("\n  {region}");
    regions.iter().map(line).collect()
}

/// What a terminal shows as it is; the rest, which another process chose, escaped.
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

    const MONITOR: &str = "\
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

    fn monitor() -> ProcessMaps {
        ProcessMaps::parse(7, MONITOR.as_bytes()).unwrap()
    }

    #[test]
    fn every_field_of_a_line_is_understood() {
        let maps = monitor();
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
    fn lines_that_go_on_with_one_file_are_one_region_and_others_are_not() {
        let starts: Vec<_> = monitor()
            .regions()
            .iter()
            .map(|region| region.addresses.start)
            .collect();
        let skipped = 0x7f00_d000_1000;
        assert_eq!(starts.len(), MONITOR.lines().count() - 1);
        assert!(!starts.contains(&skipped));
        let anonymous = "1000-2000 rw-p 00000000 00:00 0 \n2000-3000 rw-p 00000000 00:00 0 \n";
        let maps = ProcessMaps::parse(7, anonymous.as_bytes()).unwrap();
        assert_eq!(maps.regions().len(), 2);
    }

    #[rstest]
    #[case::whole("[heap]", 0x55d0_c000_0000)]
    #[case::without_what_the_kernel_adds("/memfd:ram2", 0x7f00_4000_1000)]
    #[case::in_part("ram2", 0x7f00_4000_1000)]
    #[case::with_an_escape("b\\012c/vm.img", 0)]
    fn a_region_is_found_by_its_name(#[case] name: &str, #[case] start: u64) {
        match monitor().named(name) {
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
    fn a_name_that_several_regions_have_is_refused_with_all_of_them() {
        let error = monitor().named("/memfd:ram").unwrap_err().to_string();
        assert_eq!(
            error,
            "process 7 has mapped 2 regions of which the name contains \"/memfd:ram\", give the address of the one meant:\n  \
             0x7f0000000000-0x7f0040000000 rw-s 1048576 KiB from offset 0x0 of /memfd:ram (deleted)\n  \
             0x7f0041000000-0x7f00c1000000 rw-s 2097152 KiB from offset 0x40000000 of /memfd:ram (deleted)"
        );
    }

    #[test]
    fn a_name_that_no_region_has_is_refused_with_the_largest_there_are() {
        match monitor().named("pc.ram\x1b[2J").unwrap_err() {
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
        assert!(monitor().all_named("pc.ram").is_empty());
    }

    #[rstest]
    #[case(0x7f00_0000_0000, true)]
    #[case(0x7f00_3fff_ffff, true)]
    #[case(0x7f00_4000_3000, false)]
    #[case(0, false)]
    #[case(u64::MAX, false)]
    fn a_region_is_found_by_an_address_in_it(#[case] address: u64, #[case] found: bool) {
        assert_eq!(monitor().at(address).is_some(), found);
    }

    #[test]
    fn the_largest_writable_memory_is_the_best_guess_and_a_device_is_none() {
        let maps = monitor();
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
    #[case::nothing_in_it("1000-1000 rw-p 0 00:00 0 ")]
    #[case::backwards("2000-1000 rw-p 0 00:00 0 ")]
    #[case::no_number("1000-2z00 rw-p 0 00:00 0 ")]
    #[case::a_sign("+1000-2000 rw-p 0 00:00 0 ")]
    #[case::a_signed_inode("1000-2000 rw-p 0 00:00 +1 ")]
    #[case::too_large("1000-10000000000000000 rw-p 0 00:00 0 ")]
    #[case::odd_permissions("1000-2000 rwzp 0 00:00 0 ")]
    #[case::more_permissions("1000-2000 rwxpp 0 00:00 0 ")]
    #[case::no_device("1000-2000 rw-p 0 0000 0 ")]
    #[case::a_large_device("1000-2000 rw-p 0 100000000:00 0 ")]
    #[case::no_inode("1000-2000 rw-p 0 00:00")]
    fn a_line_that_makes_no_sense_is_named(#[case] line: &str) {
        let text = format!("0-1000 rw-p 00000000 00:00 0 \n{line}\n");
        match ProcessMaps::parse(7, text.as_bytes()).unwrap_err() {
            ProcessMapsError::Line { line: 2, text, .. } => assert_eq!(text, line),
            other => panic!("{other}"),
        }
    }

    #[rstest]
    #[case::upwards(&["1000-2000", "3000-4000", "3000-6000"], &[0x1000..0x2000, 0x3000..0x6000])]
    #[case::over_its_neighbours(&["1000-2000", "2000-3000", "3000-4000", "1000-5000"], &[0x1000..0x5000])]
    #[case::another_began_in_it(&["1000-4000", "2000-5000"], &[0x1000..0x2000, 0x2000..0x5000])]
    fn a_mapping_that_grew_while_the_list_was_read_is_what_it_was_last(
        #[case] told: &[&str],
        #[case] expected: &[Range<u64>],
    ) {
        let line = |addresses: &&str| format!("{addresses} rw-p 00000000 00:00 0 \n");
        let text: String = told.iter().map(line).collect();
        let maps = ProcessMaps::parse(7, text.as_bytes()).unwrap();
        let regions = maps.regions().iter();
        let addresses: Vec<_> = regions.map(|region| region.addresses.clone()).collect();
        assert_eq!(addresses, expected);
    }

    #[test]
    fn what_another_process_chose_as_a_name_does_not_reach_the_terminal() {
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
        fn whatever_the_list_says_is_understood_or_refused(
            text in prop::collection::vec(
                prop_oneof![
                    "[0-9a-f]{1,17}-[0-9a-f]{1,17} [r-][w-][x-][sp] [0-9a-f]{1,9} [0-9a-f]{2}:[0-9a-f]{2} [0-9]{1,21} {0,9}.{0,9}"
                        .prop_map(String::into_bytes),
                    prop::collection::vec(any::<u8>(), 0..60),
                ],
                0..6,
            ),
        ) {
            if let Ok(maps) = ProcessMaps::parse(7, &text.join(&b'\n')) {
                prop_assert!(maps.regions().is_sorted_by(|a, b| a.addresses.end <= b.addresses.start));
                prop_assert!(maps.regions().iter().all(|region| !region.addresses.is_empty()));
            }
        }

        #[test]
        fn a_region_is_what_was_written_of_it(
            start in 0..u64::MAX / 2, size in 1..u64::MAX / 2, offset: u64, major: u32, minor: u32, inode: u64,
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
                "{start:08x}-{:08x} {permissions} {offset:08x} {major:02x}:{minor:02x} {inode}    {name}",
                start + size
            );
            prop_assert_eq!(ProcessRegion::parse(line.as_bytes()), Some(region));
        }
    }
}
