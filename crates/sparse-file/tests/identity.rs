//! Compares the identity of files, including files on overlayfs.
#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rstest::rstest;
use sparse_file::FileIdentity;
use support::{Fs, Place};
use test_machine::{Overlay, TinyTmpfs};

/// The layers of an overlay and their mounts.
struct Layers {
    lower: PathBuf,
    upper: PathBuf,
    merged: Overlay,
    _other: Option<TinyTmpfs>,
    _place: Place,
}

impl Layers {
    /// Mounts an overlay whose lower layer contains a file "low". The lower layer is on another
    /// file system if `apart`.
    fn on(fs: Fs, apart: bool, test: &str) -> Option<Self> {
        let place = fs.mount(test)?;
        let other = apart.then(|| TinyTmpfs::new(8 << 20).expect("mounted"));
        let below = other.as_ref().map_or(place.path(), TinyTmpfs::path);
        let lower = below.join("lower");
        let [upper, work] = ["upper", "work"].map(|name| place.path().join(name));
        for dir in [&lower, &upper, &work] {
            fs::create_dir(dir).expect("made");
        }
        fs::write(lower.join("low"), b"bytes").expect("written");
        Some(Self {
            merged: Overlay::of(&lower, &upper, &work).expect("mounted"),
            lower,
            upper,
            _other: other,
            _place: place,
        })
    }
}

fn are_same(one: &Path, other: &Path) -> bool {
    let [one, other] = [one, other].map(|path| FileIdentity::at(path).expect("identified"));
    assert_eq!(one.may_be(&other), other.may_be(&one));
    one.may_be(&other)
}

fn numbers(path: &Path) -> (u64, u64) {
    let metadata = fs::metadata(path).expect("metadata");
    (metadata.dev(), metadata.ino())
}

#[rstest]
fn file_of_a_layer_is_the_same_as_on_the_overlay(
    #[values(Fs::Ext4, Fs::Xfs, Fs::Btrfs, Fs::Tmpfs)] fs: Fs,
    #[values(false, true)] apart: bool,
) {
    let Some(layers) = Layers::on(fs, apart, "file_of_a_layer_is_the_same_as_on_the_overlay")
    else {
        return;
    };
    let merged = |name| layers.merged.path().join(name);
    // Use another length: the file may be created in the same tick of the clock.
    fs::write(merged("new"), b"more bytes").expect("written");
    for (layer, name) in [(&layers.lower, "low"), (&layers.upper, "new")] {
        let stored = layer.join(name);
        // Without this, the test would prove nothing.
        assert_ne!(numbers(&stored), numbers(&merged(name)));
        assert!(are_same(&stored, &merged(name)), "{name}");
        let open = FileIdentity::of(File::open(merged(name)).expect("opened")).expect("identified");
        assert!(open.is_file());
        assert!(open.may_be(&FileIdentity::at(&stored).expect("identified")));
    }
    assert!(!are_same(&merged("low"), &merged("new")));
    assert!(!are_same(&layers.lower.join("low"), &merged("new")));

    // The first open for writing moves the file to the upper layer.
    let written = File::options().append(true).open(merged("low"));
    fs::File::set_len(&written.expect("opened"), 3).expect("cut");
    assert!(!are_same(&layers.lower.join("low"), &merged("low")));
    assert!(are_same(&layers.upper.join("low"), &merged("low")));
}

/// Returns whether overlayfs reports handles, and reports the test as not run if not.
fn has_handles(test: &str) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse().ok());
    let release: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if release < (6, 6) {
        test_machine::not_run(test, "overlayfs reports handles since Linux 6.6");
    }
    release >= (6, 6)
}

/// The clock of the file system may not tick between two of them.
#[rstest]
fn new_files_are_distinguished_by_their_handles(
    #[values(Fs::Ext4, Fs::Xfs, Fs::Btrfs, Fs::Tmpfs)] fs: Fs,
) {
    const TEST: &str = "new_files_are_distinguished_by_their_handles";
    let Some(layers) = has_handles(TEST)
        .then(|| Layers::on(fs, false, TEST))
        .flatten()
    else {
        return;
    };
    let merged = |name: &str| layers.merged.path().join(name);
    // Files with the same times, so that only their handles differ.
    let mut found_equal_times = false;
    for number in 0..200 {
        let [one, other] = ["one", "other"].map(|name| format!("{name}{number}"));
        File::create(merged(&one)).expect("made");
        File::create(merged(&other)).expect("made");
        let times = |path: &Path| {
            let found = fs::metadata(path).expect("metadata");
            (
                found.created().ok(),
                found.modified().ok(),
                found.ctime_nsec(),
            )
        };
        found_equal_times |= times(&merged(&one)) == times(&merged(&other));
        assert!(!are_same(&layers.upper.join(&one), &merged(&other)));
        assert!(are_same(&layers.upper.join(&one), &merged(&one)));
    }
    if !found_equal_times {
        test_machine::not_run(TEST, "the clock ticked between all files");
    }
}

#[test]
fn a_file_written_between_the_queries_is_recognized() {
    const TEST: &str = "a_file_written_between_the_queries_is_recognized";
    let Some(layers) = has_handles(TEST)
        .then(|| Layers::on(Fs::Ext4, false, TEST))
        .flatten()
    else {
        return;
    };
    let merged = layers.merged.path().join("new");
    fs::write(&merged, b"bytes").expect("written");
    let before = FileIdentity::at(&merged).expect("identified");
    fs::write(&merged, b"more bytes").expect("written");
    let stored = FileIdentity::at(&layers.upper.join("new")).expect("identified");
    assert!(before.may_be(&stored));
}

#[test]
fn files_of_one_mount_are_compared_by_their_numbers() {
    const TEST: &str = "files_of_one_mount_are_compared_by_their_numbers";
    let Some(layers) = Layers::on(Fs::Ext4, false, TEST) else {
        return;
    };
    // With times in steps of milliseconds, some of them agree in everything but their numbers.
    let paths: Vec<_> = (0..200)
        .map(|number| layers.merged.path().join(number.to_string()))
        .collect();
    for path in &paths {
        File::create(path).expect("made");
    }
    for two in paths.windows(2) {
        assert!(!are_same(&two[0], &two[1]));
    }
    fs::hard_link(&paths[0], layers.merged.path().join("link")).expect("linked");
    assert!(are_same(&paths[0], &layers.merged.path().join("link")));
}
