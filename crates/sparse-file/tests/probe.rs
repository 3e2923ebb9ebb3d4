//! Compares probe results with manual measurements on each file system that can be mounted here.
#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rstest::rstest;
use sparse_file::{
    AlignmentBasis, Capabilities, HoleSupport, ProbeError, Punch, SeekHole, WrittenZeros,
};
use support::{Fs, child_task, expect_success, strace_child};
use test_machine::{FileSystem, LoopMount, Need, ReadOnlyBind, needs};

const EXACT: SeekHole = SeekHole::Exact { granularity: 4096 };

/// HFS+ and exFAT have been documented as having holes. The measured behavior of the driver
/// counts.
#[rstest]
#[case::ext4(
    Fs::Ext4,
    "ext2/ext3/ext4",
    HoleSupport::Sparse,
    EXACT,
    Punch::Frees,
    AlignmentBasis::Reported
)]
#[case::xfs(
    Fs::Xfs,
    "xfs",
    HoleSupport::Sparse,
    EXACT,
    Punch::Frees,
    AlignmentBasis::Reported
)]
#[case::btrfs(
    Fs::Btrfs,
    "btrfs",
    HoleSupport::Sparse,
    EXACT,
    Punch::Frees,
    AlignmentBasis::Measured
)]
#[case::tmpfs(
    Fs::Tmpfs,
    "tmpfs",
    HoleSupport::Sparse,
    EXACT,
    Punch::Frees,
    AlignmentBasis::Measured
)]
#[case::exfat(
    Fs::Exfat,
    "fuse",
    HoleSupport::Dense,
    SeekHole::AllData,
    Punch::Unsupported,
    AlignmentBasis::Measured
)]
fn probe_matches_measurements(
    #[case] fs: Fs,
    #[case] name: &str,
    #[case] holes: HoleSupport,
    #[case] seek_hole: SeekHole,
    #[case] punch: Punch,
    #[case] basis: AlignmentBasis,
) {
    let Some(place) = fs.mount("probe_matches_measurements") else {
        return;
    };
    let here = Capabilities::probe(place.path()).expect("probed");
    assert_eq!(here.file_system, name);
    assert_eq!(here.holes, holes, "{here}");
    assert_eq!(here.seek_hole, seek_hole, "{here}");
    let zeros = match seek_hole {
        EXACT => WrittenZeros::Data,
        _ => WrittenZeros::Unknown,
    };
    assert_eq!(here.written_zeros, zeros, "{here}");
    assert_eq!(here.punch, punch, "{here}");
    assert_eq!(here.preferred_block_size, 4096, "{here}");
    assert_eq!(
        here.direct_io.expect("all of them take it").basis,
        basis,
        "{here}"
    );
    let left: Vec<_> = std::fs::read_dir(place.path())
        .expect("dir")
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .into_string()
                .expect("plain")
        })
        // ext4's own directory; and FUSE's name of a removed file until the driver receives its
        // last close.
        .filter(|name| name != "lost+found" && !name.starts_with(".fuse_hidden"))
        .collect();
    assert_eq!(left, [""; 0]);
}

#[rstest]
fn direct_io_works_at_the_probed_alignment(
    #[values(Fs::Ext4, Fs::Xfs, Fs::Btrfs, Fs::Tmpfs, Fs::Exfat)] fs: Fs,
) {
    let Some(place) = fs.mount("direct_io_works_at_the_probed_alignment") else {
        return;
    };
    let direct = Capabilities::probe(place.path())
        .expect("probed")
        .direct_io
        .expect("direct I/O");
    let (memory, offset) = (direct.memory_align, direct.offset_align);
    let file = direct_file(&place.path().join("file"));
    let mut buffer = vec![7; 128 << 10];
    let start = buffer.as_ptr().align_offset(64 << 10);
    let piece = start + memory..start + memory + offset;
    assert_eq!(
        file.write_at(&buffer[piece.clone()], offset as u64)
            .expect("written"),
        offset
    );
    buffer.fill(0);
    assert_eq!(
        file.read_at(&mut buffer[piece.clone()], offset as u64)
            .expect("read"),
        offset
    );
    assert!(buffer[piece] == vec![7; offset]);
    if direct.basis == AlignmentBasis::Reported {
        // Half of the alignment is refused, so it is not coarser than needed. (For a piece of many
        // pages: Linux 6.18 accepts one inside a page at any address.)
        let half = &buffer[start + memory / 2..start + memory / 2 + (32 << 10)];
        file.write_at(half, offset as u64)
            .expect_err("memory at half the alignment");
        let half = &buffer[start..start + offset / 2];
        file.write_at(half, offset as u64)
            .expect_err("half the length");
    }
}

#[rstest]
#[case::ext4(FileSystem::EXT4)]
#[case::xfs(FileSystem::XFS)]
fn disk_of_4_kib_sectors_requires_offsets_of_4_kib(#[case] fs: &'static FileSystem) {
    needs!(Mount(fs));
    let mount = LoopMount::with_sectors(fs, 4096).expect("mounted");
    let here = Capabilities::probe(mount.path()).expect("probed");
    let direct = here.direct_io.expect("direct I/O");
    assert_eq!((direct.memory_align, direct.offset_align), (512, 4096));
    assert_eq!(direct.basis, AlignmentBasis::Reported);
}

/// If a block is larger than the gaps of a diff, those gaps are stored as zeros.
#[test]
fn granularity_of_holes_is_at_least_a_block() {
    needs!(Mount(FileSystem::XFS_16K));
    let mount = LoopMount::new(FileSystem::XFS_16K).expect("mounted");
    let here = Capabilities::probe(mount.path()).expect("probed");
    assert_eq!(here.seek_hole, SeekHole::Exact { granularity: 16384 });
}

/// Data that is not synced may not be allocated yet.
#[test]
fn sample_that_cannot_be_synced_is_an_error() {
    const TEST: &str = "sample_that_cannot_be_synced_is_an_error";
    if let Some(dir) = child_task() {
        let error = Capabilities::probe(Path::new(&dir)).expect_err("not synced");
        return assert!(
            matches!(&error, ProbeError::Io { operation: "write", source, .. }
                if source.raw_os_error() == Some(libc::EIO)),
            "{error:?}"
        );
    }
    if Need::Strace.met(TEST) {
        let dir = tempfile::tempdir().expect("dir");
        let task = dir.path().to_str().expect("UTF-8");
        expect_success(strace_child("fsync", "error=EIO", None, TEST, task));
        assert_eq!(std::fs::read_dir(dir.path()).expect("dir").count(), 0);
    }
}

/// Kernels before 6.1 and some file systems do not report it. An injected error makes ext4 one of
/// them.
#[test]
fn alignment_that_the_kernel_does_not_report_is_measured() {
    const TEST: &str = "alignment_that_the_kernel_does_not_report_is_measured";
    if let Some(dir) = child_task() {
        let here = Capabilities::probe(Path::new(&dir)).expect("probed");
        let direct = here.direct_io.expect("direct I/O");
        assert_eq!(direct.basis, AlignmentBasis::Measured);
        return assert_eq!((direct.memory_align, direct.offset_align), (4096, 4096));
    }
    needs!(Strace);
    let Some(place) = Fs::Ext4.mount(TEST) else {
        return;
    };
    let dir = place.path().to_str().expect("UTF-8");
    expect_success(strace_child("statx", "error=ENOSYS", None, TEST, dir));
}

fn direct_file(path: &Path) -> File {
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_DIRECT);
    options.open(path).expect("opens with O_DIRECT")
}

#[test]
fn missing_directory_is_named() {
    let dir = tempfile::tempdir().expect("dir");
    let missing = dir.path().join("missing");
    let error = Capabilities::probe(&missing).expect_err("missing");
    assert!(matches!(&error, ProbeError::CreateFile { dir, .. } if *dir == missing));
    assert!(error.to_string().contains("missing"), "{error}");
}

#[test]
fn read_only_directory_is_an_error() {
    needs!(Root);
    let dir = tempfile::tempdir().expect("dir");
    let bind = ReadOnlyBind::of(dir.path()).expect("bound");
    let error = Capabilities::probe(bind.path()).expect_err("read-only");
    assert!(matches!(error, ProbeError::CreateFile { source, .. }
        if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem));
}

#[test]
fn empty_parent_of_a_bare_name_is_the_current_directory() {
    let parent = Path::new("memory.img").parent().expect("a parent");
    let bare = Capabilities::probe(parent).expect("probed");
    assert_eq!(bare, Capabilities::probe(Path::new(".")).expect("probed"));
}
