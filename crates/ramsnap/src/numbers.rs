//! Numbers, sizes and ranges, as the command line writes them.

use std::ops::Range;
use std::time::Duration;

/// Parses a size: `4096`, `0x1000`, `16KiB`, `1.5 GiB`. K, M and G are powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let size = match text.strip_prefix("0x") {
        Some(digits) => hexadecimal(digits),
        None => {
            let config = parse_size::Config::new().with_binary();
            config.parse_size(text).ok()
        }
    };
    size.ok_or_else(|| {
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
    regions
        .iter()
        .map(text_of_one)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Formats a region in the syntax of the command line: `0x100000000:2GiB`.
pub fn text_of_one(region: &Range<u64>) -> String {
    format!("{:#x}:{}", region.start, exact(region.end - region.start))
}

/// Formats a size exactly, in the largest unit of which it is a multiple: `2GiB`, `4608B`.
fn exact(size: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let found = units
        .into_iter()
        .find(|(bits, _)| size > 0 && size.is_multiple_of(1 << bits));
    match found {
        Some((bits, unit)) => format!("{}{unit}", size >> bits),
        None => format!("{size}B"),
    }
}

/// Parses a number: decimal, or hexadecimal after `0x`.
pub fn address(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => hexadecimal(digits),
        None => text.parse().ok(),
    };
    number.ok_or_else(|| format!("{text}: give a number below 2^64, in hexadecimal after 0x"))
}

/// Parses digits. A sign is not accepted.
fn hexadecimal(digits: &str) -> Option<u64> {
    let valid = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    valid
        .then(|| u64::from_str_radix(digits, 16).ok())
        .flatten()
}

/// Parses an address and a size, `0x100000000:2GiB`, or the first address and the one after the
/// last, as ramsnap prints them: `0x100000000-0x180000000` or `0x100000000..0x180000000`.
pub fn range(text: &str) -> Result<Range<u64>, String> {
    if let Some((start, end)) = text.split_once("..").or_else(|| text.split_once('-')) {
        let (start, end) = (address(start)?, address(end)?);
        return match start < end {
            true => Ok(start..end),
            false => Err("the range is empty, or ends before it begins".to_owned()),
        };
    }
    let (start, len) = text
        .split_once(':')
        .ok_or("give ADDRESS:SIZE or START-END, such as 0x100000000:2GiB")?;
    let (start, len) = (address(start)?, size(len)?);
    let end = start.checked_add(len).filter(|_| len > 0);
    Ok(start..end.ok_or("the range is empty, or ends past the address space")?)
}

/// Parses a time: `90` (seconds), `500ms`, `90s`, `5m`, `12h`, `30d`, `4w`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = match unit.trim_start() {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        "w" => 7 * 86_400_000,
        _ => 0,
    };
    let number: Option<u64> = number.parse().ok();
    let milliseconds = number
        .filter(|_| unit > 0)
        .and_then(|it| it.checked_mul(unit));
    let milliseconds = milliseconds.ok_or("give seconds, or a time such as 500ms, 90s, 5m or 30d");
    Ok(Duration::from_millis(milliseconds?))
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
    #[case::hexadecimal("0x4000", Some(16384))]
    #[case::no_number("many", None)]
    #[case::signed("0x+40", None)]
    fn sizes_are_read_as_people_write_them(#[case] text: &str, #[case] bytes: Option<u64>) {
        assert_eq!(size(text).ok(), bytes);
    }

    #[rstest]
    #[case::hexadecimal("0x100000000:2GiB", Some(4 << 30..6 << 30))]
    #[case::decimal("0:4096", Some(0..4096))]
    #[case::hexadecimal_size("0x1000:0x2000", Some(0x1000..0x3000))]
    #[case::first_and_end("0x1000-0x3000", Some(0x1000..0x3000))]
    #[case::as_info_prints_it("0x1000..0x3000", Some(0x1000..0x3000))]
    #[case::backwards("0x3000-0x1000", None)]
    #[case::empty("0:0", None)]
    #[case::past_the_end("0xfffffffffffff000:8192", None)]
    #[case::half("0x1000", None)]
    fn regions_are_an_address_and_a_size_or_an_end(
        #[case] text: &str,
        #[case] is: Option<Range<u64>>,
    ) {
        assert_eq!(range(text).ok(), is);
    }

    #[rstest]
    #[case::gib(4 << 30..6 << 30, "0x100000000:2GiB")]
    #[case::mib(0..3 << 29, "0x0:1536MiB")]
    #[case::kib(0x1000..0x2000, "0x1000:4KiB")]
    #[case::odd(0x1000..0x2200, "0x1000:4608B")]
    fn a_region_is_printed_with_a_unit_and_read_back(
        #[case] region: Range<u64>,
        #[case] text: &str,
    ) {
        assert_eq!(text_of_one(&region), text);
        assert_eq!(range(text), Ok(region));
    }

    #[rstest]
    #[case::seconds("90", Some(90_000))]
    #[case::milliseconds("500ms", Some(500))]
    #[case::days("30d", Some(2_592_000_000))]
    #[case::no_unit("3 parsecs", None)]
    #[case::no_number("soon", None)]
    fn times_have_a_unit_or_are_seconds(#[case] text: &str, #[case] milliseconds: Option<u64>) {
        let expected = milliseconds.map(Duration::from_millis);
        assert_eq!(duration(text).ok(), expected);
    }

    #[test]
    fn a_page_is_a_power_of_two() {
        assert_eq!(page_size("16K"), Ok(16384));
        assert!(page_size("5000").unwrap_err().contains("power of two"));
    }
}
