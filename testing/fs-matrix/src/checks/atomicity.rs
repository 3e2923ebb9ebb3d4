//! That the destination is the old file whole or the new file whole, and nothing else is touched.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use memory_writer::{CommitError, MemoryWriter, OpenError, SnapshotError};
use nix::errno::Errno;
use scenarios::child::{Child, PAGE};
use scenarios::ram::{Content, Stamped, content, content_of};

use super::Check;
use crate::finding::Family::Atomicity;
use crate::finding::Outcome;
use crate::fixture::Fixture;

pub(super) const CHECKS: &[Check] = &[
    Check::new(Atomicity, "replace", replace),
    Check::new(
        Atomicity,
        "dropped writer leaves the old file",
        dropped_writer,
    ),
    Check::new(Atomicity, "no-clobber", no_clobber),
    Check::new(Atomicity, "symlinked destination", symlinked_destination),
    Check::new(
        Atomicity,
        "symlink planted at the staged file's name",
        planted_symlink,
    ),
    Check::new(
        Atomicity,
        "staging on another file system",
        staging_elsewhere,
    ),
    Check::new(Atomicity, "two writers", two_writers),
];

const RAM: u64 = 1 << 20;
const DEST: &str = "vm.mem";

fn replace(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let dest = fixture.path(DEST);
    let mut seen = Vec::new();
    for stamp in 1..=3 {
        fixture
            .target
            .full(&dest, &Stamped::new(stamp, RAM), RAM, PAGE)?;
        seen.push(content(&dest, RAM)?);
    }
    let left = fixture.leftovers(&[DEST])?;
    Ok(Outcome::promise(
        seen == [1, 2, 3].map(Content::Whole) && left.is_empty(),
        "after each commit the new file is complete, and no other file exists",
        format!(
            "{}; other files: {left:?}",
            seen.last().context("three commits")?
        ),
    ))
}

fn dropped_writer(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let dest = fixture.path(DEST);
    fixture
        .target
        .full(&dest, &Stamped::new(1, RAM), RAM, PAGE)?;
    let mut writer = MemoryWriter::open(&dest, RAM, PAGE)?;
    writer.write_full(&Stamped::new(2, RAM))?;
    drop(writer);
    let (found, left) = (content(&dest, RAM)?, fixture.leftovers(&[DEST])?);
    Ok(Outcome::promise(
        found == Content::Whole(1) && left.is_empty(),
        "the old file is complete, and no other file exists",
        format!("{found}; other files: {left:?}"),
    ))
}

fn no_clobber(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let expected = "a new destination is written; one that exists, or is created later, is refused";
    let (dest, late) = (fixture.path(DEST), fixture.path("late.mem"));
    let open = |dest| {
        MemoryWriter::options()
            .no_clobber(true)
            .open(dest, RAM, PAGE)
    };
    let mut writer = match open(&dest) {
        Ok(writer) => writer,
        Err(SnapshotError::Open(OpenError::NoClobberUnsupported { source, .. })) => {
            return Ok(Outcome::differs(
                expected,
                format!("refused at open: the file system supports no such call: {source}"),
            ));
        }
        Err(error) => return Err(error.into()),
    };
    writer.write_full(&Stamped::new(1, RAM))?;
    writer.commit()?;
    let existing = matches!(
        open(&dest),
        Err(SnapshotError::Open(OpenError::AlreadyExists { .. }))
    );
    let mut writer = open(&late)?;
    writer.write_full(&Stamped::new(2, RAM))?;
    fs::write(&late, "first")?;
    let lost = match writer.commit() {
        Err(SnapshotError::Commit(CommitError::NotReplaced { source, .. })) => {
            source.kind() == ErrorKind::AlreadyExists
        }
        _ => false,
    };
    let untouched = content(&dest, RAM)? == Content::Whole(1) && fs::read(&late)? == b"first";
    let left = fixture.leftovers(&[DEST, "late.mem"])?;
    Ok(Outcome::promise(
        existing && lost && untouched && left.is_empty(),
        expected,
        format!(
            "existing refused: {existing}, late refused: {lost}, both untouched: {untouched}; other files: {left:?}"
        ),
    ))
}

fn symlinked_destination(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let expected = "the target of the link is replaced, the link remains";
    fs::create_dir(fixture.path("disk"))?;
    let (link, target) = (fixture.path(DEST), fixture.path("disk/real.mem"));
    fs::write(&target, "old")?;
    if let Err(error) = symlink("disk/real.mem", &link) {
        return Ok(Outcome::differs(expected, format!("no symlinks: {error}")));
    }
    fixture
        .target
        .full(&link, &Stamped::new(1, RAM), RAM, PAGE)?;
    let is_link = link.symlink_metadata()?.is_symlink();
    let found = content(&target, RAM)?;
    let left = fixture.leftovers(&[DEST, "disk"])?;
    Ok(Outcome::promise(
        is_link && found == Content::Whole(1) && left.is_empty(),
        expected,
        format!(
            "{}, target: {found}; other files: {left:?}",
            if is_link { "a link" } else { "no link" }
        ),
    ))
}

fn planted_symlink(fixture: &Fixture) -> anyhow::Result<Outcome> {
    const PRECIOUS: &[u8] = b"another user's file";
    let expected = "the target of the link is not written";
    let (dest, victim) = (fixture.path(DEST), fixture.path("victim"));
    fs::write(&victim, PRECIOUS)?;
    let stage = fixture.target.stage_of(&dest)?;
    if let Err(error) = symlink("victim", &stage) {
        return Ok(Outcome::holds(
            expected,
            format!("the link could not be created: {error}"),
        ));
    }
    let written = fixture.target.full(&dest, &Stamped::new(1, RAM), RAM, PAGE);
    let intact = fs::read(&victim)? == PRECIOUS;
    let found = content(&dest, RAM)?;
    let regular = dest
        .symlink_metadata()
        .is_ok_and(|metadata| metadata.is_file());
    Ok(Outcome::promise(
        intact && written.is_ok() && regular && found == Content::Whole(1),
        expected,
        match intact {
            true => format!("untouched; the destination: {found}"),
            false => "overwritten through the link".into(),
        },
    ))
}

fn staging_elsewhere(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let dest = fixture.path(DEST);
    let open = MemoryWriter::options()
        .staging_dir(&fixture.elsewhere)
        .open(&dest, RAM, PAGE);
    let refused = matches!(
        open,
        Err(SnapshotError::Open(OpenError::CrossFileSystem { .. }))
    );
    let (here, there) = (
        fixture.leftovers(&[])?,
        scenarios::directory::names(&fixture.elsewhere, &[])?,
    );
    let staged = there.iter().any(|name| name.contains(".stage"));
    Ok(Outcome::promise(
        refused && here.is_empty() && !staged,
        "refused before any data is written, and no file is left",
        format!(
            "{}; left here: {here:?}",
            if refused { "refused" } else { "not refused" }
        ),
    ))
}

/// Two processes commit to one destination as fast as they can, while this one reads it.
fn two_writers(fixture: &Fixture) -> anyhow::Result<Outcome> {
    const TIMES: u32 = 15;
    let dest = fixture.path(DEST);
    fixture
        .target
        .full(&dest, &Stamped::new(1, RAM), RAM, PAGE)?;
    let mut writers = Vec::new();
    for first in [1000, 2000] {
        let child = Child::new(fixture.target, &dest, first, RAM).times(TIMES);
        writers.push(child.command(&[])?.spawn()?);
    }
    let mut seen = std::collections::BTreeSet::new();
    let (mut torn, mut emptied) = (None, None);
    loop {
        let mut running = false;
        for writer in &mut writers {
            running |= writer.try_wait()?.is_none();
        }
        match Look::at(&dest)? {
            Look::Found(Content::Whole(stamp)) => drop(seen.insert(stamp)),
            Look::Found(other) => torn = torn.or(Some(other)),
            Look::Emptied(other) => emptied = emptied.or(Some(other)),
            Look::Gone => {}
        }
        if !running {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut failed = Vec::new();
    for writer in writers {
        let output = writer.wait_with_output()?;
        if !output.status.success() {
            failed.push(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
    }
    let last = content(&dest, RAM)?;
    let left = fixture.leftovers(&[DEST])?;
    let right = torn.is_none() && failed.is_empty() && left.is_empty();
    let last_right = [1000, 2000]
        .map(|first| Content::Whole(first + TIMES - 1))
        .contains(&last);
    let expected = format!(
        "{} commits succeed, each read returns one complete version, the last version remains",
        2 * TIMES
    );
    let never = |content: Option<Content>| content.map_or("never".into(), |it| it.to_string());
    let seen = format!(
        "{} versions seen, at the end {last}; torn: {}; emptied for a reader when replaced: {}; failed: {failed:?}; other files: {left:?}",
        seen.len(),
        never(torn),
        never(emptied),
    );
    Ok(if right && last_right && emptied.is_some() {
        Outcome::differs(expected, seen)
    } else {
        Outcome::promise(right && last_right, expected, seen)
    })
}

/// One look at a file that others replace concurrently.
enum Look {
    Found(Content),
    /// The file was replaced before it was read, and the driver did not keep its bytes for open
    /// descriptors. Linux's HFS+ driver empties a replaced file while another process opens it.
    Emptied(Content),
    /// The file was removed while it was read, as NFS allows for a replaced file. This look proves
    /// nothing.
    Gone,
}

impl Look {
    fn at(path: &Path) -> anyhow::Result<Self> {
        let look = || {
            let file = match File::open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    return Ok(Self::Found(Content::Missing));
                }
                Err(error) => return Err(error),
            };
            let found = match content_of(&file, RAM) {
                // It was emptied since its size was asked for.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                    Content::WrongSize(file.metadata()?.len())
                }
                found => found?,
            };
            let whole = matches!(found, Content::Whole(_));
            Ok(if !whole && file.metadata()?.nlink() == 0 {
                Self::Emptied(found)
            } else {
                Self::Found(found)
            })
        };
        match look() {
            Err(error) if error.raw_os_error() == Some(Errno::ESTALE as i32) => Ok(Self::Gone),
            looked => Ok(looked?),
        }
    }
}
