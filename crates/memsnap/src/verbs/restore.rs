//! `memsnap restore`: a chain's RAM, for a guest to go on with.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use indicatif::ProgressBar;
use memory_image::{Chain, RamTarget};
use page_reader::{FileReader, PageReader};
use sparse_file::{Source, SpaceError, WriteOptions, punch_hole, write_runs};

use crate::Verdict;
use crate::args::{Output, RawImages};
use crate::failure::Failure;
use crate::print::size;
use crate::session::Session;
use crate::{input, save};

/// Bring the RAM back as it was: into a new file, or into RAM that is there
///
/// A new file appears once it is whole, and is sparse where the RAM is zero. A file or memfd that exists (/proc/PID/fd/N) is written in place,
/// where a monitor has it mapped; it must be as large as the RAM and empty. If writing fails or is interrupted, it is left empty.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    memsnap restore full.mem d1.mem -o /dev/shm/guest\n  \
    memsnap restore --verify full.mem -o /proc/4242/fd/17 --force")]
pub struct Restore {
    /// Images, oldest first
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The file or memfd that the RAM goes to
    #[arg(short, long, value_name = "RAMFILE")]
    output: PathBuf,
    /// Overwrite RAM that is not empty
    #[arg(long)]
    force: bool,
    /// Compare the images with their checksums first; raw ones have none, and are refused
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    raw: RawImages,
}

impl Restore {
    pub fn run(&self, session: &Session) -> anyhow::Result<Verdict> {
        if input::is_one_of(&self.output, &self.files) {
            let path = self.output.clone();
            return Err(Failure::OutputIsInput { path }.into());
        }
        let chain = input::full_chain(session, &self.files, &self.raw)?;
        if self.verify {
            let raw = chain.images().find(|image| image.footer().is_none());
            if let Some(raw) = raw {
                let path = raw.path().to_owned();
                return Err(Failure::NothingToVerify { path }.into());
            }
            input::check_sums(session, chain.images())?;
        }
        if self.output.exists() {
            self.in_place(session, &chain)?;
        } else {
            self.new_file(session, &chain)?;
        }
        Ok(Verdict::Good)
    }

    fn new_file(&self, session: &Session, chain: &Chain) -> anyhow::Result<()> {
        let output = Output {
            path: self.output.clone(),
            force: false,
        };
        let options = session.options("restoring").skip_untouched(true);
        let mut writer = save::stage(&output, options, chain.size(), chain.page_size())?;
        save::write_chain(&mut writer, chain)?;
        save::commit(session, writer)
    }

    fn in_place(&self, session: &Session, chain: &Chain) -> anyhow::Result<()> {
        let path = &self.output;
        let mut target = InPlace::open(session, path, chain)?;
        if !self.force && target.holds_anything() {
            let path = path.clone();
            return Err(Failure::TargetInUse { path }.into());
        }
        session.hold();
        let restored = target.empty().and_then(|()| {
            chain.restore_zeroed(&mut target)?;
            Ok(target.file.sync_all()?)
        });
        if let Err(error) = restored {
            // No guest is to start with half of its RAM.
            if let Err(why) = target.empty() {
                return Err(error.context(format!(
                    "{path:?} holds a part of the RAM and can't be emptied ({why:#}): start no guest with it"
                )));
            }
            session.check("the output was emptied")?;
            return Err(error.context(format!("{path:?} was emptied")));
        }
        let ram = size(chain.size());
        session.say(&format!("{}: {ram} of RAM", path.display()))
    }
}

/// RAM that exists.
struct InPlace<'s> {
    session: &'s Session,
    file: File,
    size: u64,
    bar: ProgressBar,
}

impl<'s> InPlace<'s> {
    fn open(session: &'s Session, path: &Path, chain: &Chain) -> anyhow::Result<Self> {
        if !path.metadata()?.is_file() {
            let path = path.to_owned();
            return Err(Failure::NotRam { path }.into());
        }
        let opened = File::options().read(true).write(true).open(path);
        let file = opened.with_context(|| format!("cannot open {path:?} to restore to"))?;
        let size = file.metadata()?.len();
        if size != chain.size() {
            return Err(Failure::TargetSize {
                path: path.to_owned(),
                image: chain.size(),
                target: size,
            }
            .into());
        }
        let bar = session.bar("restoring");
        bar.set_length(size);
        Ok(Self {
            session,
            file,
            size,
            bar,
        })
    }

    fn holds_anything(&self) -> bool {
        let reader = FileReader::new(&self.file);
        reader.populated(0..self.size).next().is_some()
    }

    /// Makes all of it zeros.
    fn empty(&self) -> anyhow::Result<()> {
        let all = 0..self.size;
        match punch_hole(&self.file, all.clone()) {
            Err(SpaceError::Unsupported { .. }) => {}
            punched => return Ok(punched?),
        }
        let on = &mut |_| std::ops::ControlFlow::Continue(());
        write_runs(&self.file, [all], &Zeros, &WriteOptions::new(), on)?;
        Ok(())
    }
}

impl RamTarget for InPlace<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.session.flow().is_break() {
            return Err(io::Error::other("interrupted"));
        }
        self.file.write_all_at(bytes, offset)?;
        self.bar.set_position(offset);
        Ok(())
    }
}

struct Zeros;

impl Source for Zeros {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
}
