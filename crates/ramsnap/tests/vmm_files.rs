//! Files of other VMMs: converted to images, made of images, and refused.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};

use rstest::rstest;
use serde_json::Value;
use support::{PAGE, RAM, Work, noise};
#[cfg(target_os = "linux")]
use test_machine::needs;

fn info(work: &Work, image: &str) -> Value {
    work.good(&format!("info {image} --json")).json()[0].clone()
}

fn regions(work: &Work, image: &str) -> Vec<(u64, u64)> {
    let info = info(work, image);
    let regions = info["regions"].as_array().unwrap().iter();
    let number = |region: &Value, field| region[field].as_u64().unwrap();
    regions
        .map(|region| (number(region, "guest_address"), number(region, "bytes")))
        .collect()
}

#[test]
fn an_elf_core_has_the_ram_of_an_image_and_back() {
    let work = Work::with_ram();
    let split = "--region-at 0:2MiB --region-at 0x100000000:6MiB";
    work.good(&format!("dump ram -o full.mem {split}"));
    let made = work.good("convert full.mem -o core --to elf");
    assert!(
        made.out
            .contains("ELF core of 8.00 MiB of RAM, 460.00 KiB present"),
        "{made:?}"
    );
    let mode = fs::metadata(work.path("core"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    // `ramsnap info` cannot read it.
    work.fails(
        "info elf:core",
        2,
        &["only `ramsnap convert` reads \"core\" as elf"],
    );
    work.good("convert elf:core -o back.mem");
    assert_eq!(
        regions(&work, "back.mem"),
        [(0, 2 << 20), (4 << 30, 6 << 20)]
    );
    assert_eq!(info(&work, "back.mem")["layout"], "packed");
    assert_eq!(info(&work, "back.mem")["present"]["bytes"], 115 * PAGE);
    work.good("restore back.mem -o back");
    work.assert_same("back", "ram");
    // From one format to the next, and all pages if they are asked for.
    work.good("convert --format elf core -o lime --to lime");
    let lime = work.read("lime");
    assert_eq!(lime.len() as u64, RAM + 2 * 32);
    assert!(lime[32..][..2 << 20] == work.read("ram")[..2 << 20]);
    work.good("convert elf:core -o all.mem --keep-zeros --layout sealed");
    work.good("verify all.mem");
}

#[rstest]
#[case::firecracker("firecracker", &[(0, 3 << 30), (4 << 30, 1 << 30)])]
#[case::arm64("firecracker-arm64", &[(2 << 30, 4 << 30)])]
#[case::pc("qemu-pc", &[(0, 3 << 30), (4 << 30, 1 << 30)])]
#[case::q35("qemu-q35", &[(0, 2 << 30), (4 << 30, 2 << 30)])]
#[case::microvm("qemu-microvm", &[(0, 3 << 30), (4 << 30, 1 << 30)])]
fn a_machine_gives_the_regions(#[case] machine: &str, #[case] expected: &[(u64, u64)]) {
    let work = Work::empty();
    let ram = work.create("large", 4 << 30);
    ram.write_all_at(&noise(1, PAGE), (4 << 30) - PAGE).unwrap();
    work.good(&format!("dump large -o full.mem --guest {machine}"));
    assert_eq!(regions(&work, "full.mem"), expected);
}

#[test]
fn machines_and_regions_exclude_each_other() {
    let work = Work::with_ram();
    let both = "dump ram -o x --guest qemu-pc --region-at 0:8MiB";
    work.fails(both, 2, &["cannot be used with"]);
    work.fails("dump ram -o x --guest vax", 2, &["qemu-q35"]);
    work.fails(
        "dump ram -o x --guest qemu-pc --layout raw",
        2,
        &["--layout sealed or packed"],
    );
    // The regions of the parent are known.
    work.good("dump ram -o full.mem --guest qemu-virt");
    work.change(1, 1);
    work.fails(
        "diff full.mem --ram ram -o d1 --guest qemu-pc",
        2,
        &["leave out --region-at"],
    );
    work.good("diff full.mem --ram ram -o d1.mem --guest qemu-virt");
    for convert in ["convert full.mem -o x", "convert full.mem -o x --to elf"] {
        let convert = format!("{convert} --guest qemu-pc");
        work.fails(&convert, 2, &["0x40000000", "--guest"]);
    }
}

#[test]
fn firecracker_gets_raw_memory_of_its_own_addresses() {
    let work = Work::with_ram();
    work.good("convert raw:ram -o fc.mem --to firecracker");
    work.assert_same("fc.mem", "ram");
    work.good("dump ram -o full.mem --guest firecracker-arm64");
    work.good("convert full.mem -o arm.mem --to firecracker");
    work.good("dump ram -o odd.mem --region-at 0x1000:8MiB");
    work.fails(
        "convert odd.mem -o x --to firecracker",
        2,
        &["Firecracker has other regions"],
    );
}

#[test]
fn addresses_and_whole_ram_are_needed() {
    let work = Work::with_chain();
    work.fails(
        "convert raw:ram -o x --to elf",
        2,
        &["--guest", "--region-at"],
    );
    work.fails("convert d1.mem -o x --to elf", 2, &["d1.mem"]);
    work.fails(
        "convert raw:ram -o x --to elf --guest qemu-pc --layout raw",
        2,
        &["cannot be used"],
    );
    work.fails(
        "convert full.mem -o x --to cloud-hypervisor",
        2,
        &["--snapshot"],
    );
    work.fails(
        "convert full.mem -o full.mem --to elf --force",
        2,
        &["one of the inputs"],
    );
    work.rot("full.mem", 71 * 4096);
    work.fails("convert full.mem -o x --to elf", 1, &["damaged"]);
}

#[test]
fn the_bytes_of_a_guest_decide_no_format() {
    let work = Work::with_ram();
    work.good("convert raw:ram -o core --to elf --guest qemu-pc");
    work.copy("core", "ram-like-a-core");
    let hint = [
        "is no image, and begins like a file of the format elf",
        "elf:FILE",
    ];
    work.fails("convert ram-like-a-core -o x", 2, &hint);
    work.fails("convert ram -o x", 1, &["raw:"]);
    work.fails(
        "convert elf:ram -o x",
        1,
        &["at byte 0x0", "magic number of ELF"],
    );
    work.fails("convert elf:missing -o x", 3, &["missing"]);
    let core = work.read("core");
    fs::write(work.path("cut"), &core[..core.len() / 2]).unwrap();
    work.fails(
        "convert elf:cut -o x",
        1,
        &["cut short or damaged, so copy it again"],
    );
    work.good("convert elf:core -o core.mem --force");
    work.fails(
        "convert elf:core -o core --force",
        2,
        &["one of the inputs"],
    );
}

/// Writes a snapshot directory whose high RAM is first in its memory.
fn snapshot(work: &Work, name: &str, high: u64, low: u64) {
    fs::create_dir(work.path(name)).unwrap();
    let manager = format!(
        r#"{{"memory_ranges":{{"data":[{{"gpa":4294967296,"length":{high}}},{{"gpa":0,"length":{low}}}]}}}}"#
    );
    let manager = serde_json::to_string(&manager).unwrap();
    let state = format!(
        r#"{{"snapshots":{{"memory-manager":{{"snapshot_data":{{"state":{manager}}}}}}}}}"#
    );
    fs::write(work.path(name).join("state.json"), state).unwrap();
    fs::write(work.path(name).join("config.json"), r#"{"cpus":1}"#).unwrap();
    let memory = File::create(work.path(name).join("memory-ranges")).unwrap();
    memory.write_all_at(&noise(9, high + low), 0).unwrap();
}

#[test]
fn snapshots_of_cloud_hypervisor_are_read_and_written() {
    let work = Work::empty();
    snapshot(&work, "snapshot", 6 << 20, 2 << 20);
    work.good("convert snapshot -o full.mem");
    assert_eq!(
        regions(&work, "full.mem"),
        [(0, 2 << 20), (4 << 30, 6 << 20)]
    );
    let memory = fs::read(work.path("snapshot/memory-ranges")).unwrap();
    work.good("restore full.mem -o ram");
    assert!(work.read("ram") == [&memory[6 << 20..], &memory[..6 << 20]].concat());
    work.change(100, 3);
    work.good("diff full.mem --ram ram -o d1.mem");
    work.good("merge full.mem d1.mem -o new.mem");
    work.good("convert new.mem -o new --to cloud-hypervisor --snapshot snapshot");
    for name in ["state.json", "config.json"] {
        let read = |dir: &str| fs::read(work.path(dir).join(name)).unwrap();
        assert_eq!(read("new"), read("snapshot"));
    }
    let written = work.path("new/memory-ranges");
    assert_eq!(
        fs::metadata(&written).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let ram = work.read("ram");
    assert!(fs::read(written).unwrap() == [&ram[2 << 20..], &ram[..2 << 20]].concat());
    work.good("convert cloud-hypervisor:new -o again.mem");
    work.good("diff again.mem new.mem");
    // Nothing is replaced, and a failure leaves nothing.
    let names = work.files();
    let refused = |arguments: &str, code, words: &[&str]| {
        work.run(arguments).fails(code, words);
        assert_eq!(work.files(), names, "{arguments}");
    };
    let to = "--to cloud-hypervisor --snapshot";
    refused(
        &format!("convert new.mem -o new {to} snapshot"),
        2,
        &["exists"],
    );
    let force = |name| format!("convert new.mem -o {name} {to} snapshot --force");
    refused(&force("new"), 2, &["is a directory"]);
    refused(&force("d1.mem"), 2, &["replaces nothing"]);
    fs::remove_file(work.path("snapshot/config.json")).unwrap();
    refused(
        &format!("convert new.mem -o x {to} snapshot"),
        3,
        &["config.json"],
    );
    refused(
        &format!("convert new.mem -o x {to} missing"),
        3,
        &["state.json"],
    );
    refused("convert cloud-hypervisor:new.mem -o x", 2, &["state.json"]);
}

/// A second signal, or a kill, leaves the directory that was being written.
#[cfg(target_os = "linux")]
#[test]
fn a_sweep_removes_the_directory_of_a_killed_conversion() {
    use nix::sys::signal::Signal;
    use support::held::Held;
    needs!(Strace);
    let work = Work::empty();
    snapshot(&work, "snapshot", 6 << 20, 2 << 20);
    work.good("convert snapshot -o full.mem");
    let line = "convert full.mem -o new --to cloud-hypervisor --snapshot snapshot";
    let held = Held::before(&work.command(line), &("fsync".to_owned(), 2)).expect("held");
    let staged = || {
        work.files()
            .into_iter()
            .find(|name| name.starts_with(".ramsnap-"))
    };
    let name = staged().expect("staged");
    let found = work.good("sweep . --json").json();
    assert_eq!(found["in_use"], serde_json::json!([format!("./{name}")]));
    assert_eq!(staged().as_ref(), Some(&name));
    held.send(Signal::SIGKILL);
    held.release();
    assert_eq!(staged().as_ref(), Some(&name));
    let listed = work.good("sweep . --dry-run").out;
    assert!(
        listed.contains(&format!("{name}: would be removed")),
        "{listed}"
    );
    assert_eq!(staged().as_ref(), Some(&name));
    // Files that no conversion has written are kept.
    let notes = work.path(&name).join("notes");
    fs::write(&notes, "mine").unwrap();
    let kept = work.good("sweep .").out;
    assert!(kept.contains(&format!("{name}: kept: ")), "{kept}");
    fs::remove_file(&notes).unwrap();
    let removed = work.good("sweep .").out;
    assert!(removed.contains(&format!("{name}: removed")), "{removed}");
    assert_eq!(work.files(), ["full.mem", "snapshot"]);
    work.good(line);
}

#[test]
fn a_snapshot_of_another_guest_is_no_template() {
    let work = Work::with_ram();
    snapshot(&work, "snapshot", 5 << 20, 2 << 20);
    work.good("dump ram -o full.mem --guest qemu-pc");
    let line = "convert full.mem -o x --to cloud-hypervisor --snapshot snapshot";
    work.run(line)
        .fails(2, &["use the snapshot directory of the same guest"]);
    assert!(!work.files().contains(&"x".to_owned()));
}

/// A stream of QEMU with one RAM block of four pages, of which two are stored.
fn qemu(work: &Work, block: &str, machine: &str) -> Vec<u8> {
    let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0".to_vec();
    bytes.push(machine.len() as u8);
    bytes.extend(machine.as_bytes());
    bytes.extend(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram");
    bytes.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    bytes.extend((4 * PAGE + 4).to_be_bytes());
    bytes.push(block.len() as u8);
    bytes.extend(block.as_bytes());
    bytes.extend((4 * PAGE).to_be_bytes());
    bytes.extend([0, 0, 0, 1]);
    let bitmap = bytes.len() as u64 + 24;
    for number in [PAGE, bitmap, 4096] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend([0b1010, 0, 0, 0, 0, 0, 0, 0]);
    bytes.resize(4096, 0);
    let mut ram = noise(5, 4 * PAGE);
    bytes.extend(&ram);
    fs::write(work.path("stream"), bytes).unwrap();
    for page in [0, 2] {
        ram[(page * PAGE) as usize..][..PAGE as usize].fill(0);
    }
    ram
}

#[test]
fn files_of_qemu_name_their_machine_or_are_given_one() {
    let work = Work::empty();
    let ram = qemu(&work, "pc.ram", "pc-q35-9.2");
    work.good("convert qemu:stream -o full.mem");
    assert_eq!(regions(&work, "full.mem"), [(0, 4 * PAGE)]);
    work.good("restore full.mem -o ram");
    assert!(work.read("ram") == ram);
    let ram = qemu(&work, "mem0", "virt");
    work.fails("convert qemu:stream -o x", 1, &["RAM blocks", "mem0"]);
    work.fails(
        "convert qemu:stream -o x --ram-block mem0",
        1,
        &["name a machine or the regions"],
    );
    work.good("convert qemu:stream -o a.mem --ram-block mem0 --guest qemu-virt");
    assert_eq!(regions(&work, "a.mem"), [(1 << 30, 4 * PAGE)]);
    let given = "--region-at 0:8KiB --region-at 1048576:8KiB";
    work.good(&format!(
        "convert qemu:stream -o b.mem --ram-block mem0 {given}"
    ));
    assert_eq!(
        regions(&work, "b.mem"),
        [(0, 2 * PAGE), (1 << 20, 2 * PAGE)]
    );
    work.good("restore b.mem -o b");
    assert!(work.read("b") == ram);
}

#[test]
fn the_state_file_of_vmware_leads_to_its_memory() {
    let work = Work::with_ram();
    work.copy("ram", "guest.vmem");
    let mut state = b"\xd2\xbe\xd2\xbe\x08\0\0\0\x01\0\0\0memory".to_vec();
    state.resize(76, 0);
    state.extend([92, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    state.extend(b"\x04\x0cregionsCount\0\0\0\0\0\0");
    fs::write(work.path("guest.vmsn"), state).unwrap();
    for name in ["guest.vmsn", "vmware:guest.vmem"] {
        work.good(&format!("convert {name} -o full.mem --force"));
        work.good("diff full.mem --ram ram");
    }
    work.fails(
        "convert guest.vmsn -o guest.vmem --force",
        2,
        &["one of the inputs"],
    );
}
