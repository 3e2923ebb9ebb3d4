//! Messages of VMMs to a page server, of any bytes: refused, or the regions that a simple reader
//! finds, which cover the RAM once.
#![no_main]

use lazy_restore::VmRegions;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|message: &[u8]| {
    let Ok(Value::Array(listed)) = serde_json::from_slice(message) else {
        assert!(VmRegions::parse(message, 1 << 20).is_err());
        return;
    };
    // A struct may also be given as an array, whose members have no names.
    if !listed.iter().all(Value::is_object) {
        return;
    }
    let member = |region: &Value, name: &str| region.get(name).and_then(Value::as_u64);
    let sizes = listed.iter().filter_map(|region| member(region, "size"));
    let ram_size = sizes.fold(0, u64::wrapping_add);
    let Ok(parsed) = VmRegions::parse(message, ram_size) else {
        return;
    };
    assert_eq!(parsed.len(), listed.len());
    let mut end = 0;
    for (address, range) in parsed.regions() {
        assert_eq!(range.start, end, "a gap, or an overlap");
        end = range.end;
        for number in [address, range.start, range.end] {
            assert!(number.is_multiple_of(parsed.page_size()));
        }
        let is_it = |region: &&Value| {
            member(region, "base_host_virt_addr") == Some(address)
                && member(region, "offset") == Some(range.start)
                && member(region, "size") == Some(range.end - range.start)
        };
        assert!(listed.iter().any(|region| is_it(&region)));
    }
    assert_eq!(end, ram_size);
});
