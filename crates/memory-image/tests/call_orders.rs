//! Random orders of calls between saves: a page that differs from the image that the bitmap builds
//! on is marked.

use std::path::PathBuf;
use std::sync::Arc;

use dirty_bitmap::ParentImage;
use guest_ram::GuestRam;
use memory_image::{Chain, Image, MappedChain};
use memory_writer::{Durability, ImageId, Layout, MemoryWriter, Seal, SnapshotError};
use page_reader::RamLayout;
use proptest::prelude::*;
use tempfile::TempDir;
use test_images::whole;

const PAGE: u64 = 4096;
const PAGES: u64 = 8;
const SIZE: u64 = PAGE * PAGES;
const SLOTS: usize = 3;

#[derive(Clone, Debug)]
enum Step {
    /// Writes a page of the RAM.
    Write(u64, u8),
    /// Zeros a page through the owner of the memory.
    Zero(u64),
    /// Restores the last image into mapped memory, zeros pages of it, and makes it the RAM.
    Restart(Vec<u64>, bool),
    Save(Save),
}

#[derive(Clone, Debug)]
struct Save {
    slot: usize,
    layout: Layout,
    full: bool,
    parent: NamedParent,
    /// What follows the first write.
    then: Vec<InSave>,
    end: End,
}

#[derive(Clone, Debug)]
enum NamedParent {
    Right,
    OfSlot(usize),
    Raw,
}

#[derive(Clone, Copy, Debug)]
enum InSave {
    /// Writes a page of the RAM, and extends the epoch.
    Extend(u64, u8),
    /// Extends it, and writes the extension to the file.
    ExtendAndWrite(u64, u8),
    Check,
}

#[derive(Clone, Copy, Debug)]
enum End {
    CommitAndRelease,
    /// As a member of a group, without another check.
    ReleaseAfterCommit,
    Drop,
}

fn step() -> impl Strategy<Value = Step> {
    let page = 0..PAGES;
    let write = (page.clone(), 1..=u8::MAX);
    let in_save = prop_oneof![
        2 => write.clone().prop_map(|(page, value)| InSave::Extend(page, value)),
        2 => write.clone().prop_map(|(page, value)| InSave::ExtendAndWrite(page, value)),
        3 => Just(InSave::Check),
    ];
    let parent = prop_oneof![
        6 => Just(NamedParent::Right),
        1 => (0..SLOTS).prop_map(NamedParent::OfSlot),
        1 => Just(NamedParent::Raw),
    ];
    let layout = prop::sample::select(vec![Layout::Raw, Layout::Sealed, Layout::Packed]);
    let end = prop::sample::select(vec![
        End::CommitAndRelease,
        End::ReleaseAfterCommit,
        End::ReleaseAfterCommit,
        End::Drop,
    ]);
    let then = prop::collection::vec(in_save, 0..4);
    let save = (0..SLOTS, layout, 0..4_u8, parent, then, end);
    prop_oneof![
        4 => write.prop_map(|(page, value)| Step::Write(page, value)),
        2 => page.clone().prop_map(Step::Zero),
        1 => (prop::collection::vec(page, 0..3), any::<bool>()).prop_map(|(zeroed, baseline)| Step::Restart(zeroed, baseline)),
        5 => save.prop_map(|(slot, layout, full, parent, then, end)| {
            // The holes of a raw diff are not used on every file system.
            let full = full == 0 || layout == Layout::Raw;
            Step::Save(Save { slot, layout, full, parent, then, end })
        }),
    ]
}

struct Program {
    dir: TempDir,
    ram: GuestRam,
    owner: Option<Arc<MappedChain>>,
    /// The raw image that the chain begins with.
    raw: Option<usize>,
}

fn layout() -> RamLayout {
    RamLayout::single(0, SIZE).unwrap()
}

impl Program {
    fn new() -> Self {
        let ram = GuestRam::new(layout()).unwrap();
        ram.mark_all();
        Self {
            dir: tempfile::tempdir().unwrap(),
            ram,
            owner: None,
            raw: None,
        }
    }

    fn path(&self, slot: usize) -> PathBuf {
        self.dir.path().join(slot.to_string())
    }

    fn image(&self, slot: usize) -> Option<Image> {
        Image::open(self.path(slot)).ok()
    }

    /// Returns the chain of the image that the bitmap builds on.
    fn chain(&self) -> Option<Chain> {
        let mut next = match self.ram.dirty_bitmap().parent() {
            ParentImage::Unknown => return None,
            ParentImage::Raw => None,
            ParentImage::Id(id) => Some(ImageId::from_bytes(id)),
        };
        let mut images = Vec::new();
        let full = loop {
            let Some(id) = next else {
                break false;
            };
            let found = (0..SLOTS).filter_map(|slot| self.image(slot));
            let image = found.into_iter().find(|image| image.id() == Some(id));
            let image = image.expect("an image that the chain needs was replaced");
            next = image.footer().and_then(|footer| footer.parent());
            let is_full = !image.is_diff();
            images.push(image);
            if is_full {
                break true;
            }
        };
        let mut chain = match full {
            true => Chain::from_image(images.pop().unwrap(), PAGE).unwrap(),
            false => Chain::open_raw(self.path(self.raw.unwrap()), PAGE).unwrap(),
        };
        for image in images.into_iter().rev() {
            chain.push_image(image).unwrap();
        }
        Some(chain)
    }

    /// Asserts that each page is in the chain as it is in the RAM, or marked.
    fn check(&self) {
        let dirty = self.ram.dirty_bitmap();
        let Some(chain) = self.chain() else {
            assert_eq!(dirty.dirty_pages(), PAGES, "no image was saved");
            return;
        };
        let (now, saved) = (
            whole(&self.ram, SIZE as usize),
            whole(&chain, SIZE as usize),
        );
        for page in 0..PAGES {
            let at = (page * PAGE) as usize;
            let is_saved = now[at..][..PAGE as usize] == saved[at..][..PAGE as usize];
            let is_dirty = dirty.is_dirty(page * PAGE).unwrap();
            assert!(is_saved || is_dirty, "page {page} is lost");
        }
    }

    fn write(&self, page: u64, value: u8) {
        let bytes = [value; PAGE as usize];
        self.ram.write_at(page * PAGE, &bytes).unwrap();
    }

    fn restart(&mut self, zeroed: &[u64], baseline: bool) {
        let Some(chain) = self.chain() else {
            return;
        };
        let owner = Arc::new(MappedChain::open(&chain).unwrap());
        for page in zeroed {
            owner.write_zeros(page * PAGE..(page + 1) * PAGE).unwrap();
        }
        self.ram = GuestRam::from_owner(layout(), Arc::clone(&owner)).unwrap();
        self.owner = Some(owner);
        if baseline {
            let parent = self.ram.dirty_bitmap().parent();
            self.ram.mark_all();
            self.ram.set_baseline().unwrap();
            self.ram.dirty_bitmap().set_parent(parent);
        }
    }

    fn save(&mut self, save: &Save) -> Result<(), SnapshotError> {
        let Save {
            slot, layout, full, ..
        } = *save;
        let chain = self.chain();
        let known = self.ram.dirty_bitmap().parent();
        // A raw image at the destination is not recognized.
        let replaces_raw = !full && self.raw == Some(slot);
        if replaces_raw || (!full && chain.is_none()) {
            return Ok(());
        }
        let named = match save.parent {
            NamedParent::Right => known.id().map(ImageId::from_bytes),
            NamedParent::OfSlot(slot) => self.image(slot).and_then(|image| image.id()),
            NamedParent::Raw => None,
        };
        let seal = match (full, named) {
            (true, _) => Seal::new(),
            (false, Some(id)) => Seal::new().parent(id),
            (false, None) => Seal::new().on_raw_image(),
        };
        let seal = seal.ancestors(chain.iter().flat_map(Chain::ids));
        let mut options = MemoryWriter::options()
            .layout(layout)
            .durability(Durability::None);
        if layout.has_footer() {
            options = options.seal(seal);
        }
        let mut writer = options.open(self.path(slot), SIZE, PAGE)?;
        let dirty = Arc::clone(self.ram.dirty_bitmap());
        let mut epoch = dirty.begin_epoch().unwrap();
        match full {
            true => writer.write_full(&self.ram)?,
            false => _ = writer.write_diff(&self.ram, epoch.bitmap())?,
        }
        // `release` and `release_after` trust a program that never checked.
        let mut checked = false;
        for then in &save.then {
            match *then {
                InSave::Extend(page, value) => {
                    self.write(page, value);
                    let _ = epoch.extend().unwrap();
                }
                InSave::ExtendAndWrite(page, value) => {
                    self.write(page, value);
                    writer.write_diff(&self.ram, &epoch.extend().unwrap())?;
                }
                InSave::Check => checked |= writer.check_epoch(&mut epoch).is_ok(),
            }
        }
        match save.end {
            End::CommitAndRelease => writer.commit_and_release(epoch)?,
            End::ReleaseAfterCommit if checked => {
                let commit = || writer.finish()?.commit().map_err(SnapshotError::from);
                if epoch.release_after(commit).is_err() {
                    return Ok(());
                }
            }
            End::ReleaseAfterCommit | End::Drop => return Ok(()),
        }
        match self.ram.dirty_bitmap().parent() {
            ParentImage::Raw => self.raw = Some(slot),
            ParentImage::Id(_) if full => self.raw = None,
            ParentImage::Unknown | ParentImage::Id(_) => {}
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(64, 2000)))]

    #[test]
    fn page_that_is_not_in_the_parent_is_marked(steps in prop::collection::vec(step(), 1..24)) {
        let mut program = Program::new();
        for step in steps {
            match step {
                Step::Write(page, value) => program.write(page, value),
                Step::Zero(page) => match &program.owner {
                    Some(owner) => owner.write_zeros(page * PAGE..(page + 1) * PAGE).unwrap(),
                    None => program.write(page, 0),
                },
                Step::Restart(zeroed, baseline) => program.restart(&zeroed, baseline),
                // A refused save changes nothing.
                Step::Save(save) => _ = program.save(&save),
            }
            program.check();
        }
    }
}
