//! The plan of one save, chosen at random.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use guests::guest::Ram;
use memory_image::{Image, OpenImageError};
use memory_writer::{
    CancelToken, Durability, Engine, ImageId, Layout, MemoryWriter, MemoryWriterOptions, Seal,
};
use page_reader::{HostMemory, PageReader, PopulatedRanges};
use random::Random;

use super::shape::UNIT;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Full,
    Diff,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InjectedFault {
    /// Cancelled after so many thousandths of the bytes.
    Cancelled(u64),
    /// The RAM can't be read from this byte on.
    ReaderFails(u64),
    /// Reading the RAM from this byte on panics.
    ReaderPanics(u64),
    /// The file system has next to no room.
    NoSpace,
    /// The file system is read-only.
    ReadOnly,
    /// Not committed.
    NotCommitted,
    /// When it is committed, there is a directory where the file goes.
    Occupied,
    /// Another process creates the file, which must be new, before the commit.
    Appeared,
    /// When it is committed, the directory is elsewhere and another one in its place. The file goes
    /// where the directory is.
    DirectoryMoved,
    /// It is committed, and the marks not released: the next diff has the same pages again.
    NotReleased,
    /// Another process saves, and is killed.
    Killed,
}

/// What is thrown, and what an error is known by.
pub(super) const ON_PURPOSE: &str = "on purpose";

impl InjectedFault {
    /// Of a RAM of `size` bytes; with the means of `root`, and of a `child` process.
    fn choose(random: &mut Random, size: u64, means: Means) -> Self {
        // Low more often than high: a diff may have nothing high up.
        let end = 1 + random.below(size);
        let at = random.below(end);
        loop {
            match random.below(12) {
                0 | 1 => return Self::Cancelled(at * 1000 / size),
                2 => return Self::ReaderFails(at),
                3 => return Self::ReaderPanics(at),
                4 if means.root => return Self::NoSpace,
                5 if means.root => return Self::ReadOnly,
                6 => return Self::NotCommitted,
                7 => return Self::Occupied,
                8 => return Self::Appeared,
                9 => return Self::DirectoryMoved,
                10 => return Self::NotReleased,
                11 if means.child => return Self::Killed,
                _ => {}
            }
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cancelled(_) => "cancelled",
            Self::ReaderFails(_) => "RAM unreadable",
            Self::ReaderPanics(_) => "reader panics",
            Self::NoSpace => "no space",
            Self::ReadOnly => "read-only",
            Self::NotCommitted => "not committed",
            Self::Occupied => "a directory in the way",
            Self::Appeared => "a file in the way",
            Self::DirectoryMoved => "directory moved",
            Self::NotReleased => "not released",
            Self::Killed => "killed",
        }
    }

    /// Whether the destination must not exist before.
    pub(super) fn wants_new_name(self) -> bool {
        !matches!(
            self,
            Self::Cancelled(_) | Self::NotReleased | Self::NotCommitted
        )
    }

    /// Whether an error is the one that this brings about, and no other.
    pub(super) fn explains(self, error: &anyhow::Error) -> bool {
        let is = |kind| {
            let mut chain = error.chain();
            chain.any(|cause| {
                let cause = cause.downcast_ref::<io::Error>();
                cause.is_some_and(|cause| cause.kind() == kind)
            })
        };
        let says = |text| format!("{error:#}").contains(text);
        match self {
            Self::Cancelled(_) => says("was cancelled"),
            Self::ReaderFails(_) | Self::ReaderPanics(_) | Self::NotCommitted | Self::Killed => {
                says(ON_PURPOSE)
            }
            Self::NoSpace => is(io::ErrorKind::StorageFull),
            Self::ReadOnly => is(io::ErrorKind::ReadOnlyFilesystem),
            Self::Occupied => is(io::ErrorKind::IsADirectory) || is(io::ErrorKind::AlreadyExists),
            Self::Appeared => is(io::ErrorKind::AlreadyExists),
            Self::DirectoryMoved | Self::NotReleased => false,
        }
    }
}

/// What this process may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Means {
    pub root: bool,
    pub child: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub kind: Kind,
    /// How often pages are written while the guest runs, before it is stopped for the last.
    pub passes: u64,
    pub layout: Layout,
    pub page: u64,
    engine: Engine,
    chunk: usize,
    durability: Durability,
    pub recycle: bool,
    skip: (bool, bool),
    /// With a second file, both or none.
    pub grouped: bool,
    /// Whether the guest runs while it is committed.
    pub commits_live: bool,
    /// Granules that the bitmap goes over to while the guest runs.
    pub granules: Vec<u64>,
    /// How long the guest runs before.
    pub runs: Duration,
    pub fault: Option<InjectedFault>,
}

impl Plan {
    pub(super) fn choose(random: &mut Random, size: u64, first: bool, means: Means) -> Self {
        let full = first || random.below(6) == 0;
        let kind = if full { Kind::Full } else { Kind::Diff };
        let fault = (random.below(3) == 0).then(|| InjectedFault::choose(random, size, means));
        // Another process can be given a diff to save.
        let fault = fault.filter(|fault| kind == Kind::Diff || *fault != InjectedFault::Killed);
        let granule = |random: &mut Random| (1024 << random.below(11)).min(largest_granule(size));
        Self {
            kind,
            passes: [0, 0, 1, 2, 3][random.below(5) as usize],
            layout: Layout::ALL[random.below(Layout::ALL.len() as u64) as usize],
            page: [4096, 4096, 16384, UNIT][random.below(4) as usize],
            engine: Engine::ALL[random.below(Engine::ALL.len() as u64) as usize],
            chunk: 4096 << random.below(10),
            durability: [
                Durability::Full,
                Durability::Full,
                Durability::Barrier,
                Durability::None,
            ][random.below(4) as usize],
            recycle: full && random.below(2) == 0,
            skip: (random.below(2) == 0, random.below(2) == 0),
            grouped: random.below(4) == 0,
            commits_live: random.below(2) == 0,
            granules: (0..random.below(3)).map(|_| granule(random)).collect(),
            runs: Duration::from_micros(random.below(12_000)),
            fault,
        }
    }

    /// The same save as a diff that nothing goes wrong with.
    pub(super) fn again(&self, first: bool) -> Self {
        Self {
            kind: if first { Kind::Full } else { Kind::Diff },
            recycle: false,
            fault: None,
            ..self.clone()
        }
    }

    /// Opens an image that was written in this layout.
    pub(super) fn open(&self, path: &Path) -> Result<Image, OpenImageError> {
        match self.layout.has_footer() {
            true => Image::open(path),
            false => Image::open_raw(path),
        }
    }

    /// Returns the options of a file with `seal`, as far as its layout stores one.
    pub(super) fn sealed(&self, seal: Seal) -> MemoryWriterOptions {
        let options = self.tuned().layout(self.layout);
        match self.layout.has_footer() {
            true => options.seal(seal),
            false => options,
        }
    }

    /// With the RAM of a guest of these `regions`, whose newest image is `parent`.
    pub(super) fn options(
        &self,
        regions: &[Range<u64>],
        parent: Option<ImageId>,
    ) -> MemoryWriterOptions {
        let seal = || {
            let seal = Seal::new().regions(regions.iter().cloned());
            match (self.kind, parent) {
                (Kind::Diff, Some(parent)) => seal.parent(parent),
                (Kind::Diff, None) => seal.on_raw_image(),
                _ => seal,
            }
        };
        let options = self.sealed(seal());
        let options = options.no_clobber(self.fault == Some(InjectedFault::Appeared));
        let Some(InjectedFault::Cancelled(thousandths)) = self.fault else {
            return options;
        };
        let token = CancelToken::new();
        options.cancel(token.clone()).progress(move |done| {
            if done.done * 1000 >= done.total * thousandths {
                token.cancel();
            }
            std::ops::ControlFlow::Continue(())
        })
    }

    /// All but the layout.
    pub(super) fn tuned(&self) -> MemoryWriterOptions {
        let options = MemoryWriter::options()
            // The pages of each diff are listed, also of one that holds all of them.
            .allow_ambiguous_diff(true)
            .engine(self.engine)
            .chunk_size(self.chunk)
            .durability(self.durability)
            .skip_zeros(self.skip.0)
            .skip_untouched(self.skip.1);
        match self.recycle {
            true => options.recycle(64 << 20),
            false => options,
        }
    }
}

fn largest_granule(size: u64) -> u64 {
    1 << size.ilog2()
}

/// The RAM, as far as it can be read.
pub(super) struct Flaky<'a> {
    ram: &'a Ram,
    end: u64,
    panics: bool,
}

impl<'a> Flaky<'a> {
    pub(super) fn new(ram: &'a Ram, fault: Option<InjectedFault>) -> Self {
        let (end, panics) = match fault {
            Some(InjectedFault::ReaderFails(end)) => (end, false),
            Some(InjectedFault::ReaderPanics(end)) => (end, true),
            _ => (u64::MAX, false),
        };
        Self { ram, end, panics }
    }
}

impl PageReader for Flaky<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset + buf.len() as u64 <= self.end {
            return self.ram.read_at(offset, buf);
        }
        if self.panics {
            // Not `panic!`, which would print a message.
            std::panic::resume_unwind(Box::new(ON_PURPOSE));
        }
        Err(io::Error::other(ON_PURPOSE))
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let len = (len as u64).min(self.end.saturating_sub(offset));
        self.ram.host_memory(offset, usize::try_from(len).ok()?)
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        self.ram.populated(range)
    }
}
