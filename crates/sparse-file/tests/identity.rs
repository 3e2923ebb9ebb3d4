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
