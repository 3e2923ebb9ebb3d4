//! The detected format of a file: bytes of the guest never decide it, and raw must be requested.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;

use rstest::rstest;
use support::{PAGE, RAM, Work};

#[rstest]
fn a_packed_image_cut_at_a_page_is_refused_by_every_verb(
    #[values(
        "restore cut.mem -o out",
        "convert cut.mem -o out --layout sealed",
        "merge cut.mem d1.mem -o out",
        "diff cut.mem --ram ram -o out",
        "diff full.mem cut.mem -o out",
        "diff full.mem --to cut.mem -o out",
        "info cut.mem",
        "map cut.mem"
    )]
    command: &str,
) {
    let work = Work::with_chain();
    let bytes = work.read("full.mem");
    fs::write(work.path("cut.mem"), &bytes[..bytes.len() / 4096 * 4096]).unwrap();
    let of = format!(" of {}", bytes.len());
    work.fails(
        command,
        1,
        &["cut.mem", "packed image that was cut off", &of],
    );
    let found = work.run("verify cut.mem");
    assert_eq!(found.code, Some(1));
    assert!(found.out.contains("cut.mem: UNUSABLE"), "{found:?}");
}

#[rstest]
fn a_sealed_image_without_its_footer_is_refused_by_every_verb(
    #[values(
        "restore cut.mem -o out",
        "convert cut.mem -o out --layout packed",
        "diff full.mem cut.mem -o out",
        "info cut.mem"
    )]
    command: &str,
) {
    let work = Work::with_chain();
    work.good("convert full.mem -o cut.mem --layout sealed");
    let file = fs::File::options().write(true).open(work.path("cut.mem"));
    file.unwrap().set_len(RAM).unwrap();
    work.fails(command, 1, &["cut.mem", "its end was cut off", "raw:FILE"]);
}

/// Returns bytes that a guest may write at the start or the end of its RAM.
fn planted(work: &Work, what: &str) -> (usize, Vec<u8>) {
    let end = RAM as usize;
    match what {
        "eight bytes" => (end - 8, b"memsnap\xff".to_vec()),
        "a header" => (0, work.read("d1.mem")[..4096].to_vec()),
        // A complete footer with one flipped bit in its middle.
        "a broken footer" => {
            let image = work.read("sealed.mem");
            let mut footer = image[end..].to_vec();
            footer[70] ^= 1;
            (end - footer.len(), footer)
        }
        "a footer" => {
            let footer = work.read("sealed.mem")[end..].to_vec();
            (end - footer.len(), footer)
        }
        "an image" => {
            let image = work.read("d1.mem");
            (end - image.len(), image)
        }
        other => panic!("{other}"),
    }
}

#[rstest]
fn bytes_in_ram_never_change_the_detected_format(
    #[values("eight bytes", "a header", "a broken footer", "a footer", "an image")] what: &str,
    #[values("raw", "sealed", "packed")] layout: &str,
) {
    let work = Work::with_chain();
    work.good("convert full.mem -o sealed.mem --layout sealed");
    let (at, bytes) = planted(&work, what);
    let ram = fs::File::options().write(true).open(work.path("ram"));
    ram.unwrap().write_all_at(&bytes, at as u64).unwrap();

    work.good(&format!("dump ram -o new.mem --layout {layout}"));
    let new = if layout == "raw" {
        "raw:new.mem"
    } else {
        "new.mem"
    };
    work.good(&format!("restore {new} -o out"));
    work.assert_same("out", "ram");
    let info = work.good(&format!("info {new} --json")).json();
    assert_eq!(info[0]["layout"], layout);
    assert_eq!(info[0]["ram_bytes"], RAM);
    work.good(&format!("convert {new} -o other.mem --layout packed"));
    work.good("diff other.mem --ram ram");
    // The RAM as the new state of a diff.
    work.good("diff full.mem d1.mem --ram ram -o d3.mem");
    work.good("restore full.mem d1.mem d3.mem -o again");
    work.assert_same("again", "ram");
    // Raw RAM is an image only on request.
    work.run("restore ram -o no").fails(1, &["ram", "raw"]);
}

#[test]
fn formats_may_differ_within_a_chain() {
    let work = Work::with_ram();
    work.good("dump ram -o full.raw --layout raw");
    work.change(10, 5);
    work.good("diff raw:full.raw --ram ram -o d1.mem");
    work.good("restore raw:full.raw d1.mem -o out");
    work.assert_same("out", "ram");
    // The option applies to all files without a format of their own.
    work.good("merge --format raw full.raw packed:d1.mem -o new.raw --layout raw");
    work.assert_same("new.raw", "ram");
    fs::rename(work.path("full.raw"), work.path("raw:x")).unwrap();
    work.good("info --format raw ./raw:x");
    work.good("restore raw:raw:x d1.mem -o again");
    work.assert_same("again", "ram");
}

#[test]
fn a_sealed_diff_keeps_its_parent() {
    let work = Work::with_chain();
    work.good("dump first -o other.mem");
    for layout in ["sealed", "packed"] {
        work.good(&format!(
            "convert d2.mem -o d.mem --layout {layout} --force"
        ));
        let relink = "convert d.mem --raw-diff --parent other.mem -o out --layout packed";
        work.fails(relink, 2, &["d.mem", "leave out --raw-diff"]);
    }
    // The converted diff has the same parent.
    work.good("convert d2.mem -o again.mem --layout sealed");
    let info = work.good("info d2.mem again.mem --json").json();
    assert_eq!(info[0]["parent"], info[1]["parent"]);
}

/// A file of some hundred bytes that claims 512 TiB of RAM.
#[test]
fn memory_is_not_taken_for_ram_that_a_small_file_claims() {
    use image_format::{Footer, ImageId, ImageKind, Layout, Run, Version};

    let work = Work::empty();
    let ram_size = 1_u64 << 49;
    let footer = Footer {
        version: Version::V1,
        id: ImageId::from_bytes([1; 16]),
        kind: ImageKind::Full,
        layout: Layout::Packed,
        ram_size,
        page_size: PAGE,
        regions: vec![0..ram_size],
        runs: vec![Run::zeros(0..ram_size)],
        checksums: Vec::new(),
        metadata: Vec::new(),
    };
    let file = fs::File::create(work.path("huge.mem")).unwrap();
    assert!(footer.write(&file).unwrap() < 300);
    work.good("info huge.mem");
    work.fails("diff huge.mem huge.mem", 3, &["too many"]);
}
