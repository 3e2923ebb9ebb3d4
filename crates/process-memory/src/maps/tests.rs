//! Tests of the search for regions.

use rstest::rstest;

use super::*;

const VMM: &str = "\
55d0c0000000-55d0c0021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0040000000 rw-s 00000000 00:01 1027                       /memfd:ram (deleted)
7f0040000000-7f0040001000 ---p 00000000 00:00 0 
7f0040001000-7f0040003000 rw-s 00000000 00:01 1028                       /memfd:ram2 (deleted)
7f0041000000-7f00c1000000 rw-s 40000000 00:01 1027                       /memfd:ram (deleted)
7f00d0000000-7f00d0001000 r--p 00001000 fe:00 4711                       /a b\\012c/vm.img
7f00d0001000-7f00d0002000 r--p 00002000 fe:00 4711                       /a b\\012c/vm.img
7f00d0002000-7f00d0003000 rw-p 00003000 fe:00 4711                       /a b\\012c/vm.img
7f00e0000000-7f0ae0000000 rw-s 00000000 00:0e 9                          anon_inode:[vfio-device]
7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0                          [stack]
";

/// Returns the mappings of process 7, as listed by the kernel.
fn maps_of(list: &str) -> ProcessMaps {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("maps"), list).unwrap();
    let listed = ProcessRegion::list(dir.path().to_str().unwrap(), 7);
    ProcessMaps::new(7, listed.unwrap())
}

fn vmm() -> ProcessMaps {
    maps_of(VMM)
}

#[test]
fn only_consecutive_parts_of_one_file_are_joined() {
    let starts: Vec<_> = vmm()
        .regions()
        .iter()
        .map(|region| region.addresses.start)
        .collect();
    let skipped = 0x7f00_d000_1000;
    assert_eq!(starts.len(), VMM.lines().count() - 1);
    assert!(!starts.contains(&skipped));
    let anonymous = "1000-2000 rw-p 00000000 00:00 0 \n2000-3000 rw-p 00000000 00:00 0 \n";
    let maps = maps_of(anonymous);
    assert_eq!(maps.regions().len(), 2);
}

#[rstest]
#[case::whole(0x7f00_d000_0000..0x7f00_d000_3000, &[0, 0x1000, 0x2000])]
#[case::overlapping(0x7f00_d000_0fff..0x7f00_d000_1001, &[0, 0x1000])]
#[case::one(0x7f00_d000_1000..0x7f00_d000_2000, &[0x1000])]
#[case::gap(0x7f00_d000_3000..0x7f00_e000_0000, &[])]
#[case::empty(0x7f00_d000_1001..0x7f00_d000_1001, &[])]
#[case::reversed(Range { start: 0x7f00_d000_2000, end: 0x7f00_d000_1000 }, &[])]
#[case::past_the_end(u64::MAX - 1..u64::MAX, &[])]
fn lines_are_not_joined(#[case] range: Range<u64>, #[case] starts: &[u64]) {
    let maps = vmm();
    let lines = maps.lines_in(&range).iter();
    let found: Vec<_> = lines
        .map(|line| line.addresses.start - 0x7f00_d000_0000)
        .collect();
    assert_eq!(found, starts);
}

#[rstest]
#[case::whole("[heap]", 0x55d0_c000_0000)]
#[case::without_the_suffix_deleted("/memfd:ram2", 0x7f00_4000_1000)]
#[case::in_part("ram2", 0x7f00_4000_1000)]
#[case::with_an_escape("b\\012c/vm.img", 0)]
fn a_region_is_found_by_its_name(#[case] name: &str, #[case] start: u64) {
    match vmm().named(name) {
        Ok(region) => assert_eq!(region.addresses.start, start),
        Err(FindRegionError::Ambiguous { regions, .. }) => {
            assert_eq!(
                (start, regions.len()),
                (0, 2),
                "another protection is another region"
            );
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn an_ambiguous_name_is_refused_with_all_matches() {
    let error = vmm().named("/memfd:ram").unwrap_err().to_string();
    assert_eq!(
        error,
        "process 7 has several mappings (2) whose name contains \"/memfd:ram\": \
         give the address of one of them:\n  \
         0x7f0000000000-0x7f0040000000 rw-s 1048576 KiB from offset 0x0 of \
         /memfd:ram (deleted)\n  \
         0x7f0041000000-0x7f00c1000000 rw-s 2097152 KiB from offset 0x40000000 of \
         /memfd:ram (deleted)"
    );
}

#[test]
fn an_unknown_name_is_refused_with_the_largest_regions() {
    match vmm().named("pc.ram\x1b[2J").unwrap_err() {
        error @ FindRegionError::NotFound { .. } => {
            let text = error.to_string();
            assert!(!text.contains('\x1b'), "{text}");
            let FindRegionError::NotFound { regions, .. } = error else {
                unreachable!("matched above")
            };
            assert_eq!(regions[0].addresses.start, 0x7f00_4100_0000);
        }
        other => panic!("{other}"),
    }
    assert!(vmm().all_named("pc.ram").is_empty());
}

#[rstest]
#[case(0x7f00_0000_0000, true)]
#[case(0x7f00_3fff_ffff, true)]
#[case(0x7f00_4000_3000, false)]
#[case(0, false)]
#[case(u64::MAX, false)]
fn a_region_is_found_by_any_address_inside(#[case] address: u64, #[case] found: bool) {
    assert_eq!(vmm().at(address).is_some(), found);
}

#[rstest]
#[case::file(0x7f00_d000_2fff, Some(0x7f00_d000_0000..0x7f00_d000_3000))]
#[case::whole(0x7f00_0000_0000, Some(0x7f00_0000_0000..0x7f00_4000_0000))]
#[case::beside_a_guard_page(0x7f00_4000_0000, Some(0x7f00_4000_0000..0x7f00_4000_1000))]
#[case::nothing(0x7f00_d000_3000, None)]
fn parts_of_one_memory_are_found(#[case] address: u64, #[case] whole: Option<Range<u64>>) {
    assert_eq!(vmm().around(address), whole);
}

#[rstest]
#[case::permissions("r--p 00000000 00:00 0 ", 0x1000..0x4000)]
#[case::advice("rw-p 00000000 00:00 0 ", 0x1000..0x4000)]
#[case::shared("rw-s 00000000 00:00 0 ", 0x2000..0x3000)]
#[case::inaccessible("---p 00000000 00:00 0 ", 0x2000..0x3000)]
#[case::named("rw-p 00000000 00:00 0      [anon:other]", 0x2000..0x3000)]
#[case::file("rw-p 00000000 00:01 7      /file", 0x2000..0x3000)]
fn parts_of_anonymous_memory_are_found(#[case] beside: &str, #[case] whole: Range<u64>) {
    let list = format!(
        "1000-2000 {beside}\n2000-3000 rw-p 00000000 00:00 0 \n3000-4000 {beside}\n\
         5000-6000 rw-p 00000000 00:00 0 \n"
    );
    assert_eq!(maps_of(&list).around(0x2000), Some(whole));
}

#[test]
fn candidates_are_sorted_by_size_without_devices() {
    let maps = vmm();
    let sizes: Vec<_> = maps
        .candidates()
        .iter()
        .map(|region| region.size())
        .collect();
    assert_eq!(sizes[..2], [2 << 30, 1 << 30]);
    assert_eq!(sizes.len(), 6);
}
