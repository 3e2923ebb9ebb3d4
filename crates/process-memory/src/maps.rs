//! The mappings of a process, and the search for a guest's RAM among them.

mod error;

use std::cmp::Reverse;
use std::ops::Range;
use std::process;

use page_reader::{MappingsError, ProcessRegion};

pub use error::FindRegionError;

/// The mappings of a process at the time of the call.
///
/// The regions of a guest's RAM are found by name if the VMM names them (a memfd, a file), by
/// address if the VMM reports it, or else guessed by size. [`ProcessMemory`](crate::ProcessMemory)
/// reads them.
///
/// # Examples
/// ```
/// use page_reader::PageReader;
/// use process_memory::{ProcessMaps, ProcessMemory};
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
    /// As listed, ascending by address.
    lines: Vec<ProcessRegion>,
    /// Joined lines, ascending by address.
    regions: Vec<ProcessRegion>,
}

/// The maximum number of candidates in an error.
const MAX_LISTED: usize = 8;

impl ProcessMaps {
    /// Returns the mappings of process `pid`.
    ///
    /// # Errors
    /// Returns an error if the process has ended, may not be examined, or if the list has an
    /// unknown format.
    pub fn of(pid: u32) -> Result<Self, MappingsError> {
        Ok(Self::new(pid, ProcessRegion::of(pid)?))
    }

    /// Returns the mappings of the calling process.
    ///
    /// # Errors
    /// Returns the errors of [`of`](Self::of).
    pub fn of_this_process() -> Result<Self, MappingsError> {
        Ok(Self::new(process::id(), ProcessRegion::of_this_process()?))
    }

    fn new(pid: u32, listed: Vec<ProcessRegion>) -> Self {
        let mut regions = Vec::<ProcessRegion>::new();
        for line in &listed {
            match regions.last_mut() {
                Some(last) if is_continued_by(last, line) => {
                    last.addresses.end = line.addresses.end;
                }
                _ => regions.push(line.clone()),
            }
        }
        Self {
            pid,
            lines: listed,
            regions,
        }
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns all regions, ascending by address.
    ///
    /// A region is a line of `/proc/<pid>/maps`, or several adjacent lines with consecutive parts
    /// of one file: the kernel splits a mapping when a part of it is treated differently. Anonymous
    /// memory is not joined.
    #[must_use]
    pub fn regions(&self) -> &[ProcessRegion] {
        &self.regions
    }

    /// Returns the lines of `/proc/<pid>/maps` that overlap `range`, not joined, ascending by
    /// address.
    ///
    /// `/proc/<pid>/map_files` has an entry for each line with a file, and none for a region of
    /// several lines.
    #[must_use]
    pub fn lines_in(&self, range: &Range<u64>) -> &[ProcessRegion] {
        if range.is_empty() {
            return &[];
        }
        let lines = &self.lines[..];
        let first = lines.partition_point(|line| line.addresses.end <= range.start);
        let end = lines.partition_point(|line| line.addresses.start < range.end);
        &lines[first..end]
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
    pub fn named(&self, name: impl AsRef<[u8]>) -> Result<&ProcessRegion, FindRegionError> {
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
                Err(FindRegionError::NotFound {
                    pid,
                    name: printable(),
                    regions: owned(&regions),
                })
            }
            _ => Err(FindRegionError::Ambiguous {
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

/// Returns `true` if `next` is adjacent to `region` and maps the next part of the same file
/// in the same way.
fn is_continued_by(region: &ProcessRegion, next: &ProcessRegion) -> bool {
    region.inode != 0
        && region.addresses.end == next.addresses.start
        && region.offset.checked_add(region.size()) == Some(next.offset)
        && (
            region.permissions,
            region.device,
            region.inode,
            &region.name,
        ) == (next.permissions, next.device, next.inode, &next.name)
}

#[cfg(test)]
mod tests {
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

    /// Returns the mappings of process 7, as listed by the kernel.
    fn maps_of(list: &str) -> ProcessMaps {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("maps"), list).unwrap();
        let listed = ProcessRegion::list(dir.path().to_str().unwrap(), 7);
        ProcessMaps::new(7, listed.unwrap())
    }

    fn vmm() -> ProcessMaps {
        maps_of(VMM)
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
        let maps = maps_of(anonymous);
        assert_eq!(maps.regions().len(), 2);
    }

    #[rstest]
    #[case::whole(0x7f00_d000_0000..0x7f00_d000_3000, &[0, 0x1000, 0x2000])]
    #[case::overlapping(0x7f00_d000_0fff..0x7f00_d000_1001, &[0, 0x1000])]
    #[case::one(0x7f00_d000_1000..0x7f00_d000_2000, &[0x1000])]
    #[case::gap(0x7f00_d000_3000..0x7f00_e000_0000, &[])]
    #[case::empty(0x7f00_d000_1001..0x7f00_d000_1001, &[])]
    #[case::reversed(Range { start: 0x7f00_d000_2000, end: 0x7f00_d000_1000 }, &[])]
    #[case::past_the_end(u64::MAX - 1..u64::MAX, &[])]
    fn lines_are_not_joined(#[case] range: Range<u64>, #[case] starts: &[u64]) {
        let maps = vmm();
        let lines = maps.lines_in(&range).iter();
        let found: Vec<_> = lines
            .map(|line| line.addresses.start - 0x7f00_d000_0000)
            .collect();
        assert_eq!(found, starts);
    }

    #[rstest]
    #[case::whole("[heap]", 0x55d0_c000_0000)]
    #[case::without_the_suffix_deleted("/memfd:ram2", 0x7f00_4000_1000)]
    #[case::in_part("ram2", 0x7f00_4000_1000)]
    #[case::with_an_escape("b\\012c/vm.img", 0)]
    fn a_region_is_found_by_its_name(#[case] name: &str, #[case] start: u64) {
        match vmm().named(name) {
            Ok(region) => assert_eq!(region.addresses.start, start),
            Err(FindRegionError::Ambiguous { regions, .. }) => {
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
            error @ FindRegionError::NotFound { .. } => {
                let text = error.to_string();
                assert!(!text.contains('\x1b'), "{text}");
                let FindRegionError::NotFound { regions, .. } = error else {
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
}
