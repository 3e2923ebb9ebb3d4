//! Chains with more images than the process may have descriptors.
#![cfg(target_os = "linux")]

mod support;

use lazy_restore::{LazyError, LazyRam};
use memory_image::ReadImageError;
use nix::sys::resource::{Resource, setrlimit};
use support::lazy_images::PAGE;
use support::open_chain;
use test_images::{Images, whole};
use test_machine::{Need, is_alone};

const LAYERS: u64 = 40;

/// Returns a full image and diffs of one page each. A quarter of the process's descriptors is for
/// images, which are fewer than these.
fn images() -> Images {
    setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
    let full = Images::new(256 * PAGE, PAGE).with([0..256]);
    (1..LAYERS).fold(full, |images, layer| {
        let page = layer * 7 % 256;
        images.with([page..page + 1])
    })
}

#[test]
fn more_images_than_descriptors_are_filled() {
    let test = "more_images_than_descriptors_are_filled";
    if !Need::Userfaultfd.met(test) || !is_alone(test) {
        return;
    }
    let images = images();
    for prefetch in [false, true] {
        let options = LazyRam::options().prefetch(prefetch).fault_around(1);
        let ram = options.start(open_chain(&images)).unwrap();
        assert!(whole(&ram, images.ram.len()) == images.ram);
        ram.wait().unwrap();
    }
}

#[test]
fn replaced_closed_image_is_an_error() {
    let test = "replaced_closed_image_is_an_error";
    if !Need::Userfaultfd.met(test) || !is_alone(test) {
        return;
    }
    let images = images();
    let chain = open_chain(&images);
    let ram = LazyRam::options().prefetch(false).start(chain).unwrap();
    std::fs::remove_file(images.path(3)).unwrap();
    let error = ram.wait().unwrap_err();
    assert!(
        matches!(&*error, LazyError::Read(ReadImageError::Replaced { path }) if path == images.path(3)),
        "{error:?}"
    );
}
