//! The mounts of macOS, with shell scripts in place of its programs.
//!
//! The scripts, in the directory `programs`, answer as the manual pages of macOS state. They log
//! each call.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use super::super::Images;
use super::disk_image::DiskImage;
use super::nfs_export::Export;
use super::system::System;

/// A stand-in for a Mac.
struct Mac {
    dir: TempDir,
}

impl Mac {
    fn new() -> Self {
        let mac = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/mounts/macos/programs");
        symlink(programs, mac.path("bin")).unwrap();
        mac
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn system(&self) -> System {
        System {
            path: format!("{}:/usr/bin:/bin", self.path("bin").display()).into(),
            exports: self.path("exports"),
            pause: Duration::ZERO,
        }
    }

    fn images(&self) -> Images {
        Images {
            dir: self.path("images"),
            keep: false,
        }
    }

    fn attach(&self) -> anyhow::Result<DiskImage> {
        DiskImage::attach(&self.system(), &self.images(), "APFS", "64m")
    }

    /// Returns the logged calls that begin with `start`.
    fn calls(&self, start: &str) -> Vec<String> {
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        let calls = log.lines().filter(|line| line.starts_with(start));
        calls.map(str::to_owned).collect()
    }

    fn exports(&self) -> Option<String> {
        fs::read_to_string(self.path("exports")).ok()
    }
}

#[test]
fn an_image_is_attached_by_the_name_that_it_got() {
    let mac = Mac::new();
    let image = mac.attach().unwrap();
    let [attach] = mac.calls("hdiutil attach").try_into().unwrap();
    assert!(attach.contains("-owners on"), "{attach}");
    assert!(attach.ends_with("disk.sparseimage"), "{attach}");
    assert!(image.mount_point().is_dir());
    drop(image);
    assert_eq!(mac.calls("hdiutil detach"), ["hdiutil detach /dev/disk4"]);
    assert_eq!(fs::read_dir(mac.path("images")).unwrap().count(), 0);
}

#[test]
fn a_busy_image_is_detached_again_and_then_by_force() {
    let mac = Mac::new();
    let image = mac.attach().unwrap();
    fs::write(mac.path("busy"), "\n\n").unwrap();
    drop(image);
    assert_eq!(mac.calls("hdiutil detach /dev/disk4").len(), 3);
    assert_eq!(mac.calls("hdiutil detach -force").len(), 0);

    let image = mac.attach().unwrap();
    fs::write(mac.path("busy"), "\n".repeat(100)).unwrap();
    drop(image);
    assert_eq!(mac.calls("hdiutil detach -force").len(), 1);
}

#[test]
fn an_error_shows_what_hdiutil_printed() {
    let mac = Mac::new();
    fs::write(mac.path("refuse"), "").unwrap();
    let error = mac.attach().err().unwrap().to_string();
    assert!(error.contains("No space left on device"), "{error}");
    assert!(error.contains("hdiutil create -type SPARSE"), "{error}");
}

#[test]
fn an_export_leaves_the_list_and_the_service_as_they_were() {
    for (before, enabled) in [(None, false), (Some("/Users -ro"), true)] {
        let mac = Mac::new();
        if let Some(before) = before {
            fs::write(mac.path("exports"), before).unwrap();
        }
        if enabled {
            fs::write(mac.path("enabled"), "").unwrap();
        }
        let export = Export::new(mac.system()).unwrap();
        let text = mac.exports().unwrap();
        assert!(text.contains(" -maproot=root -network 127.0.0.0"), "{text}");
        let [mount] = mac.calls("mount").try_into().unwrap();
        assert!(mount.contains(" 127.0.0.1:/"), "{mount}");
        let point = export.mount_point().display().to_string();
        drop(export);
        assert_eq!(mac.calls("umount"), [format!("umount -f {point}")]);
        assert_eq!(mac.exports().as_deref().map(str::trim_end), before);
        assert_eq!(mac.path("enabled").exists(), enabled);
    }
}

#[test]
fn the_next_run_removes_what_a_killed_one_left() {
    let mac = Mac::new();
    let killed = i32::MAX; // above every limit of process numbers
    let left = format!(
        "/Users -ro\n# fs-matrix begin {killed} off /private/left behind\n/private/x\n# fs-matrix end\n"
    );
    fs::write(mac.path("exports"), left).unwrap();
    fs::write(mac.path("enabled"), "").unwrap();
    let export = Export::new(mac.system()).unwrap();
    let text = mac.exports().unwrap();
    assert!(!text.contains("/private/x"), "{text}");
    assert_eq!(mac.calls("umount"), ["umount -f /private/left behind"]);
    drop(export);
    assert_eq!(mac.exports().unwrap(), "/Users -ro\n");
    assert!(!mac.path("enabled").exists());
}

#[test]
fn the_lines_of_a_run_that_lives_stay() {
    let mac = Mac::new();
    let (one, other) = (Export::new(mac.system()), Export::new(mac.system()));
    drop(one.unwrap());
    let text = mac.exports().unwrap();
    assert_eq!(text.matches("# fs-matrix begin").count(), 1, "{text}");
    assert!(mac.path("enabled").exists());
    assert!(text.contains(&other.unwrap().mount_point().display().to_string()));
}

#[test]
fn a_failed_mount_leaves_no_export() {
    let mac = Mac::new();
    fs::write(mac.path("refuse"), "").unwrap();
    let error = Export::new(mac.system()).err().unwrap().to_string();
    assert!(error.contains("Operation not permitted"), "{error}");
    assert_eq!(mac.exports(), None);
    assert!(!mac.path("enabled").exists());
}

#[test]
fn an_unreadable_list_names_full_disk_access() {
    let mac = Mac::new();
    fs::create_dir(mac.path("exports")).unwrap();
    let error = Export::new(mac.system()).err().unwrap().to_string();
    assert!(error.contains("Full Disk Access"), "{error}");
}
