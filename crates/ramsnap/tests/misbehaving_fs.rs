//! The tool on a file system that reports written bytes as a hole.
#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use misbehaving_fs::{Behavior, Lseek, MisbehavingFs, Reads};
use rstest::rstest;
use support::{Ended, PAGE, RAM, RAMSNAP, Work, noise};
use test_machine::{Need, needs};

fn mount(test: &str) -> Option<MisbehavingFs> {
    Need::Fuse
        .met(test)
        .then(|| MisbehavingFs::mount(Behavior::default()).unwrap())
}

fn lie(fs: &MisbehavingFs, lseek: Lseek) {
    fs.set(Behavior {
        lseek,
        ..Behavior::default()
    });
}

/// Returns a working directory in which `fuse/` is on the file system.
fn work(fs: &MisbehavingFs) -> Work {
    let work = Work::with_ram();
    std::os::unix::fs::symlink(fs.path(), work.path("fuse")).unwrap();
    work
}

/// A page that a guest wrote through a shared mapping of its RAM file. It stays dirty until drop.
struct DirtyPage(std::ptr::NonNull<std::ffi::c_void>);

#[allow(unsafe_code)]
impl DirtyPage {
    fn write(file: &File, offset: u64, value: u8) -> Self {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap};

        let len = NonZeroUsize::new(RAM as usize).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, which overlaps no other memory of this process.
        let start = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, file, 0) }.unwrap();
        for at in offset..offset + PAGE {
            assert!(at < RAM);
            // SAFETY: the range is inside the mapping, which is writable.
            unsafe {
                start
                    .cast::<u8>()
                    .as_ptr()
                    .add(at as usize)
                    .write_volatile(value)
            };
        }
        Self(start)
    }
}

#[allow(unsafe_code)]
impl Drop for DirtyPage {
    fn drop(&mut self) {
        // SAFETY: `write` made the mapping, and its address never left this type.
        let _ = unsafe { nix::sys::mman::munmap(self.0, RAM as usize) };
    }
}

#[rstest]
fn full_saves_ram_that_a_guest_wrote_through_a_mapping(
    #[values("raw", "sealed", "packed")] layout: &str,
) {
    let Some(fs) = mount("full_saves_ram_that_a_guest_wrote_through_a_mapping") else {
        return;
    };
    let work = work(&fs);
    let ram = work.create("fuse/ram", RAM);
    let _dirty = DirtyPage::write(&ram, 5 * PAGE, 0x5a);
    work.good(&format!("dump fuse/ram -o full.mem --layout {layout}"));
    work.good(&format!("restore {layout}:full.mem -o restored"));
    let mut expected = vec![0; RAM as usize];
    expected[5 * PAGE as usize..6 * PAGE as usize].fill(0x5a);
    assert!(work.read("restored") == expected);
    // The page differs from that of the snapshot before.
    work.create("before", RAM);
    work.good("dump before -o before.mem");
    let found = work.run("diff before.mem --ram fuse/ram --json").json();
    assert_eq!(found["pages"], 1);
}

#[rstest]
fn every_verb_reads_raw_images_despite_false_holes(
    #[values(Lseek::Exact, Lseek::AllHole, Lseek::HoleIsEnxio, Lseek::DataIsEnxio)] answers: Lseek,
) {
    let Some(fs) = mount("every_verb_reads_raw_images_despite_false_holes") else {
        return;
    };
    let work = work(&fs);
    work.good("dump ram -o fuse/full.raw --layout raw");
    work.copy("ram", "old");
    work.change(100, 3);
    work.good("dump ram -o new.mem");
    lie(&fs, answers);

    work.good("restore raw:fuse/full.raw -o restored");
    work.assert_same("restored", "old");
    work.good("convert raw:fuse/full.raw -o packed.mem --layout packed");
    work.good("restore packed.mem -o from-packed");
    work.assert_same("from-packed", "old");
    work.good("merge raw:fuse/full.raw -o fuse/merged.raw");
    work.good("restore raw:fuse/merged.raw -o from-merged");
    work.assert_same("from-merged", "old");
    let found = work.run("diff raw:fuse/full.raw new.mem --json").json();
    assert_eq!(found["pages"], 3);
    work.good("diff raw:fuse/full.raw --ram ram -o d1.mem");
    let map = work.good("map raw:fuse/full.raw --json").json();
    assert!(
        map[0]["runs"]
            .as_array()
            .unwrap()
            .iter()
            .all(|run| run["state"] == "present"),
        "{map}"
    );
    let info = work.good("info raw:fuse/full.raw --json").json();
    assert_eq!(info[0]["holes"]["tell_clean_from_zero"], false, "{info}");
    assert_eq!(info[0]["holes"]["file_system"], "fuse", "{info}");
}

#[test]
fn restore_does_not_take_written_ram_for_empty() {
    let Some(fs) = mount("restore_does_not_take_written_ram_for_empty") else {
        return;
    };
    let work = work(&fs);
    work.good("dump ram -o full.mem");
    let target = work.create("fuse/target", RAM);
    target.write_all_at(&noise(9, PAGE), 77 * PAGE).unwrap();
    lie(&fs, Lseek::AllHole);
    work.run("restore full.mem -o fuse/target")
        .fails(2, &["not empty", "--force"]);
    work.good("restore full.mem -o fuse/target --force");
    work.assert_same("fuse/target", "ram");
    // Empty RAM is accepted, although it must be read to find that it is empty.
    work.create("fuse/empty", RAM);
    work.good("restore full.mem -o fuse/empty");
    work.assert_same("fuse/empty", "ram");
}

#[test]
fn a_raw_diff_is_not_written_where_it_cannot_be_read() {
    let Some(fs) = mount("a_raw_diff_is_not_written_where_it_cannot_be_read") else {
        return;
    };
    let work = work(&fs);
    work.good("dump ram -o full.mem");
    work.change(100, 3);
    let says = &["fuse", "could not be read back", "--layout packed"];
    work.run("diff full.mem --ram ram -o fuse/d1.raw --layout raw")
        .fails(3, says);
    work.good("diff full.mem --ram ram -o d1.raw --layout raw");
    work.run("merge raw:d1.raw -o fuse/merged.raw --raw-diffs")
        .fails(3, says);
    work.run("convert raw:d1.raw -o fuse/converted.raw --raw-diff --layout raw")
        .fails(3, says);
    assert_eq!(fs::read_dir(fs.below()).unwrap().count(), 0);
    // All pages differ, so the diff would have no holes on any file system.
    fs::write(work.path("ram"), noise(5, RAM)).unwrap();
    work.run("diff full.mem --ram ram -o all.raw --layout raw")
        .fails(3, &["every page", "--layout packed"]);
    assert!(!work.path("all.raw").exists());
    work.good("diff full.mem --ram ram -o all.mem --layout sealed");
}

#[test]
fn a_raw_diff_is_not_read_by_holes_that_are_not_reliable() {
    let Some(fs) = mount("a_raw_diff_is_not_read_by_holes_that_are_not_reliable") else {
        return;
    };
    let work = work(&fs);
    work.good("dump ram -o full.raw --layout raw");
    work.good("dump ram -o full.mem");
    work.change(100, 3);
    work.good("diff full.mem --ram ram -o d1.raw --layout raw");
    Command::new("cp")
        .arg("--sparse=always")
        .args([work.path("d1.raw"), work.path("fuse/d1.raw")])
        .status()
        .unwrap();
    let says = &["fuse", "not known to report holes", "--trust-holes"];
    for verb in [
        "restore raw:full.raw raw:fuse/d1.raw -o out",
        "merge raw:full.raw raw:fuse/d1.raw -o out",
        "convert raw:fuse/d1.raw -o out --raw-diff --layout packed",
    ] {
        work.run(verb).fails(1, says);
        assert!(!work.path("out").exists(), "{verb}");
    }
    // On request, the reported holes are used, with a warning.
    let ended = work.good("restore raw:full.raw raw:fuse/d1.raw -o out --trust-holes");
    assert!(ended.err.contains("warning"), "{ended:?}");
    work.assert_same("out", "ram");
    let ended = work.good(
        "convert raw:fuse/d1.raw -o d1.mem --raw-diff --trust-holes --layout packed --parent full.mem",
    );
    assert!(ended.err.contains("warning"), "{ended:?}");
    work.good("restore full.mem d1.mem -o from-converted");
    work.assert_same("from-converted", "ram");
}

/// APFS returns this for clones. The test uses a file system whose reports are trusted.
#[test]
fn enxio_from_seek_hole_loses_no_page_of_a_restore() {
    needs!(Strace);
    let work = Work::with_ram();
    work.good("dump ram -o full.raw --layout raw");
    let strace = |log: &Path, inject: Option<String>| {
        let _ = fs::remove_file(work.path("out"));
        let mut strace = Command::new("strace");
        strace
            .args(["-f", "-qq", "-e", "trace=lseek", "-o"])
            .arg(log)
            .args(inject.iter().flat_map(|inject| ["-e", inject]))
            .args([RAMSNAP, "restore", "raw:full.raw", "-o", "out"])
            .current_dir(work.path(""))
            .stdin(Stdio::null());
        Ended::of(&mut strace).good();
        work.assert_same("out", "ram");
    };
    let log = work.path("log");
    strace(&log, None);
    let log = fs::read_to_string(log).unwrap();
    let calls = log.lines().filter(|line| line.contains("lseek("));
    let numbered = (1..).zip(calls);
    let looks = numbered.filter(|(_, call)| call.contains("SEEK_HOLE"));
    let looks: Vec<usize> = looks.map(|(number, _)| number).take(3).collect();
    assert_eq!(looks.len(), 3, "{log}");
    for call in looks {
        let inject = format!("inject=lseek:error=ENXIO:when={call}");
        strace(Path::new("/dev/null"), Some(inject));
    }
}

#[test]
fn verify_goes_on_after_a_part_that_cannot_be_read() {
    let Some(fs) = mount("verify_goes_on_after_a_part_that_cannot_be_read") else {
        return;
    };
    let work = work(&fs);
    work.good("dump ram -o full.mem");
    // A damaged page in the last chunk, and an unreadable one in the first.
    let end = work.good("info full.mem --json").json();
    let present = end[0]["present"]["bytes"].as_u64().unwrap();
    work.rot("full.mem", (4096 + present - 1) as usize);
    work.copy("full.mem", "fuse/full.mem");
    fs.set(Behavior {
        reads: Reads::FailAt(4096 + 5 * PAGE),
        ..Behavior::default()
    });
    let found = work.run("verify fuse/full.mem --json");
    assert_eq!(found.code, Some(1), "{found:?}");
    let json = found.json();
    let file = &json["files"][0];
    assert_eq!(
        (&file["state"], &file["found"]),
        (&"damaged".into(), &2.into())
    );
    let [unread, damaged] = &file["damages"].as_array().unwrap()[..] else {
        panic!("{json}");
    };
    assert_eq!(
        (&unread["chunk"], &unread["guest_start"]),
        (&0.into(), &0.into())
    );
    let why = unread["unreadable"].as_str().unwrap();
    assert!(why.contains("Input/output error"), "{json}");
    assert!(
        unread["file_offset"].is_u64() && damaged["chunk"] == 7,
        "{json}"
    );
    assert!(damaged.get("unreadable").is_none(), "{json}");
    let text = work.run("verify fuse/full.mem").out;
    assert!(text.contains("DAMAGED in 2 places"), "{text}");
    assert!(
        text.contains("chunk 0: ") && text.contains("NOT READ: "),
        "{text}"
    );
}
