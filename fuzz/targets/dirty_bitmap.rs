//! Encoded bitmaps of any bytes: refused, or decoded to the marks that a simple reader finds.
#![no_main]

use dirty_bitmap::DirtyBitmap;
use libfuzzer_sys::fuzz_target;

const HEADER: usize = 40;
const MAX_RAM: u64 = 1 << 52;
/// The most pages for which a decoded bitmap is rebuilt.
const FEW: u64 = 1 << 16;

fuzz_target!(|bytes: &[u8]| {
    // Most bytes do not begin with the magic number.
    let with_magic = [b"DIRTYBM\x01", bytes].concat();
    for bytes in [bytes, &with_magic] {
        check(bytes);
    }
});

fn check(bytes: &[u8]) {
    let decoded = DirtyBitmap::from_bytes(bytes);
    let Some(expected) = Expected::read(bytes) else {
        assert!(decoded.is_err(), "{decoded:?}");
        return;
    };
    let bitmap = decoded.expect("valid bytes");
    assert_eq!(bitmap.ram_start(), expected.start);
    assert_eq!(bitmap.ram_size(), expected.size);
    assert_eq!(bitmap.page_size(), expected.page_size);
    assert_eq!(bitmap.granule(), expected.granule);
    assert!(bitmap.runs().eq(expected.runs.iter().cloned()));
    assert_eq!(bitmap.to_bytes(), bytes);
    // A table of larger pages would widen the marks.
    if expected.granule >= expected.page_size && expected.size / expected.page_size < FEW {
        bitmap.rebuild(expected.page_size).expect("the page size");
        assert!(bitmap.runs().eq(expected.runs));
    }
}

struct Expected {
    start: u64,
    size: u64,
    page_size: u64,
    granule: u64,
    runs: Vec<std::ops::Range<u64>>,
}

impl Expected {
    /// Returns `None` for bytes that are not a bitmap.
    fn read(bytes: &[u8]) -> Option<Self> {
        let (header, marks) = bytes.split_at_checked(HEADER)?;
        let words: Vec<_> = header
            .as_chunks()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word))
            .collect();
        let [_, start, size, page_size, granule] = words[..] else {
            return None;
        };
        let is_size = |unit: u64| unit.is_power_of_two() && unit <= size;
        let is_ram = (1..=MAX_RAM).contains(&size) && start.checked_add(size).is_some();
        if !header.starts_with(b"DIRTYBM\x01")
            || !is_ram
            || !is_size(page_size)
            || !is_size(granule)
        {
            return None;
        }
        let granules = size.div_ceil(granule);
        if marks.len() as u64 != granules.div_ceil(64) * 8 {
            return None;
        }
        let mut runs = Vec::<std::ops::Range<u64>>::new();
        for (byte, bits) in marks.iter().enumerate() {
            for bit in (0..8).filter(|bit| bits >> bit & 1 == 1) {
                let at = byte as u64 * 8 + bit;
                if at >= granules {
                    return None;
                }
                let run = at * granule..size.min((at + 1) * granule);
                match runs.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => runs.push(run),
                }
            }
        }
        Some(Self {
            start,
            size,
            page_size,
            granule,
            runs,
        })
    }
}
