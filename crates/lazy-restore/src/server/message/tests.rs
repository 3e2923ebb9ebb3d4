use proptest::prelude::*;
use rstest::rstest;

use super::*;

const PAGE: u64 = 1 << 16;
const RAM: u64 = 8 * PAGE;

fn region(address: u64, pages: u64, offset: u64) -> String {
    let (size, offset) = (pages * PAGE, offset * PAGE);
    format!(
        r#"{{"base_host_virt_addr":{address},"size":{size},"offset":{offset},"page_size":{PAGE}}}"#
    )
}

fn list(regions: &[String]) -> Vec<u8> {
    format!("[{}]", regions.join(",")).into_bytes()
}

#[test]
fn regions_may_come_in_any_order_of_offsets_and_addresses() {
    let message = list(&[
        region(0x9000_0000, 3, 5),
        region(0x1000_0000, 4, 1),
        region(0x5000_0000, 1, 0),
    ]);
    let parsed = VmRegions::parse(&message, RAM).unwrap();
    assert_eq!((parsed.page_size(), parsed.len()), (PAGE, 3));
    let parts: Vec<_> = parsed.regions.parts(0..RAM).collect();
    let expected = [
        (0x5000_0000, 0..PAGE),
        (0x1000_0000, PAGE..5 * PAGE),
        (0x9000_0000, 5 * PAGE..RAM),
    ];
    assert_eq!(parts, expected);
    assert_eq!(parsed.regions.offset_of(0x1000_0000 + 7), Some(PAGE + 7));
    assert_eq!(parsed.regions.offset_of(0x4fff_ffff), None);
}

#[rstest]
#[case::in_bytes(r#""page_size":2097152"#, 2 << 20)]
#[case::former_name(r#""page_size_kib":2097152"#, 2 << 20)]
#[case::both(r#""page_size":4096,"page_size_kib":4"#, 4096)]
#[case::neither(r#""name":"ram""#, 4096)]
fn page_size_is_in_bytes(#[case] members: &str, #[case] page_size: u64) {
    if page_size < host_page() {
        return;
    }
    let message =
        format!(r#"[{{"base_host_virt_addr":4194304,"size":4194304,"offset":0,{members}}}]"#);
    let parsed = VmRegions::parse(message.as_bytes(), 4 << 20).unwrap();
    assert_eq!(parsed.page_size(), page_size);
}

#[rstest]
#[case::no_regions("[]".into(), "no memory region")]
#[case::an_object("{}".into(), "not a list")]
#[case::negative(list(&[region(PAGE, 8, 0)]).strip_suffix(b"]").unwrap().to_vec(), "not a list")]
#[case::too_small(list(&[region(PAGE, 7, 0)]), "the image")]
#[case::too_large(list(&[region(PAGE, 9, 0)]), "the image")]
#[case::gap(list(&[region(PAGE, 4, 0), region(9 * PAGE, 3, 5)]), "0x40000")]
#[case::not_from_zero(list(&[region(PAGE, 7, 1)]), "0x0")]
#[case::offset_twice(list(&[region(PAGE, 4, 0), region(9 * PAGE, 5, 3)]), "0x30000")]
#[case::overlap(list(&[region(PAGE, 4, 0), region(4 * PAGE, 4, 4)]), "overlap at 0x40000")]
#[case::same_address(list(&[region(PAGE, 4, 0), region(PAGE, 4, 4)]), "overlap")]
#[case::empty(list(&[region(PAGE, 0, 0), region(9 * PAGE, 8, 0)]), "empty")]
#[case::null(list(&[region(0, 8, 0)]), "empty")]
#[case::unaligned(list(&[region(PAGE + 4096, 8, 0)]), "multiple")]
#[case::past_the_end(list(&[region(u64::MAX - PAGE + 1, 8, 0)]), "past the last")]
fn regions_that_cannot_be_filled_are_refused(#[case] message: Vec<u8>, #[case] says: &str) {
    let error = VmRegions::parse(&message, RAM).unwrap_err().to_string();
    assert!(error.contains(says), "{error}");
}

#[rstest]
#[case::zero(0)]
#[case::smaller_than_a_page(512)]
#[case::no_power_of_two(3 << 16)]
#[case::too_large(4 << 20)]
#[case::huge(1 << 63)]
fn page_sizes_that_no_memory_has_are_refused(#[case] page_size: u64) {
    let message = format!(
        r#"[{{"base_host_virt_addr":{PAGE},"size":{RAM},"offset":0,"page_size":{page_size}}}]"#
    );
    let error = VmRegions::parse(message.as_bytes(), RAM).unwrap_err();
    assert!(matches!(error, MessageError::PageSize { .. }), "{error}");
}

#[test]
fn too_many_regions_are_refused() {
    let regions: Vec<_> = (0..=MAX_REGIONS as u64)
        .map(|number| region((1 + number) * PAGE, 1, number))
        .collect();
    let ram_size = regions.len() as u64 * PAGE;
    let error = VmRegions::parse(&list(&regions), ram_size).unwrap_err();
    assert!(matches!(error, MessageError::TooMany { .. }), "{error}");
    let fewer = &regions[..MAX_REGIONS];
    VmRegions::parse(&list(fewer), ram_size - PAGE).unwrap();
}

proptest! {
    /// What is accepted covers the RAM once, at addresses that differ.
    #[test]
    fn accepted_regions_cover_the_ram_once(
        regions in prop::collection::vec((0..20_u64, 0..5_u64, 0..9_u64), 0..5),
    ) {
        let text = regions.iter().map(|(address, pages, offset)| region(address * PAGE, *pages, *offset));
        let message = list(&text.collect::<Vec<_>>());
        if let Ok(parsed) = VmRegions::parse(&message, RAM) {
            let mut end = 0;
            let mut addresses = std::collections::BTreeSet::new();
            for (address, part) in parsed.regions.parts(0..RAM) {
                prop_assert_eq!(part.start, end);
                end = part.end;
                for page in 0..(part.end - part.start) / PAGE {
                    prop_assert!(addresses.insert(address + page * PAGE));
                }
            }
            prop_assert_eq!(end, RAM);
        }
    }

    #[test]
    fn arbitrary_messages_are_parsed_or_refused(
        message in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            "\\[(\\{(\"(base_host_virt_addr|size|offset|page_size)\":[0-9]{1,20},?){0,4}\\},?){0,3}\\]"
                .prop_map(String::into_bytes),
        ],
        ram_size in any::<u64>(),
    ) {
        let _ = VmRegions::parse(&message, ram_size);
    }
}
