//! Numbers, sizes and ranges, as the command line writes them.

use std::ops::Range;

/// Parses a size: `4096`, `16KiB`, `1.5 GiB`. K, M and G are powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|_| {
            "invalid size: give bytes below 2^64, or a size such as 16KiB or 1.5GiB".to_owned()
        })
}

pub fn page_size(text: &str) -> Result<u64, String> {
    match size(text)? {
        size if size.is_power_of_two() => Ok(size),
        size => Err(format!("{size} bytes: a page's size is a power of two")),
    }
}

/// Formats regions in the syntax of the command line.
pub fn text_of(regions: &[Range<u64>]) -> String {
    let text = |region: &Range<u64>| format!("{:#x}:{}", region.start, region.end - region.start);
    regions.iter().map(text).collect::<Vec<_>>().join(" ")
}

/// Parses a number: decimal, or hexadecimal after `0x`.
pub fn address(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| format!("{text}: give a number below 2^64, in hexadecimal after 0x"))
}

/// Parses an address and a size: `0x100000000:2GiB`.
pub fn range(text: &str) -> Result<Range<u64>, String> {
    let (start, len) = text
        .split_once(':')
        .ok_or("give ADDRESS:SIZE, such as 0x100000000:2GiB")?;
    let (start, len) = (address(start)?, size(len)?);
    let end = start.checked_add(len).filter(|_| len > 0);
    Ok(start..end.ok_or("the range is empty, or ends past the address space")?)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::bytes("4096", Some(4096))]
    #[case::iec("16 KiB", Some(16384))]
    #[case::short("16K", Some(16384))]
    #[case::fraction("1.5GiB", Some(1536 << 20))]
    #[case::no_number("many", None)]
    fn sizes_are_read_as_people_write_them(#[case] text: &str, #[case] bytes: Option<u64>) {
        assert_eq!(size(text).ok(), bytes);
    }

    #[rstest]
    #[case::hexadecimal("0x100000000:2GiB", Some(4 << 30..6 << 30))]
    #[case::decimal("0:4096", Some(0..4096))]
    #[case::empty("0:0", None)]
    #[case::past_the_end("0xfffffffffffff000:8192", None)]
    #[case::half("0x1000", None)]
    fn regions_are_an_address_and_a_size(#[case] text: &str, #[case] is: Option<Range<u64>>) {
        assert_eq!(range(text).ok(), is);
    }

    #[test]
    fn a_page_is_a_power_of_two() {
        assert_eq!(page_size("16K"), Ok(16384));
        assert!(page_size("5000").unwrap_err().contains("power of two"));
    }
}
