//! Snapshots that are more than one file: those of Cloud Hypervisor and VMware.

mod support;

use std::fs;
use std::path::Path;

use rstest::rstest;
use support::{PAGE, assert_ram, noise};
use vmm_files::{CloudHypervisorSnapshot, Format, GuestFile, OpenError};

/// `state.json`, of which the state of the memory manager is JSON in a string: the ranges in the
/// order of the file `memory-ranges`, here the high RAM first.
const MANAGER: &str = r#"{
    "memory_ranges": {"data": [{"gpa": 4294967296, "length": 12288}, {"gpa": 0, "length": 8192}]},
    "guest_ram_mappings": [
        {"slot": 0, "gpa": 0, "size": 8192, "zone_id": "mem0", "virtio_mem": false, "file_offset": 0},
        {"slot": 1, "gpa": 4294967296, "size": 12288, "zone_id": "mem0", "virtio_mem": false, "file_offset": 0},
        {"slot": 2, "gpa": 9999998976, "size": 8192, "zone_id": "hot", "virtio_mem": true, "file_offset": 0}],
    "boot_ram": 20480, "arch_mem_regions": []}"#;

fn cloud_hypervisor(dir: &Path, manager: &str) {
    let text = serde_json::to_string(manager).unwrap();
    let state = format!(
        r#"{{"snapshots": {{
            "cpu-manager": {{"snapshots": {{}}, "snapshot_data": null}},
            "memory-manager": {{"snapshots": {{}}, "snapshot_data": {{"state": {text}}}}}}},
        "snapshot_data": {{"state": "{{}}"}}}}"#
    );
    fs::write(dir.join("state.json"), state).unwrap();
    fs::write(dir.join("config.json"), "{}").unwrap();
    fs::write(dir.join("memory-ranges"), noise(5 * PAGE)).unwrap();
}

#[test]
fn ranges_of_cloud_hypervisor_are_in_the_order_of_the_state() {
    let dir = tempfile::tempdir().unwrap();
    cloud_hypervisor(dir.path(), MANAGER);
    let guest = GuestFile::detect(dir.path()).unwrap();
    assert_eq!(guest.format(), Format::CloudHypervisor);
    assert_eq!(
        guest.layout().to_string(),
        "0x0..0x2000, 0x100000000..0x100003000"
    );
    let file = noise(5 * PAGE);
    assert_ram(
        &guest,
        &[&file[3 * PAGE as usize..], &file[..3 * PAGE as usize]].concat(),
    );
    let snapshot = CloudHypervisorSnapshot::open(dir.path()).unwrap();
    let high = 4 << 30;
    assert_eq!(snapshot.ranges(), [high..high + 3 * PAGE, 0..2 * PAGE]);
}

#[rstest]
#[case::no_ranges("data", "other", "missing field `data`")]
#[case::empty_range("8192}]}", "0}]}", "has 0 bytes")]
#[case::past_the_end(
    "\"gpa\": 0, \"length\"",
    "\"gpa\": 18446744073709551615, \"length\"",
    "damaged"
)]
#[case::shared_file(
    "\"gpa\": 0, \"size\"",
    "\"gpa\": 20480, \"size\"",
    "dump that file instead"
)]
#[case::short_memory("\"length\": 12288", "\"length\": 16384", "has 20480 bytes")]
#[case::overlap("\"gpa\": 0, \"length\"", "\"gpa\": 4294967296, \"length\"", "")]
fn unusable_snapshots_of_cloud_hypervisor_are_refused(
    #[case] from: &str,
    #[case] to: &str,
    #[case] words: &str,
) {
    let dir = tempfile::tempdir().unwrap();
    assert!(MANAGER.contains(from));
    cloud_hypervisor(dir.path(), &MANAGER.replace(from, to));
    let error = GuestFile::detect(dir.path()).unwrap_err().to_string();
    assert!(error.contains(words), "{error}");
}

#[test]
fn states_of_other_versions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    cloud_hypervisor(dir.path(), MANAGER);
    for (state, words) in [
        ("{}", "newer Cloud Hypervisor"),
        (r#"{"snapshots": {}}"#, "newer Cloud Hypervisor"),
        ("{", "no valid JSON"),
        (
            r#"{"snapshots": {"memory-manager": {"snapshot_data": {"state": "x"}}}}"#,
            "no valid JSON",
        ),
    ] {
        fs::write(dir.path().join("state.json"), state).unwrap();
        let error = GuestFile::detect(dir.path()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    fs::write(dir.path().join("state.json"), vec![b'['; 1 << 20]).unwrap();
    GuestFile::detect(dir.path()).unwrap_err();
}

/// Returns a `.vmsn` file of version 3, in little-endian numbers:
///
/// | bytes | contents |
/// |---|---|
/// | 0..12 | magic number d2 be d2 be, an unknown number, the number of groups: 2 |
/// | 12..92, 92..172 | groups: a name of 64 bytes, position and length of the tags |
/// | 172.. | tags of the group `memory` |
///
/// A tag is a byte of flags (upper two bits: number of indices; lower six: length of the value), a
/// byte with the length of the name, the name, the indices (4 bytes each), the value.
struct Vmsn {
    bytes: Vec<u8>,
}

impl Vmsn {
    fn new() -> Self {
        let mut bytes = vec![0xd2, 0xbe, 0xd2, 0xbe, 8, 0, 0, 0, 2, 0, 0, 0];
        for (name, at) in [("cpu", 0_u64), ("memory", 172)] {
            let mut group = name.as_bytes().to_vec();
            group.resize(64, 0);
            bytes.extend(group);
            bytes.extend(at.to_le_bytes());
            bytes.extend(0_u64.to_le_bytes());
        }
        Self { bytes }
    }

    fn tag(&mut self, name: &str, indices: &[u32], value: u32) -> &mut Self {
        let flags = (indices.len() as u8) << 6 | 4;
        self.bytes.extend([flags, name.len() as u8]);
        self.bytes.extend(name.as_bytes());
        for number in indices.iter().chain([&value]) {
            self.bytes.extend(number.to_le_bytes());
        }
        self
    }

    /// A value of any length: flags 63, two lengths of 8 bytes, two bytes, and the value.
    fn long_tag(&mut self, name: &str, len: u64) -> &mut Self {
        self.bytes.extend([63, name.len() as u8]);
        self.bytes.extend(name.as_bytes());
        self.bytes.extend(len.to_le_bytes());
        self.bytes.extend(len.to_le_bytes());
        self.bytes.extend([0xff; 2]);
        self.bytes.resize(self.bytes.len() + len as usize, 0xaa);
        self
    }

    fn region(&mut self, number: u32, address: u32, position: u32, pages: u32) -> &mut Self {
        self.tag("regionPPN", &[number], address);
        self.tag("regionPageNum", &[number], position);
        self.tag("regionSize", &[number], pages)
    }

    fn write(&mut self, dir: &Path) {
        self.bytes.extend([0, 0]);
        fs::write(dir.join("guest.vmsn"), &self.bytes).unwrap();
        fs::write(dir.join("guest.vmem"), noise(5 * PAGE)).unwrap();
    }

    #[track_caller]
    fn refused(&mut self, words: &str) {
        let dir = tempfile::tempdir().unwrap();
        self.write(dir.path());
        let error = GuestFile::detect(dir.path().join("guest.vmsn")).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}

fn regions() -> Vmsn {
    let mut vmsn = Vmsn::new();
    vmsn.tag("align_mask", &[0, 0], 0xffff)
        .long_tag("Dummy", 5000);
    vmsn.tag("regionsCount", &[], 2)
        .region(0, 0, 0, 3)
        .region(1, 1 << 20, 3, 2);
    vmsn
}

#[test]
fn regions_of_vmware_are_in_the_state_file() {
    let dir = tempfile::tempdir().unwrap();
    regions().write(dir.path());
    let guest = GuestFile::detect(dir.path().join("guest.vmsn")).unwrap();
    assert_eq!(
        guest.layout().to_string(),
        "0x0..0x3000, 0x100000000..0x100002000"
    );
    assert_ram(&guest, &noise(5 * PAGE));
    // By the name of the memory, with the other file beside it or given.
    let memory = dir.path().join("guest.vmem");
    assert_ram(
        &GuestFile::open(&memory, Format::Vmware).unwrap(),
        &noise(5 * PAGE),
    );
    let moved = dir.path().join("state");
    fs::rename(dir.path().join("guest.vmsn"), &moved).unwrap();
    let error = GuestFile::open(&memory, Format::Vmware)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no .vmsn or .vmss file"), "{error}");
    let guest = GuestFile::options().state_file(&moved);
    assert_ram(
        &guest.open(&memory, Format::Vmware).unwrap(),
        &noise(5 * PAGE),
    );
}

#[test]
fn guests_of_vmware_without_regions_have_no_gap() {
    let dir = tempfile::tempdir().unwrap();
    Vmsn::new().tag("regionsCount", &[], 0).write(dir.path());
    let guest = GuestFile::detect(dir.path().join("guest.vmsn")).unwrap();
    assert_eq!(guest.layout().to_string(), "0x0..0x5000");
}

#[test]
fn unusable_states_of_vmware_are_refused() {
    regions().tag("regionsCount", &[], 3).refused("not 3");
    regions()
        .tag("regionPPN", &[2], 1)
        .tag("regionsCount", &[], 3)
        .refused("incomplete");
    regions()
        .tag("regionSize", &[1], 3)
        .refused("lacks the region at 0x100000000");
    regions()
        .tag("regionSize", &[5000], 3)
        .refused("not supported");
    let mut cut = regions();
    cut.bytes.pop();
    cut.bytes.pop();
    cut.refused("");
    let mut many = regions();
    many.bytes[8..12].fill(0xff);
    many.refused("groups");
    let mut other = regions();
    other.bytes[92..98].copy_from_slice(b"MEMORY");
    other.refused("no group memory");
    let mut past = regions();
    past.bytes[156..164].fill(0xff);
    past.refused("");
    let mut long = Vmsn::new();
    long.long_tag("x", 8);
    long.bytes[175..183].fill(0xff);
    long.refused("cut short");
}

#[test]
fn missing_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    regions().write(dir.path());
    fs::remove_file(dir.path().join("guest.vmem")).unwrap();
    let error = GuestFile::detect(dir.path().join("guest.vmsn")).unwrap_err();
    assert!(
        matches!(&error, OpenError::Io { path, .. } if path.ends_with("guest.vmem")),
        "{error}"
    );
}
