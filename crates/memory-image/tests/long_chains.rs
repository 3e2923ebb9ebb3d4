//! Chains with more images than the process may have descriptors.
#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use dirty_bitmap::DirtyBitmap;
use memory_image::{
    Chain, Image, ImageId, MapError, MappedChain, MappedImage, MergeError, ReadImageError,
    RestoreError, compare,
};
use memory_writer::{Durability, Layout, MemoryWriter, Seal};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use page_reader::PageReader;
use support::{is_alone, whole, write_packed};
use test_machine::rounds;

const PAGE: u64 = 4096;
const PAGES: u64 = 256;
/// Descriptor limit of a process that cannot keep all images open: a quarter of them is for images.
const FEW: u64 = 64;
const OPEN: usize = 16;

fn have_few_descriptors() {
    setrlimit(Resource::RLIMIT_NOFILE, FEW, FEW).unwrap();
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[derive(Clone, Copy)]
enum Form {
    Raw,
    Sealed,
    Packed,
}

/// A full image and diffs, each of which changes one more page.
struct Guest {
    dir: tempfile::TempDir,
    ram: Vec<u8>,
    paths: Vec<PathBuf>,
    newest: Option<ImageId>,
}

/// Opens an image of any form. The raw images of these tests never look like sealed ones.
fn open(path: &Path) -> Image {
    Image::open(path)
        .or_else(|_| Image::open_raw(path))
        .unwrap()
}

impl Guest {
    fn new(layers: usize, form: impl Fn(usize) -> Form) -> Self {
        let mut guest = Self {
            dir: tempfile::tempdir().unwrap(),
            ram: vec![0; (PAGES * PAGE) as usize],
            paths: Vec::new(),
            newest: None,
        };
        for layer in 0..layers {
            guest.save(form(layer));
        }
        guest
    }

    /// Returns the page that only this layer holds, or that it holds first.
    fn page_of(layer: usize) -> u64 {
        layer as u64 * 7 % PAGES
    }

    /// Changes the page of the next layer, or all pages in the first layer. Returns the path of the
    /// layer and the page.
    fn change(&mut self) -> (PathBuf, u64) {
        let layer = self.paths.len();
        let path = self.dir.path().join(format!("{layer}.mem"));
        let page = Self::page_of(layer);
        let start = (page * PAGE) as usize;
        let changed = match layer {
            0 => &mut self.ram[..],
            _ => &mut self.ram[start..start + PAGE as usize],
        };
        let words = changed.chunks_mut(8);
        words.for_each(|word| word.copy_from_slice(&(layer as u64 + 1).to_le_bytes()));
        self.paths.push(path.clone());
        (path, page)
    }

    fn save(&mut self, form: Form) {
        let (path, page) = self.change();
        let seal = match self.newest {
            Some(id) => Seal::new().parent(id),
            None => Seal::new().on_raw_image(),
        };
        let layout = match form {
            Form::Raw => Layout::Raw,
            Form::Sealed => Layout::Sealed(seal),
            Form::Packed => Layout::Packed(seal),
        };
        let size = self.ram.len() as u64;
        let dirty = DirtyBitmap::new(0, size, PAGE).unwrap();
        dirty.set_dirty(page * PAGE).unwrap();
        let mut writer = MemoryWriter::options()
            .layout(layout)
            .durability(Durability::None)
            .open(&path, size, PAGE)
            .unwrap();
        match self.paths.len() {
            1 => writer.write_full(&self.ram).unwrap(),
            _ => _ = writer.write_diff(&self.ram, &dirty).unwrap(),
        }
        self.newest = writer.image_id();
        writer.commit().unwrap();
    }

    fn save_by_hand(&mut self) {
        let (path, page) = self.change();
        let pages = match self.newest {
            None => 0..PAGES,
            Some(_) => page..page + 1,
        };
        let bytes = |page| self.ram[(page * PAGE) as usize..][..PAGE as usize].to_vec();
        let pages: Vec<_> = pages.map(|page| (page, bytes(page))).collect();
        let size = self.ram.len() as u64;
        self.newest = Some(write_packed(&path, size, PAGE, self.newest, &pages));
    }

    fn chain(&self) -> Chain {
        let mut chain = Chain::from_image(open(&self.paths[0]), PAGE).unwrap();
        for path in &self.paths[1..] {
            chain.push_image(open(path)).unwrap();
        }
        chain
    }

    fn read(&self, chain: &Chain, layer: usize) -> io::Result<()> {
        let offset = Self::page_of(layer) * PAGE;
        let mut bytes = vec![0xee; PAGE as usize];
        chain.read_at(offset, &mut bytes)?;
        assert!(bytes == self.ram[offset as usize..][..PAGE as usize]);
        Ok(())
    }
}

#[test]
fn more_layers_than_descriptors_are_read_in_every_way() {
    if !is_alone("more_layers_than_descriptors_are_read_in_every_way") {
        return;
    }
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
    assert!(open_descriptors() < OPEN + 10);
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
    let go_on = &|_| ControlFlow::Continue(());
    let size = ram.len() as u64;
    assert!(compare(ram, &chain, size, PAGE, go_on).unwrap().is_clean());
    for image in sealed.images() {
        let found = image.verify(&|_, _| ControlFlow::Continue(())).unwrap();
        assert!(found.is_ok());
    }
    drop((chain, sealed));
    assert!(
        open_descriptors() < 10,
        "descriptors are closed with their chains"
    );
}

/// Each thread closes files that another one reads.
#[test]
fn threads_that_share_few_descriptors_read_the_right_bytes() {
    if !is_alone("threads_that_share_few_descriptors_read_the_right_bytes") {
        return;
    }
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
    assert!(open_descriptors() < 10);
}

/// Other files use the descriptors that the images would use.
#[test]
fn images_are_closed_when_no_descriptor_is_left() {
    if !is_alone("images_are_closed_when_no_descriptor_is_left") {
        return;
    }
    let guest = Guest::new(OPEN, |_| Form::Packed);
    let first = Chain::open_sealed(&guest.paths).unwrap();
    have_few_descriptors();
    let others: Vec<_> = std::iter::repeat_with(|| File::open("/dev/null"))
        .map_while(Result::ok)
        .collect();
    assert!(others.len() > 30);
    let second = Chain::open_sealed(&guest.paths).unwrap();
    assert!(whole(&second, guest.ram.len()) == guest.ram);
    assert!(whole(&first, guest.ram.len()) == guest.ram);
}

#[test]
fn chain_of_ten_thousand_layers_is_opened_and_read() {
    if !is_alone("chain_of_ten_thousand_layers_is_opened_and_read") {
        return;
    }
    let mut guest = Guest::new(0, |_| Form::Packed);
    (0..10_000).for_each(|_| guest.save_by_hand());
    setrlimit(Resource::RLIMIT_NOFILE, 1024, 1024).unwrap();
    let chain = Chain::open_sealed(&guest.paths).unwrap();
    assert_eq!(chain.len(), 10_000);
    assert!(open_descriptors() < 1024 / 4 + 10);
    assert!(whole(&chain, guest.ram.len()) == guest.ram);
    let mapped = MappedChain::open(&chain).unwrap();
    assert!(whole(&mapped, guest.ram.len()) == guest.ram);
    let merged = guest.dir.path().join("merged");
    let options = MemoryWriter::options().layout(Layout::Packed(chain.seal()));
    chain.merge(options, &merged).unwrap();
    let merged = Chain::open_sealed(&[merged]).unwrap();
    assert_eq!(merged.id(), chain.id());
    assert!(whole(&merged, guest.ram.len()) == guest.ram);
}

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
                matches!(error, MergeError::Write(_)),
                "{name} {way}: {error:?}"
            );
            assert!(!merged.exists());
        }
    }
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
