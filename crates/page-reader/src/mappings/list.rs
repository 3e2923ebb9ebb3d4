//! The kernel's lists of mappings: `/proc/<pid>/maps`, and with flags `/proc/<pid>/smaps`.

use std::io::{self, BufRead};

use super::flags::{FlaggedRegion, RegionFlags};
use super::region::{ProcessRegion, printable};

/// An error of reading a list.
#[derive(Debug)]
pub(crate) enum ListError {
    Read(io::Error),
    /// A line, counted from 1, is not a mapping.
    Line {
        line: usize,
        text: String,
    },
}

/// Returns the mappings of a list without flags.
pub(crate) fn maps(list: impl BufRead) -> Result<Vec<ProcessRegion>, ListError> {
    let listed = parse(list, false)?.into_iter();
    Ok(listed.map(|mapping| mapping.region).collect())
}

/// Returns the mappings of a list with flags.
pub(crate) fn smaps(list: impl BufRead) -> Result<Vec<FlaggedRegion>, ListError> {
    parse(list, true)
}

fn parse(mut list: impl BufRead, has_flags: bool) -> Result<Vec<FlaggedRegion>, ListError> {
    let mut mappings = Vec::<FlaggedRegion>::new();
    let mut bytes = Vec::new();
    for number in 1.. {
        bytes.clear();
        if list
            .read_until(b'\n', &mut bytes)
            .map_err(ListError::Read)?
            == 0
        {
            break;
        }
        let line = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
        // The first line of a mapping starts with a digit, the following ones with a capital
        // letter.
        if has_flags && line.first().is_some_and(u8::is_ascii_uppercase) {
            if let Some(words) = line.strip_prefix(b"VmFlags:")
                && let Some(mapping) = mappings.last_mut()
            {
                mapping.flags = Some(RegionFlags::parse(words));
            }
            continue;
        }
        let region = ProcessRegion::parse(line).ok_or_else(|| ListError::Line {
            line: number,
            text: printable(line),
        })?;
        merge_newer(&mut mappings, region.addresses.start);
        mappings.push(FlaggedRegion {
            region,
            flags: None,
        });
    }
    Ok(mappings)
}

/// Removes or cuts the mappings at the end of `listed` that a newer mapping, which starts at
/// `start`, replaces.
///
/// The kernel produces a list in several reads. A mapping that grows between two of them is listed
/// again, and the later entry is valid.
fn merge_newer(listed: &mut Vec<FlaggedRegion>, start: u64) {
    while listed
        .pop_if(|before| start <= before.region.addresses.start)
        .is_some()
    {}
    if let Some(before) = listed.last_mut() {
        let end = &mut before.region.addresses.end;
        *end = start.min(*end);
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    const HEADER: &str = "1000-2000 rw-s 00000000 00:01 5     /memfd:a\\012VmFlags: um";

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
        match maps(text.as_bytes()).unwrap_err() {
            ListError::Line { line: 2, text } => assert_eq!(text, line),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_invalid_line_between_flags_is_reported_with_its_number() {
        let text = format!("{HEADER}\nSize: 4 kB\nno mapping\n");
        let error = smaps(text.as_bytes()).unwrap_err();
        assert!(
            matches!(error, ListError::Line { line: 3, .. }),
            "{error:?}"
        );
        let attribute = "1000-2000 rw-p 0 00:00 0 \nSize: 4 kB\n";
        let error = maps(attribute.as_bytes()).unwrap_err();
        assert!(
            matches!(error, ListError::Line { line: 2, .. }),
            "{error:?}"
        );
    }

    #[test]
    fn control_characters_of_an_invalid_line_are_escaped() {
        match maps(&b"\x1b[2J\n"[..]).unwrap_err() {
            ListError::Line { text, .. } => assert!(!text.contains('\x1b'), "{text}"),
            other => panic!("{other:?}"),
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
        let regions = maps(text.as_bytes()).unwrap().into_iter();
        let addresses: Vec<_> = regions.map(|region| region.addresses).collect();
        assert_eq!(addresses, expected);
    }

    #[test]
    fn a_repeated_mapping_has_the_flags_listed_last() {
        let text =
            "1000-2000 rw-p 0 00:00 0 \nVmFlags: um\n1000-3000 rw-p 0 00:00 0 \nVmFlags: rd\n";
        let mappings = smaps(text.as_bytes()).unwrap();
        assert_eq!(mappings.len(), 1);
        assert_eq!(mappings[0].region.addresses, 0x1000..0x3000);
        assert_eq!(mappings[0].flags, Some(RegionFlags::default()));
    }

    #[test]
    fn flags_belong_to_the_preceding_mapping() {
        let text = format!("{HEADER}\nSize: 4 kB\nVmFlags: rd um \n2000-3000 rw-p 0 00:00 0 \n");
        let mappings = smaps(text.as_bytes()).unwrap();
        let flags: Vec<_> = mappings.iter().map(|mapping| mapping.flags).collect();
        let filled = RegionFlags {
            filled_on_fault: true,
            ..Default::default()
        };
        assert_eq!(flags, [Some(filled), None]);
        assert_eq!(mappings[0].region.inode, 5);
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
            if let Ok(regions) = maps(&text.join(&b'\n')[..]) {
                prop_assert!(
                    regions.is_sorted_by(|a, b| a.addresses.end <= b.addresses.start)
                );
                prop_assert!(regions.iter().all(|region| !region.addresses.is_empty()));
            }
        }
    }
}
