//! Tables of RAM regions of any numbers: refused, or a one-to-one translation of addresses and
//! offsets.
#![no_main]

use libfuzzer_sys::fuzz_target;
use page_reader::RamLayout;

fuzz_target!(|input: (Vec<(u64, u64)>, Vec<(u64, u64)>, bool)| {
    let (mut regions, probes, aligned) = input;
    if aligned {
        // Most numbers are no region's; these may be.
        for (start, size) in &mut regions {
            *start = *start % (1 << 44) & !4095;
            *size = *size % (1 << 30) & !4095;
        }
    }
    let Ok(layout) = RamLayout::new(regions.iter().copied()) else {
        return;
    };
    assert_eq!(layout.regions().len(), regions.len());
    let sum: u128 = regions.iter().map(|(_, size)| u128::from(*size)).sum();
    assert_eq!(u128::from(layout.ram_size()), sum);
    let in_ram = |address: u64| {
        regions
            .iter()
            .any(|(start, size)| address.checked_sub(*start).is_some_and(|at| at < *size))
    };
    for (address, size) in probes {
        let offset = layout.offset_of(address);
        assert_eq!(offset.is_some(), in_ram(address));
        if let Some(offset) = offset {
            assert_eq!(layout.guest_address_of(offset), Some(address));
        }
        if let Ok(pieces) = layout.guest_pieces(address, size) {
            let mut next = address;
            for piece in pieces {
                assert_eq!(piece.guest_start, next);
                assert_eq!(layout.offset_of(piece.guest_start), Some(piece.offset));
                next += piece.size;
            }
            assert_eq!(next - address, size);
        }
        let offset = address % layout.ram_size();
        if let Ok(pieces) = layout.offset_pieces(offset, size) {
            let mut next = offset;
            for piece in pieces {
                assert_eq!(piece.offset, next);
                next += piece.size;
            }
            assert_eq!(next - offset, size);
        }
    }
});
