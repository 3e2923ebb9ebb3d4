//! Versions of Debian packages.

use std::cmp::Ordering;

/// Whether the upstream part of the package version `found` is at least `needed`, which has up to
/// three numbers.
pub(super) fn at_least(found: &str, needed: &str) -> bool {
    // A pre-release is older than its release: "1.95" alone would be before "1.95.0~beta".
    let mut needed = needed.to_owned();
    while needed.split('.').count() < 3 {
        needed.push_str(".0");
    }
    compare(upstream(found), &needed).is_ge()
}

/// The version without the epoch before it and Debian's revision after it.
fn upstream(version: &str) -> &str {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    version.rsplit_once('-').map_or(version, |(rest, _)| rest)
}

/// Compares upstream versions as `dpkg` does: by turns a part without digits and a number.
fn compare(mut a: &str, mut b: &str) -> Ordering {
    while !a.is_empty() || !b.is_empty() {
        let (text_a, text_b) = (take(&mut a, false), take(&mut b, false));
        let (number_a, number_b) = (take(&mut a, true), take(&mut b, true));
        let order = compare_text(text_a, text_b).then_with(|| compare_number(number_a, number_b));
        if order.is_ne() {
            return order;
        }
    }
    Ordering::Equal
}

/// Takes the digits, or what is not a digit, from the start.
fn take<'a>(version: &mut &'a str, digits: bool) -> &'a str {
    let end = version.find(|c: char| c.is_ascii_digit() != digits);
    let (taken, rest) = version.split_at(end.unwrap_or(version.len()));
    *version = rest;
    taken
}

/// A tilde comes before the end, the end before letters, and letters before everything else.
fn compare_text(a: &str, b: &str) -> Ordering {
    let weights = |text: &str| -> Vec<u16> {
        let weight = |byte: u8| match byte {
            b'~' => 0,
            _ if byte.is_ascii_alphabetic() => 2 + u16::from(byte),
            _ => 300 + u16::from(byte),
        };
        text.bytes().map(weight).chain([1]).collect()
    };
    weights(a).cmp(&weights(b))
}

/// Compares numbers of any length.
fn compare_number(a: &str, b: &str) -> Ordering {
    let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("1.96.0+dfsg1-1~deb12u2", "1.95", true)]
    #[case("1.95.0+dfsg1-1~deb12u2", "1.95", true)]
    #[case("1.85.0+dfsg3-1~deb12u3", "1.95", false)]
    #[case("1.100.0-1", "1.95", true)]
    #[case("1.95.0~beta.3+dfsg1-1", "1.95", false)]
    #[case("1.95.0~beta.3+dfsg1-1", "1.94", true)]
    #[case("2:1.85.0-1", "1.95", false)]
    #[case("1:1.95.1-1", "1.95", true)]
    #[case("1.95.0", "1.95.1", false)]
    #[case("1.95.10", "1.95.9", true)]
    #[case("2", "1.95", true)]
    #[case("1.95", "1.95", false)]
    fn minimum_is_compared_with_the_upstream_part(
        #[case] found: &str,
        #[case] needed: &str,
        #[case] enough: bool,
    ) {
        assert_eq!(at_least(found, needed), enough);
    }

    #[rstest]
    #[case("1.2", "1.10", Ordering::Less)]
    #[case("1.0~rc1", "1.0", Ordering::Less)]
    #[case("1.0~~", "1.0~", Ordering::Less)]
    #[case("1.0+dfsg1", "1.0", Ordering::Greater)]
    #[case("1.0a", "1.0+", Ordering::Less)]
    #[case("1.01", "1.1", Ordering::Equal)]
    #[case("1.a", "1.", Ordering::Greater)]
    #[case("99999999999999999999", "99999999999999999998", Ordering::Greater)]
    fn order_is_that_of_dpkg(#[case] a: &str, #[case] b: &str, #[case] order: Ordering) {
        assert_eq!(compare(a, b), order);
        assert_eq!(compare(b, a), order.reverse());
    }
}
