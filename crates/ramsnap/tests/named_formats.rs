//! Formats that are named and not read, and files that are named as RAM and look like others.

mod support;

use std::fs::File;

use rstest::rstest;
use support::Work;

#[test]
fn a_file_that_is_not_ram_is_warned_of_and_saved() {
    let work = Work::with_ram();
    let dumped = work.good("dump ram -o full.mem");
    assert!(!dumped.err.contains("looks like"), "{dumped:?}");
    work.good("convert full.mem -o core --to elf --guest qemu-pc --machine x86_64");
    work.good("convert full.mem -o full.zst");
    work.copy("full.mem", "copy.mem");
    for (file, words) in [
        (
            "core",
            [
                "\"core\" looks like an ELF core",
                "ramsnap convert elf:FILE",
            ],
        ),
        (
            "copy.mem",
            [
                "looks like a sealed or packed image",
                "ramsnap convert FILE",
            ],
        ),
        (
            "full.zst",
            ["looks like a compressed image", "ramsnap convert FILE.zst"],
        ),
    ] {
        // RAM is a multiple of 512 bytes, and no image is.
        let len = work.read(file).len() as u64;
        let padded = File::options().write(true).open(work.path(file));
        padded.unwrap().set_len(len.next_multiple_of(4096)).unwrap();
        let dumped = work.good(&format!("dump {file} -o out --force"));
        dumped.warns(&words);
        work.good(&format!("restore out -o back-{file}"));
        work.assert_same(&format!("back-{file}"), file);
    }
    let changed = work.run("diff full.mem --ram core");
    assert!(
        changed.err.contains("looks like an ELF core"),
        "{changed:?}"
    );
}

#[rstest]
#[case::lime("lime:full.mem", &["only written", "--to lime", "raw, sealed, packed, elf"])]
#[case::firecracker("firecracker:full.mem", &["raw:FILE", "--guest firecracker", "elf, qemu"])]
#[case::unknown("tar:full.mem", &["\"tar\" is not a format", "cloud-hypervisor", "./tar:FILE"])]
fn a_format_that_is_not_read_is_named(#[case] input: &str, #[case] says: &[&str]) {
    let work = Work::with_chain();
    work.fails(&format!("convert {input} -o out"), 2, says);
    work.fails(&format!("info {input}"), 2, says);
    // The name of a file may have a colon.
    work.copy("full.mem", input);
    work.good(&format!("convert {input} -o out"));
}

#[test]
fn ram_blocks_are_refused_where_they_have_no_effect() {
    let work = Work::with_chain();
    let says = ["--ram-block", "full.mem", "qemu:FILE"];
    work.fails("convert full.mem -o out --ram-block pc.ram", 2, &says);
    work.fails("convert elf:full.mem -o out --ram-block pc.ram", 2, &says);
}
