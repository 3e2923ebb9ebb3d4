//! Lists address ranges in errors.

use std::fmt;
use std::ops::Range;

/// The number of ranges that are listed.
const LISTED: usize = 16;

/// Displays the guest-physical address ranges of RAM, in hexadecimal. At most 16 are listed.
///
/// # Examples
/// ```
/// use image_format::RegionList;
///
/// let regions = [0..0xc000_0000, 0x1_0000_0000..0x1_4000_0000];
/// let list = RegionList(&regions).to_string();
/// assert_eq!(list, "0x0..0xc0000000 and 0x100000000..0x140000000");
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use = "a list has no effect until it is displayed"]
pub struct RegionList<'r>(pub &'r [Range<u64>]);

impl fmt::Display for RegionList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let listed = self.0.iter().take(LISTED);
        for (index, region) in listed.enumerate() {
            f.write_str(match index {
                0 => "",
                _ if index + 1 == self.0.len() => " and ",
                _ => ", ",
            })?;
            write!(f, "{:#x}..{:#x}", region.start, region.end)?;
        }
        match self.0.len() {
            0 => f.write_str("no address"),
            all if all > LISTED => write!(f, " and {} more", all - LISTED),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_is_cut_short() {
        let regions: Vec<_> = (0..18).map(|at| at * 16..at * 16 + 8).collect();
        let list = RegionList(&regions).to_string();
        assert!(list.starts_with("0x0..0x8, 0x10..0x18, "), "{list}");
        assert!(list.ends_with(", 0xf0..0xf8 and 2 more"), "{list}");
        assert_eq!(RegionList(&[]).to_string(), "no address");
    }
}
