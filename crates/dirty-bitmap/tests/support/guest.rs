//! A guest whose pages are atomics, for the loom models of marking.

use std::ops::Range;

use dirty_bitmap::DirtyBitmap;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;

/// The page size in bytes.
pub(crate) const PAGE: u64 = 4096;

/// A guest of a few pages, with the bitmap that tracks them.
pub(crate) struct Guest {
    pub(crate) pages: Vec<AtomicU64>,
    pub(crate) bitmap: DirtyBitmap,
}

impl Guest {
    pub(crate) fn new(pages: u64) -> Arc<Self> {
        let bitmap = DirtyBitmap::new(0, pages * PAGE, PAGE).unwrap();
        Arc::new(Self {
            pages: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            bitmap,
        })
    }

    /// Writes a page, then marks it.
    pub(crate) fn write(&self, page: u64, value: u64) {
        self.pages[page as usize].store(value, Relaxed);
        self.bitmap.mark_page(page).unwrap();
    }

    /// Takes the marks and copies the marked pages to `image`.
    pub(crate) fn save(&self, image: &mut [u64]) {
        let taken = self.bitmap.drain().unwrap();
        copy(&self.pages, &taken, image);
    }

    /// Saves the marked pages to `image`, and asserts that it then equals the memory.
    pub(crate) fn assert_saved(&self, mut image: Vec<u64>) {
        self.save(&mut image);
        let pages: Vec<u64> = self.pages.iter().map(|page| page.load(Relaxed)).collect();
        assert_eq!(
            image, pages,
            "a written page is neither in the image nor marked"
        );
    }
}

/// Copies the pages marked in `taken` to `image`.
pub(crate) fn copy<K>(pages: &[AtomicU64], taken: &DirtyBitmap<K>, image: &mut [u64]) {
    let covers = |run: &Range<u64>, page: u64| run.contains(&(page * PAGE));
    for run in taken.runs() {
        for page in (0..pages.len() as u64).filter(|page| covers(&run, *page)) {
            image[page as usize] = pages[page as usize].load(Relaxed);
        }
    }
}

/// Starts a thread that writes each page and value of `writes`.
pub(crate) fn write_in_thread(
    guest: &Arc<Guest>,
    writes: &'static [(u64, u64)],
) -> thread::JoinHandle<()> {
    let guest = Arc::clone(guest);
    thread::spawn(move || {
        writes
            .iter()
            .for_each(|(page, value)| guest.write(*page, *value))
    })
}
