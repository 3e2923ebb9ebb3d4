//! Images of long chains that are replaced, removed or moved while they are closed.
#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use memory_image::{
    Chain, Image, MapError, MappedChain, MergeError, ReadImageError, RestoreError, VerifyError,
};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use support::many_images::{Form, Guest, PAGE, have_few_descriptors};
use test_images::whole;
use test_machine::is_alone;

fn touch_as(path: &Path, like: &fs::Metadata) {
    use std::os::unix::fs::MetadataExt;
    let time = TimeSpec::new(like.mtime(), like.mtime_nsec());
    let follow = UtimensatFlags::FollowSymlink;
    utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, follow).unwrap();
}

/// Overwrites the file with bytes of another image, and hides the change as well as a tool can.
fn write_over(path: &Path, bytes: &[u8]) {
    let before = fs::metadata(path).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    touch_as(path, &before);
    assert_eq!(fs::metadata(path).unwrap().len(), before.len());
}

fn assert_replaced(error: &ReadImageError, expected: &Path) {
    assert!(
        matches!(error, ReadImageError::Replaced { path } if path == expected),
        "{error:?}"
    );
}

#[test]
fn replaced_closed_image_is_an_error_and_never_other_bytes() {
    if !is_alone("replaced_closed_image_is_an_error_and_never_other_bytes") {
        return;
    }
    have_few_descriptors();
    let forms = [
        ("raw", Form::Raw),
        ("sealed", Form::Sealed),
        ("packed", Form::Packed),
    ];
    type Replace = fn(&Path, &Path);
    let ways: [(&str, Replace); 3] = [
        ("renamed over", |other, path| {
            let before = fs::metadata(path).unwrap();
            touch_as(other, &before);
            fs::rename(other, path).unwrap();
        }),
        ("removed", |_, path| fs::remove_file(path).unwrap()),
        ("written over", |other, path| {
            write_over(path, &fs::read(other).unwrap())
        }),
    ];
    for (name, form) in forms {
        for (way, replace) in ways {
            let guest = Guest::new(40, |_| form);
            let other = Guest::new(40, |_| form);
            let chain = guest.chain();
            const CLOSED: usize = 3;
            const STILL_OPEN: usize = 39;
            for layer in [CLOSED, STILL_OPEN] {
                // Has the same length as the replaced image.
                fs::copy(&other.paths[layer - 1], &other.paths[0]).unwrap();
                replace(&other.paths[0], &guest.paths[layer]);
            }
            let error = guest.read(&chain, CLOSED).unwrap_err();
            let error = error
                .get_ref()
                .and_then(|error| error.downcast_ref())
                .unwrap();
            assert_replaced(error, &guest.paths[CLOSED]);
            if way != "written over" {
                guest.read(&chain, STILL_OPEN).unwrap();
            }
            let mut restored = vec![0; guest.ram.len()];
            let Err(RestoreError::Read(error)) = chain.restore(restored.as_mut_slice()) else {
                panic!("{name} {way}: restored, or another error");
            };
            assert_replaced(&error, &guest.paths[CLOSED]);
            let Err(MapError::Read(error)) = MappedChain::open(&chain) else {
                panic!("{name} {way}: mapped, or another error");
            };
            assert_replaced(&error, &guest.paths[CLOSED]);
            let merged = guest.dir.path().join("merged");
            let error = chain.flatten(&merged).unwrap_err();
            assert!(
                matches!(
                    error,
                    MergeError::Write(_) | MergeError::Verify(VerifyError::Read(_))
                ),
                "{name} {way}: {error:?}"
            );
            assert!(!merged.exists());
        }
    }
}

#[test]
fn image_not_reachable_by_its_path_stays_open() {
    if !is_alone("image_not_reachable_by_its_path_stays_open") {
        return;
    }
    have_few_descriptors();
    let guest = Guest::new(40, |_| Form::Packed);
    let (removed, replaced, in_memory) = (0, 1, 2);
    let open = |path: &Path| Image::open(path).unwrap().id();
    let mut chain = Chain::open(&guest.paths[removed], PAGE).unwrap();
    fs::remove_file(&guest.paths[removed]).unwrap();
    chain.push(&guest.paths[replaced]).unwrap();
    fs::copy(
        &guest.paths[39],
        guest.paths[replaced].with_extension("new"),
    )
    .unwrap();
    let new = guest.paths[replaced].with_extension("new");
    fs::rename(new, &guest.paths[replaced]).unwrap();
    {
        let name = c"image";
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file = File::from(nix::sys::memfd::memfd_create(name, flags).unwrap());
        file.write_all_at(&fs::read(&guest.paths[in_memory]).unwrap(), 0)
            .unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        chain.push(path).unwrap();
    }
    for path in &guest.paths[3..] {
        chain.push(path).unwrap();
    }
    assert_ne!(
        open(&guest.paths[replaced]),
        chain.images().nth(1).unwrap().id()
    );
    assert!(whole(&chain, guest.ram.len()) == guest.ram);
}
