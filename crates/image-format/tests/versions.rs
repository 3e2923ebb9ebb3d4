//! Files that each version of the format wrote.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use image_format::{Checksums, ExtentMap, Footer, ImageId, ImageKind, Layout, Storage, Version};

/// Returns the path of a golden file: a diff in the layout `what`, or a sealed `full` image.
fn golden(what: &str, version: u32) -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    dir.join(format!("{what}-v{version}.mem"))
}

fn with_footer() -> impl Iterator<Item = Layout> {
    Layout::ALL.into_iter().filter(|layout| layout.has_footer())
}

/// Calls `check` with the name and the version of each golden file.
fn each_file(check: impl Fn(&str, u32)) {
    for what in ["sealed", "packed", "full"] {
        check(what, 1);
    }
    let current = with_footer().map(Layout::name).chain(["full"]);
    current.for_each(|what| check(what, 2));
}

/// Files that each version wrote when it was current.
#[test]
fn files_of_all_versions_are_readable() {
    each_file(is_readable);
}

fn is_readable(what: &str, number: u32) {
    let version = if number == 1 {
        Version::V1
    } else {
        Version::V2
    };
    let file = File::open(golden(what, number)).unwrap();
    let footer = Footer::read(&file).unwrap();
    assert_eq!(footer.version, version);
    assert_eq!(Footer::read_id(&file).unwrap(), footer.id);
    assert_eq!(footer.ram_size, 64 * 1024);
    assert_eq!(
        footer.metadata,
        format!("made by version {number}").into_bytes()
    );
    for chunk in footer.chunks() {
        let mut sums = Checksums::new(footer.ram_size);
        for (range, at) in chunk.pieces() {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.read_exact_at(&mut bytes, at).unwrap();
            // Every byte of a page is its number, from 1 on.
            assert!(
                bytes
                    .chunks(4096)
                    .zip(range.start / 4096 + 1..)
                    .all(|(page, number)| page.iter().all(|byte| u64::from(*byte) == number))
            );
            sums.update(range.start, &bytes);
        }
        assert_eq!(sums.finish(), [chunk.checksum]);
    }
    let (id, parent) = (ImageId::from_bytes([1; 16]), ImageId::from_bytes([2; 16]));
    if what == "full" {
        assert_eq!((footer.id, footer.kind), (parent, ImageKind::Full));
    } else {
        assert_eq!((footer.id, footer.parent()), (id, Some(parent)));
    }
}

#[test]
fn writing_reproduces_the_files_of_all_versions() {
    each_file(is_reproduced);
}

fn is_reproduced(what: &str, version: u32) {
    let path = golden(what, version);
    let bytes = std::fs::read(&path).unwrap();
    let footer = Footer::read(&File::open(&path).unwrap()).unwrap();
    let copy = tempfile::NamedTempFile::new().unwrap();
    let (start, end) = (footer.data_start() as usize, footer.data_end() as usize);
    copy.as_file()
        .write_all_at(&bytes[start..end], start as u64)
        .unwrap();
    footer.write(copy.as_file()).unwrap();
    assert!(std::fs::read(copy.path()).unwrap() == bytes);
}

/// Writes the image of the golden sealed file in another layout.
fn write_in(layout: Layout, path: &Path) {
    let sealed = File::open(golden("sealed", 2)).unwrap();
    let file = File::create(path).unwrap();
    let mut footer = Footer::read(&sealed).unwrap();
    let is_zeros = |run: &&image_format::Run| run.stored == Storage::Zeros;
    let zeros: Vec<_> = footer
        .runs
        .iter()
        .filter(is_zeros)
        .map(|run| run.range())
        .collect();
    let present = footer.runs.iter().filter(|run| !is_zeros(run));
    let mut map = ExtentMap::new(layout, layout.data_start(footer.page_size));
    let plan = map.plan(0, present.map(|run| run.range()));
    for extent in plan.extents() {
        let mut bytes = vec![0; extent.len as usize];
        sealed.read_exact_at(&mut bytes, extent.guest).unwrap();
        file.write_all_at(&bytes, extent.file).unwrap();
    }
    map.merge(plan);
    footer.layout = layout;
    footer.runs = map.runs(&zeros, footer.ram_size).collect();
    footer.write(&file).unwrap();
}

#[test]
fn each_layout_has_a_golden_file() {
    for layout in with_footer() {
        let path = golden(layout.name(), 2);
        let made = Path::new(env!("CARGO_TARGET_TMPDIR")).join(path.file_name().unwrap());
        write_in(layout, &made);
        assert!(
            path.exists(),
            "copy {} to {}",
            made.display(),
            path.display()
        );
    }
}
