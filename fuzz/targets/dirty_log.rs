//! Dirty logs of any words, at any address, in any page size: what lies inside the RAM is marked,
//! and the rest is an error.
#![no_main]

use dirty_bitmap::DirtyBitmap;
use libfuzzer_sys::fuzz_target;

const START: u64 = 1 << 20;
const SIZE: u64 = 256 << 10;
const PAGE: u64 = 4096;

fuzz_target!(|log: (u64, u8, Vec<u64>)| {
    let (address, shift, words) = log;
    // Mostly near the RAM.
    let address = if address % 4 == 0 {
        address
    } else {
        START - SIZE + address % (3 * SIZE)
    };
    let page_size = 1_u64.checked_shl(u32::from(shift % 70)).unwrap_or(3);
    let words = &words[..words.len().min(64)];
    let bitmap = DirtyBitmap::new(START, SIZE, PAGE).expect("a bitmap");
    let result = bitmap.mark_dirty_log(address, page_size, words);
    if !page_size.is_power_of_two() {
        assert!(result.is_err() && bitmap.is_clean());
        return;
    }
    let mut expected = [false; (SIZE / PAGE) as usize];
    let (mut inside, mut count) = (true, 0);
    for (word, bits) in words.iter().enumerate() {
        for bit in (0..64).filter(|bit| u64::from_le(*bits) >> bit & 1 == 1) {
            count += 1;
            let start = u128::from(address) + (word as u128 * 64 + bit) * u128::from(page_size);
            let end = start + u128::from(page_size);
            let (low, high) = (u128::from(START), u128::from(START + SIZE));
            inside &= low <= start && end <= high;
            for (page, dirty) in expected.iter_mut().enumerate() {
                let first = low + page as u128 * u128::from(PAGE);
                *dirty |= first < end && start < first + u128::from(PAGE);
            }
        }
    }
    assert_eq!(result.is_ok(), inside, "{result:?}");
    if let Ok(pages) = result {
        assert_eq!(pages, count);
    }
    for (page, dirty) in expected.iter().enumerate() {
        let address = START + page as u64 * PAGE;
        assert_eq!(
            bitmap.is_dirty(address).expect("inside"),
            *dirty,
            "page {page}"
        );
    }
});
