//! The options that name the RAM in a process.

use std::fmt;
use std::ops::Range;

use process_memory::ProcessMaps;

use crate::failure::Failure;
use crate::numbers;

/// The value that stands for the largest mapping.
const LARGEST: &str = "largest";
/// The least number of digits of an address without `0x`, as the kernel pads them.
const BARE_DIGITS: usize = 8;

/// The location of RAM in a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Region {
    /// The largest readable and writable mapping.
    Largest,
    /// The mapping whose name equals or contains this text.
    Named(String),
    /// The mapping that this address is in.
    At(u64),
    Range(Range<u64>),
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Largest => f.write_str(LARGEST),
            Self::Named(name) => f.write_str(name),
            Self::At(address) => write!(f, "{address:#x}"),
            Self::Range(range) => f.write_str(&numbers::text_of_one(range)),
        }
    }
}

impl Region {
    /// Parses `/memfd:ram`, `largest`, `0x7f0000000000`, `0x7f0000000000:2GiB`, or the first
    /// address and the one after the last.
    ///
    /// Addresses are hexadecimal. Without `0x`, as in `/proc/PID/maps`, they have 8 digits or more.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == LARGEST {
            return Ok(Self::Largest);
        }
        if !is_address(text.split([':', '-', '.']).next().unwrap_or(text)) {
            return Ok(Self::Named(text.to_owned()));
        }
        let prefixed = |number: &str| match number.starts_with("0x") {
            true => number.to_owned(),
            false => format!("0x{number}"),
        };
        if let Some((start, size)) = text.split_once(':') {
            return numbers::range(&format!("{}:{size}", prefixed(start))).map(Self::Range);
        }
        match text.split_once("..").or_else(|| text.split_once('-')) {
            Some((start, end)) => {
                let range = format!("{}-{}", prefixed(start), prefixed(end));
                numbers::range(&range).map(Self::Range)
            }
            None => numbers::address(&prefixed(text)).map(Self::At),
        }
    }

    pub(super) fn find(&self, maps: &ProcessMaps) -> anyhow::Result<Range<u64>> {
        match self {
            Self::Largest => match maps.candidates().first() {
                Some(largest) => Ok(largest.addresses.clone()),
                None => Err(Failure::NothingLarge { pid: maps.pid() }.into()),
            },
            Self::Named(name) => Ok(maps.named(name)?.addresses.clone()),
            Self::Range(range) => Ok(range.clone()),
            Self::At(address) => Ok(find_at(*address, maps)?),
        }
    }
}

fn is_address(text: &str) -> bool {
    let is_hexadecimal = text.bytes().all(|digit| digit.is_ascii_hexdigit());
    text.starts_with("0x") || (text.len() >= BARE_DIGITS && is_hexadecimal)
}

/// Returns the mapping at `address`. Refuses one of several that may be parts of the RAM.
fn find_at(address: u64, maps: &ProcessMaps) -> Result<Range<u64>, Failure> {
    let pid = maps.pid();
    let found = maps.at(address).zip(maps.around(address));
    let (region, whole) = found.ok_or(Failure::NothingMapped { pid, address })?;
    let part = region.addresses.clone();
    match part == whole {
        true => Ok(part),
        false => Err(Failure::PartOfRam {
            pid,
            address,
            part: Region::Range(part).to_string(),
            whole: Region::Range(whole).to_string(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::name("/memfd:ram", Some(Region::Named("/memfd:ram".into())))]
    #[case::name_with_a_dash("guest-ram", Some(Region::Named("guest-ram".into())))]
    #[case::short_name_of_digits("cafe", Some(Region::Named("cafe".into())))]
    #[case::largest("largest", Some(Region::Largest))]
    #[case::address("0x7f00", Some(Region::At(0x7f00)))]
    #[case::bare_address("7f0000001000", Some(Region::At(0x7f00_0000_1000)))]
    #[case::range("0x1000:8KiB", Some(Region::Range(0x1000..0x3000)))]
    #[case::hexadecimal_size("0x1000:0x2000", Some(Region::Range(0x1000..0x3000)))]
    #[case::bare_range("7f0000001000:8KiB", Some(Region::Range(0x7f00_0000_1000..0x7f00_0000_3000)))]
    #[case::as_maps_print_it("00001000-00003000", Some(Region::Range(0x1000..0x3000)))]
    #[case::as_errors_print_it("0x1000-0x3000", Some(Region::Range(0x1000..0x3000)))]
    #[case::as_info_prints_it("0x1000..0x3000", Some(Region::Range(0x1000..0x3000)))]
    #[case::backwards("0x3000-0x1000", None)]
    #[case::no_number("0xram", None)]
    fn a_region_is_a_name_an_address_or_a_range(#[case] text: &str, #[case] is: Option<Region>) {
        assert_eq!(Region::parse(text).ok(), is);
    }
}
