//! Mappings with the flags that only `/proc/<pid>/smaps` lists.

use super::region::ProcessRegion;

/// A mapping of a process, with the flags that only `/proc/<pid>/smaps` lists.
///
/// To list them, the kernel visits every page of the process: 14 to 30 ms a GiB in small pages.
///
/// # Examples
/// ```
/// use page_reader::FlaggedRegion;
///
/// let mappings = FlaggedRegion::of_this_process()?;
/// let filled = |mapping: &FlaggedRegion| mapping.flags.is_some_and(|flags| flags.filled_on_fault);
/// assert!(!mappings.iter().any(filled));
/// # Ok::<(), page_reader::MappingsError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlaggedRegion {
    /// The mapping.
    pub region: ProcessRegion,
    /// The flags of the mapping, or `None` if the kernel lists none.
    pub flags: Option<RegionFlags>,
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
    /// The pages are those of a device (`pf`, `io`, `mm`), or created by the kernel (`de`).
    pub special: bool,
}

impl RegionFlags {
    pub(super) fn parse(words: &[u8]) -> Self {
        // The names are those of `Documentation/filesystems/proc.rst`.
        let mut flags = Self::default();
        for word in words.split(u8::is_ascii_whitespace) {
            match word {
                b"um" | b"ui" => flags.filled_on_fault = true,
                b"ht" => flags.huge_pages = true,
                b"dc" => flags.not_inherited = true,
                b"pf" | b"io" | b"mm" | b"de" => flags.special = true,
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

    #[rstest]
    #[case::none("rd wr sh mr mw me ms", RegionFlags::default())]
    #[case::missing("rd wr um", RegionFlags { filled_on_fault: true, ..Default::default() })]
    #[case::minor("rd wr ui", RegionFlags { filled_on_fault: true, ..Default::default() })]
    #[case::write_protected("rd wr uw", RegionFlags::default())]
    #[case::huge("rd ht", RegionFlags { huge_pages: true, ..Default::default() })]
    #[case::kept("rd dc", RegionFlags { not_inherited: true, ..Default::default() })]
    #[case::raw_pages("rd pf", RegionFlags { special: true, ..Default::default() })]
    #[case::device("rd io", RegionFlags { special: true, ..Default::default() })]
    #[case::mixed("rd mm", RegionFlags { special: true, ..Default::default() })]
    #[case::of_the_kernel("rd de", RegionFlags { special: true, ..Default::default() })]
    fn each_word_sets_its_flag(#[case] words: &str, #[case] expected: RegionFlags) {
        assert_eq!(
            RegionFlags::parse(format!(" {words} ").as_bytes()),
            expected
        );
    }
}
