//! Images that are written to in place before or while RAM is filled from them.
#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use lazy_restore::{LazyError, LazyRam, LazyRamOptions};
use memory_image::ReadImageError;
use page_reader::PageReader;
use rstest::rstest;
use support::lazy_images::on_demand;
use support::open_chain;
use test_images::Images;
use test_machine::needs;

const PAGE: u64 = 4096;

fn images() -> Images {
    Images::new(1 << 20, PAGE).with([0..100]).with([10..20])
}

fn write_to(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0x5a; PAGE as usize], 0).unwrap();
    // Simulates the next tick of the file system's clock.
    let later = SystemTime::now() + Duration::from_secs(1);
    file.set_modified(later).unwrap();
}

fn truncate_and_grow(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(0).unwrap();
    file.set_len(len).unwrap();
    let later = SystemTime::now() + Duration::from_secs(1);
    file.set_modified(later).unwrap();
}

#[track_caller]
fn assert_changed(error: &LazyError, expected: &Path) {
    assert!(
        matches!(error, LazyError::Read(ReadImageError::Changed { path }) if path == expected),
        "{error:?}"
    );
}

#[rstest]
fn an_image_changed_before_the_start_is_an_error(
    #[values(write_to, truncate_and_grow)] change: fn(&Path),
    #[values(0, 1)] changed: usize,
) {
    needs!(Userfaultfd);
    let images = images();
    let chain = open_chain(&images);
    change(images.path(changed));
    let error = LazyRam::options().start(chain).unwrap_err();
    assert_changed(&error, images.path(changed));
}

#[rstest]
#[case::on_demand(on_demand())]
#[case::recording(LazyRam::options().record(true))]
fn an_image_changed_while_ram_is_filled_is_an_error(
    #[case] options: LazyRamOptions,
    #[values(write_to, truncate_and_grow)] change: fn(&Path),
    #[values(0, 1)] changed: usize,
) {
    needs!(Userfaultfd);
    let images = images();
    let ram = options.start(open_chain(&images)).unwrap();
    ram.check_source().unwrap();
    change(images.path(changed));
    ram.check_source().unwrap_err();
    assert_changed(&ram.wait().unwrap_err(), images.path(changed));
    assert_changed(ram.error().unwrap(), images.path(changed));
    ram.check_source().unwrap_err();
}

#[test]
fn an_image_changed_after_ram_was_filled_is_no_error() {
    needs!(Userfaultfd);
    let images = images();
    let ram = LazyRam::options().start(open_chain(&images)).unwrap();
    ram.wait().unwrap();
    write_to(images.path(0));
    ram.check_source().unwrap();
    ram.wait().unwrap();
}
