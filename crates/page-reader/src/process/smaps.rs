//! Mappings with the flags that only `/proc/<pid>/smaps` lists.

use std::fs;

use super::maps::{ProcessMapsError, ProcessRegion, merge_newer, printable};

/// A mapping of a process, with the flags that only `/proc/<pid>/smaps` lists.
///
/// To list them, the kernel visits every page of the process: 14 to 30 ms a GiB in small pages.
/// [`ProcessMaps`](crate::ProcessMaps) lists mappings without flags in a fraction of that time.
///
/// # Examples
/// ```
/// use page_reader::FlaggedRegion;
///
/// let mappings = FlaggedRegion::of_this_process()?;
/// assert!(mappings.iter().all(|mapping| !mapping.flags.filled_on_fault));
/// # Ok::<(), page_reader::ProcessMapsError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlaggedRegion {
    /// The mapping. Unlike in [`ProcessMaps`](crate::ProcessMaps), adjacent mappings are not
    /// joined.
    pub region: ProcessRegion,
    /// The flags of the mapping.
    pub flags: RegionFlags,
}

/// Flags of a mapping, from `VmFlags` in `/proc/<pid>/smaps`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegionFlags {
    /// A userfaultfd fills pages on their first access (`um` or `ui`): missing pages are not zeros.
    pub filled_on_fault: bool,
    /// The mapping consists of huge pages of hugetlbfs (`ht`).
    pub huge_pages: bool,
    /// A forked child does not get the mapping (`dc`, set by `MADV_DONTFORK`).
    pub not_inherited: bool,
}

impl FlaggedRegion {
    /// Returns the mappings of process `pid`, by ascending address.
    ///
    /// # Errors
    /// As for [`ProcessMaps::of`](crate::ProcessMaps::of).
    pub fn of(pid: u32) -> Result<Vec<Self>, ProcessMapsError> {
        Self::list(&format!("/proc/{pid}"), pid)
    }

    /// Returns the mappings of the calling process, by ascending address.
    ///
    /// # Errors
    /// As for [`ProcessMaps::of`](crate::ProcessMaps::of).
    pub fn of_this_process() -> Result<Vec<Self>, ProcessMapsError> {
        // By "self": if /proc belongs to another PID namespace, the number is that of another
        // process.
        Self::list("/proc/self", std::process::id())
    }

    /// Returns the mappings of `process`, a directory in `/proc`.
    pub(super) fn list(process: &str, pid: u32) -> Result<Vec<Self>, ProcessMapsError> {
        let text = fs::read(format!("{process}/smaps"));
        let text = text.map_err(|source| match super::is_not_found(&source) {
            true => ProcessMapsError::Gone { pid },
            false => ProcessMapsError::Read { pid, source },
        })?;
        Self::parse(pid, &text)
    }

    fn parse(pid: u32, text: &[u8]) -> Result<Vec<Self>, ProcessMapsError> {
        let mut mappings = Vec::<Self>::new();
        let lines = text.split(|byte| *byte == b'\n').enumerate();
        for (index, line) in lines.filter(|(_, line)| !line.is_empty()) {
            // The first line of a mapping starts with a digit, the following ones with a capital
            // letter.
            if !line[0].is_ascii_uppercase() {
                let region = ProcessRegion::parse(line).ok_or_else(|| ProcessMapsError::Line {
                    pid,
                    line: index + 1,
                    text: printable(line),
                })?;
                merge_newer(&mut mappings, region.addresses.start, |before| {
                    &mut before.region.addresses
                });
                let flags = RegionFlags::default();
                mappings.push(Self { region, flags });
            } else if let Some(words) = line.strip_prefix(b"VmFlags:")
                && let Some(mapping) = mappings.last_mut()
            {
                mapping.flags = RegionFlags::parse(words);
            }
        }
        Ok(mappings)
    }
}

impl RegionFlags {
    fn parse(words: &[u8]) -> Self {
        let mut flags = Self::default();
        for word in words.split(u8::is_ascii_whitespace) {
            match word {
                b"um" | b"ui" => flags.filled_on_fault = true,
                b"ht" => flags.huge_pages = true,
                b"dc" => flags.not_inherited = true,
                _ => {}
            }
        }
        flags
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const HEADER: &str = "1000-2000 rw-s 00000000 00:01 5     /memfd:a\\012VmFlags: um";

    #[rstest]
    #[case::none("rd wr sh mr mw me ms", RegionFlags::default())]
    #[case::missing("rd wr um", RegionFlags { filled_on_fault: true, ..Default::default() })]
    #[case::minor("rd wr ui", RegionFlags { filled_on_fault: true, ..Default::default() })]
    #[case::write_protected("rd wr uw", RegionFlags::default())]
    #[case::huge("rd ht", RegionFlags { huge_pages: true, ..Default::default() })]
    #[case::kept("rd dc", RegionFlags { not_inherited: true, ..Default::default() })]
    fn flags_belong_to_the_preceding_mapping(#[case] words: &str, #[case] expected: RegionFlags) {
        let text = format!("{HEADER}\nSize: 4 kB\nVmFlags: {words} \n2000-3000 rw-p 0 00:00 0 \n");
        let mappings = FlaggedRegion::parse(7, text.as_bytes()).unwrap();
        let flags: Vec<_> = mappings.iter().map(|mapping| mapping.flags).collect();
        assert_eq!(flags, [expected, RegionFlags::default()]);
        assert_eq!(mappings[0].region.inode, 5);
    }

    #[test]
    fn an_unknown_line_is_reported_with_its_number() {
        let text = format!("{HEADER}\nSize: 4 kB\nno mapping\n");
        let error = FlaggedRegion::parse(7, text.as_bytes()).unwrap_err();
        assert!(
            matches!(error, ProcessMapsError::Line { line: 3, .. }),
            "{error:?}"
        );
    }

    #[test]
    fn a_repeated_mapping_is_as_listed_last() {
        let text =
            "1000-2000 rw-p 0 00:00 0 \nVmFlags: um\n1000-3000 rw-p 0 00:00 0 \nVmFlags: rd\n";
        let mappings = FlaggedRegion::parse(7, text.as_bytes()).unwrap();
        assert_eq!(mappings.len(), 1);
        assert_eq!(mappings[0].region.addresses, 0x1000..0x3000);
        assert!(!mappings[0].flags.filled_on_fault);
    }
}
