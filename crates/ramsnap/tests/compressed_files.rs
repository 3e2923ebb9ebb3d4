//! Images in compressed files.

mod support;

use std::fs;

use support::Work;

#[test]
fn a_file_is_compressed_and_read_by_its_name() {
    let work = Work::with_chain();
    let sent = work.good("convert full.mem -o full.mem.zst").out;
    assert!(sent.starts_with("full.mem.zst: packed image of"), "{sent}");
    assert_eq!(work.read("full.mem.zst")[..4], [0x28, 0xb5, 0x2f, 0xfd]);
    work.good("convert full.mem.zst -o packed.mem");
    work.assert_same("packed.mem", "full.mem");
    // From and to other layouts, and from one compressed file to another.
    work.good("convert raw:ram -o ram.zst");
    work.good("convert ram.zst -o again.zst");
    work.good("convert again.zst -o ram.raw --layout raw");
    work.assert_same("ram.raw", "ram");
    work.fails("convert full.mem -o ram.zst", 2, &["--force"]);
    work.fails(
        "convert ram.zst -o ram.zst --force",
        2,
        &["one of the inputs"],
    );
    work.fails("convert full.mem -o x.zst --layout raw", 2, &["packed"]);
    let verified = work.run("verify ram.zst");
    assert_eq!(verified.code, Some(1), "{verified:?}");
    assert!(
        verified.out.contains("ramsnap convert FILE.zst"),
        "{verified:?}"
    );
    for verb in [
        "info",
        "map",
        "metadata",
        "cat --at 0",
        "merge -o out",
        "compare full.mem",
    ] {
        let error = work.run(&format!("{verb} ram.zst"));
        let error = error.fails(1, &["ram.zst", "which only `ramsnap convert` reads"]);
        assert_eq!(error.err.lines().count(), 1, "{error:?}");
        assert!(!error.err.contains("neither sealed"), "{error:?}");
    }
    work.fails(
        "restore ram.zst -o out",
        1,
        &["ram.zst", "ramsnap convert FILE.zst"],
    );
    work.fails("convert none.zst -o out", 3, &["none.zst", "No such file"]);
    let half = work.read("ram.zst");
    fs::write(work.path("cut.zst"), &half[..half.len() / 2]).unwrap();
    work.fails("convert cut.zst -o out", 1, &["stream"]);
    work.rot("full.mem", 5000);
    work.fails("convert full.mem -o out.zst", 1, &["full.mem", "damaged"]);
}
