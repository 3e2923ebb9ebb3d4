//! Chains with more images than the process may have descriptors.
#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;

use memory_image::{Chain, Image, MappedChain, MappedImage, compare};
use memory_writer::{Layout, MemoryWriter};
use nix::sys::resource::{Resource, setrlimit};
use support::many_images::{Form, Guest, OPEN, PAGE, have_few_descriptors, open_descriptors};
use test_images::whole;
use test_machine::{is_alone, rounds};

#[test]
fn more_layers_than_descriptors_are_read_in_every_way() {
    if !is_alone("more_layers_than_descriptors_are_read_in_every_way") {
        return;
    }
    let inherited = open_descriptors();
    let mut guest = Guest::new(1, |_| Form::Packed);
    for _ in 1..150 {
        guest.save([Form::Sealed, Form::Packed][guest.paths.len() % 2]);
    }
    // A sealed diff cannot follow a raw image.
    for _ in 150..300 {
        guest.save(Form::Raw);
    }
    have_few_descriptors();
    let chain = guest.chain();
    let ram = &guest.ram;
    assert_eq!(chain.len(), 300);
    let open = open_descriptors();
    assert!((inherited + OPEN..inherited + OPEN + 10).contains(&open));
    assert!(Image::open(guest.dir.path().join("missing")).is_err());
    assert_eq!(open_descriptors(), open);
    assert!(whole(&chain, ram.len()) == *ram);

    // Another chain in the same process.
    let sealed = Chain::open_sealed(&guest.paths[..150]).unwrap();
    assert_eq!(sealed.len(), 150);
    let mut restored = vec![0; ram.len()];
    chain.restore_zeroed(restored.as_mut_slice()).unwrap();
    assert!(restored == *ram);
    for most in [1, 21, 16_384] {
        let options = MappedChain::options().max_mappings(most);
        assert!(whole(&options.map(&chain).unwrap(), ram.len()) == *ram);
    }
    let merged = guest.dir.path().join("merged");
    chain.flatten(&merged).unwrap();
    assert!(fs::read(&merged).unwrap() == *ram);
    assert!(whole(&MappedImage::open_raw(&merged).unwrap(), ram.len()) == *ram);
    let go_on = &mut |_| ControlFlow::Continue(());
    let size = ram.len() as u64;
    assert!(compare(ram, &chain, size, PAGE, go_on).unwrap().is_clean());
    for image in sealed.images() {
        let found = image.verify(&mut |_| ControlFlow::Continue(())).unwrap();
        assert!(found.is_ok());
    }
    drop((chain, sealed));
    assert!(
        open_descriptors() < inherited + 10,
        "descriptors are closed with their chains"
    );
}

/// Each thread closes files that another one reads.
#[test]
fn threads_that_share_few_descriptors_read_the_right_bytes() {
    if !is_alone("threads_that_share_few_descriptors_read_the_right_bytes") {
        return;
    }
    let inherited = open_descriptors();
    have_few_descriptors();
    let guest = Guest::new(60, |_| Form::Packed);
    let chains = [guest.chain(), guest.chain()];
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (guest, chain) = (&guest, &chains[thread % 2]);
            scope.spawn(move || {
                for read in 0..rounds(500, 5000) {
                    guest.read(chain, (read * (7 + thread)) % 60).unwrap();
                }
            });
        }
    });
    drop(chains);
    assert!(open_descriptors() < inherited + 10);
}

/// Other files use the descriptors that the images would use.
#[test]
fn images_are_closed_when_no_descriptor_is_left() {
    if !is_alone("images_are_closed_when_no_descriptor_is_left") {
        return;
    }
    let inherited = open_descriptors();
    let guest = Guest::new(OPEN, |_| Form::Packed);
    let first = Chain::open_sealed(&guest.paths).unwrap();
    have_few_descriptors();
    let others: Vec<_> = std::iter::repeat_with(|| File::open("/dev/null"))
        .map_while(Result::ok)
        .collect();
    assert!(inherited + others.len() > 30);
    let second = Chain::open_sealed(&guest.paths).unwrap();
    assert!(whole(&second, guest.ram.len()) == guest.ram);
    assert!(whole(&first, guest.ram.len()) == guest.ram);
}

#[test]
fn chain_of_ten_thousand_layers_is_opened_and_read() {
    if !is_alone("chain_of_ten_thousand_layers_is_opened_and_read") {
        return;
    }
    let inherited = open_descriptors();
    let mut guest = Guest::new(0, |_| Form::Packed);
    (0..10_000).for_each(|_| guest.save_by_hand());
    setrlimit(Resource::RLIMIT_NOFILE, 1024, 1024).unwrap();
    let chain = Chain::open_sealed(&guest.paths).unwrap();
    assert_eq!(chain.len(), 10_000);
    assert!(open_descriptors() < inherited + 1024 / 4 + 10);
    assert!(whole(&chain, guest.ram.len()) == guest.ram);
    let mapped = MappedChain::open(&chain).unwrap();
    assert!(whole(&mapped, guest.ram.len()) == guest.ram);
    let merged = guest.dir.path().join("merged");
    let options = MemoryWriter::options()
        .layout(Layout::Packed)
        .seal(chain.seal());
    chain.merge(options, &merged).unwrap();
    let merged = Chain::open_sealed(&[merged]).unwrap();
    assert_eq!(merged.id(), chain.id());
    assert!(whole(&merged, guest.ram.len()) == guest.ram);
}

#[test]
fn closed_sealed_image_may_be_linked_and_change_mode() {
    if !is_alone("closed_sealed_image_may_be_linked_and_change_mode") {
        return;
    }
    have_few_descriptors();
    let guest = Guest::new(40, |_| Form::Packed);
    let chain = guest.chain();
    for path in &guest.paths {
        fs::hard_link(path, path.with_extension("backup")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o400)).unwrap();
    }
    assert!(whole(&chain, guest.ram.len()) == guest.ram);
}

/// A daemon opens files by relative paths and then changes to `/`.
#[test]
fn current_directory_may_change_after_open() {
    if !is_alone("current_directory_may_change_after_open") {
        return;
    }
    have_few_descriptors();
    let guest = Guest::new(40, |_| Form::Packed);
    std::env::set_current_dir(guest.dir.path()).unwrap();
    let names: Vec<_> = guest
        .paths
        .iter()
        .map(|path| path.file_name().unwrap())
        .collect();
    let chain = Chain::open_sealed(&names).unwrap();
    std::env::set_current_dir("/").unwrap();
    assert!(whole(&chain, guest.ram.len()) == guest.ram);
}
