//! What goes wrong outside of the library: it says so, the old file stays, nothing is left.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use indicatif::BinaryBytes;
use memory_writer::MemoryWriter;
use scenarios::child::{Child, PAGE};
use scenarios::directory::names;
use scenarios::ram::{Content, Stamped, content};

use super::{Check, DISK_FULL};
use crate::finding::Family::Faults;
use crate::finding::Outcome;
use crate::fixture::Fixture;

pub(super) const CHECKS: &[Check] = &[
    Check::new(Faults, "read-only mount", read_only),
    Check::new(Faults, "file-size limit of the process", process_limit),
    Check::new(
        Faults,
        "file-size limit of the file system",
        file_system_limit,
    ),
    Check::new(Faults, DISK_FULL, disk_full),
    Check::new(Faults, "name of 255 bytes", |fixture| {
        name(fixture, OsStr::new(&"n".repeat(255)))
    }),
    Check::new(Faults, "name that is not UTF-8", |fixture| {
        name(fixture, OsStr::from_bytes(b"vm-\xff\xfe.mem"))
    }),
    Check::new(Faults, "unmount while a staged file is open", lazy_unmount),
];

const RAM: u64 = 1 << 20;
const DEST: &str = "vm.mem";

/// The kind of the system's error at the bottom of `error`.
fn kind_of(error: &anyhow::Error) -> Option<ErrorKind> {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .map(io::Error::kind)
        .last()
}

/// Fills the disk up to a little less than a snapshot, then takes snapshots and fills on until one
/// does not fit.
fn disk_full(fixture: &Fixture) -> anyhow::Result<Outcome> {
    const LARGE: u64 = 8 << 20;
    let expected = "refused for lack of space, the old file is complete, no other file exists; written once there is space";
    let Some(small) = &fixture.small else {
        return Ok(Outcome::not_run(
            "no small file system of this kind is available",
        ));
    };
    let dir = tempfile::tempdir_in(small)?;
    let (dest, ballast) = (dir.path().join(DEST), dir.path().join("ballast"));
    fixture
        .target
        .full(&dest, &Stamped::new(1, LARGE), LARGE, PAGE)?;
    if let Err(error) = leave_room(dir.path(), &ballast, LARGE) {
        let found = content(&dest, LARGE)?;
        let gave_up = error.kind() == ErrorKind::ReadOnlyFilesystem;
        return Ok(if gave_up && found == Content::Whole(1) {
            let free = BinaryBytes(room(dir.path())?);
            Outcome::differs(
                expected,
                format!(
                    "{found}; the driver goes read-only while the check fills the disk, and \
                     reports {free} free"
                ),
            )
        } else {
            Outcome::broken(
                expected,
                format!("{error} while the disk is filled; {found}"),
            )
        });
    }
    let mut stamp = 1;
    // What statvfs calls free is an estimate on some file systems.
    let error = loop {
        let ram = Stamped::new(stamp + 1, LARGE);
        if let Err(error) = fixture.target.full(&dest, &ram, LARGE, PAGE) {
            break error;
        }
        stamp += 1;
        if stamp > 100 {
            return Ok(Outcome::not_run("the file system could not be filled"));
        }
        weigh_down(&ballast, RAM)?;
    };
    let said = format!("{error:#}").replace(&dir.path().display().to_string(), "");
    let refused = kind_of(&error) == Some(ErrorKind::StorageFull);
    let (found, left) = (
        content(&dest, LARGE)?,
        names(dir.path(), &[DEST, "ballast"])?,
    );
    let old = found == Content::Whole(stamp);
    if let Err(error) = fs::remove_file(&ballast) {
        // The driver gave up, which no library can help. What it showed before counts.
        return Ok(if old && error.kind() == ErrorKind::ReadOnlyFilesystem {
            Outcome::differs(
                expected,
                format!(
                    "{said}; {found}; the file system is read-only afterwards; other files: {left:?}"
                ),
            )
        } else {
            Outcome::broken(expected, format!("{said}; {found}; {error}"))
        });
    }
    File::open(dir.path())?.sync_all()?;
    fixture
        .target
        .full(&dest, &Stamped::new(stamp + 1, LARGE), LARGE, PAGE)?;
    let again = content(&dest, LARGE)?;
    Ok(Outcome::promise(
        refused && old && left.is_empty() && again == Content::Whole(stamp + 1),
        expected,
        format!("{said}; {found}; other files: {left:?}; later {again}"),
    ))
}

/// Makes `ballast` so large that at most `most` bytes are free, and half of that at least, as far
/// as `statvfs` can be believed.
fn leave_room(dir: &Path, ballast: &Path, most: u64) -> io::Result<()> {
    loop {
        let room = room(dir)?;
        if room <= most {
            return Ok(());
        }
        // In few pieces: each is synced.
        if !weigh_down(ballast, ((room - most / 2) / 2).max(RAM))? {
            let file = File::options().write(true).open(ballast)?;
            file.set_len(file.metadata()?.len().saturating_sub(most / 2))?;
            return file.sync_all();
        }
    }
}

/// Adds `size` bytes to `path`, for good. False if there was no room for all of them.
fn weigh_down(path: &Path, size: u64) -> io::Result<bool> {
    static PIECE: [u8; 64 << 10] = [0; 64 << 10];
    let mut file = File::options().create(true).append(true).open(path)?;
    let mut write = || {
        let mut left = size;
        while left > 0 {
            let now = left.min(PIECE.len() as u64);
            file.write_all(&PIECE[..now as usize])?;
            left -= now;
        }
        file.sync_data()
    };
    match write() {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::StorageFull => Ok(false),
        Err(error) => Err(error),
    }
}

/// Bytes that the file system says are free.
#[allow(
    clippy::useless_conversion,
    reason = "the counts have 32 bits on macOS"
)]
fn room(dir: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(dir)?;
    Ok(u64::from(stat.blocks_available()) * u64::from(stat.fragment_size()))
}

#[cfg(target_os = "linux")]
fn read_only(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let dest = fixture.path(DEST);
    fixture
        .target
        .full(&dest, &Stamped::new(1, RAM), RAM, PAGE)?;
    let view = test_machine::ReadOnlyBind::of(&fixture.dir)?;
    let failed = fixture
        .target
        .full(&view.path().join(DEST), &Stamped::new(2, RAM), RAM, PAGE);
    drop(view);
    let (found, left) = (content(&dest, RAM)?, fixture.leftovers(&[DEST])?);
    let kind = failed.err().as_ref().and_then(kind_of);
    Ok(Outcome::promise(
        kind == Some(ErrorKind::ReadOnlyFilesystem)
            && found == Content::Whole(1)
            && left.is_empty(),
        "refused as read-only, the old file is complete",
        format!("{kind:?}; {found}; other files: {left:?}"),
    ))
}

#[cfg(not(target_os = "linux"))]
fn read_only(_: &Fixture) -> anyhow::Result<Outcome> {
    Ok(Outcome::not_run(
        "no read-only view of a directory can be mounted here",
    ))
}

fn process_limit(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let dest = fixture.path(DEST);
    fixture
        .target
        .full(&dest, &Stamped::new(1, RAM), RAM, PAGE)?;
    let child = Child::new(fixture.target, &dest, 2, RAM).largest_file(RAM / 2);
    let output = child.command(&[])?.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    let (found, left) = (content(&dest, RAM)?, fixture.leftovers(&[DEST])?);
    let refused = output.status.signal().is_none()
        && !output.status.success()
        && said.contains("RLIMIT_FSIZE");
    Ok(Outcome::promise(
        refused && found == Content::Whole(1) && left.is_empty(),
        "an error that names RLIMIT_FSIZE and no signal, the old file is complete",
        format!("{}; {found}; other files: {left:?}", output.status),
    ))
}

/// Tries huge files from the largest down, on the small file system: where there are no holes,
/// trying one fills it.
fn file_system_limit(fixture: &Fixture) -> anyhow::Result<Outcome> {
    // From the largest RAM that a file may hold.
    const SIZES: [u64; 5] = [1 << 52, 1 << 44, 1 << 40, 1 << 36, 1 << 33];
    let expected = "a file that is too large is refused with advice at open, and no file is left";
    let Some(small) = &fixture.small else {
        return Ok(Outcome::not_run(
            "no small file system of this kind is available",
        ));
    };
    let dir = tempfile::tempdir_in(small)?;
    let dest = dir.path().join(DEST);
    let mut refused = None;
    for size in SIZES {
        let opened = MemoryWriter::open(&dest, size, PAGE).map(drop);
        let left = names(dir.path(), &[])?;
        if !left.is_empty() {
            return Ok(Outcome::broken(expected, format!("left behind: {left:?}")));
        }
        match opened {
            Ok(()) => {
                let limit = refused.map_or("no limit below 4 PiB".into(), |at| {
                    format!("{} refused", BinaryBytes(at))
                });
                return Ok(Outcome::holds(
                    expected,
                    format!("{limit}, {} accepted", BinaryBytes(size)),
                ));
            }
            Err(error) => {
                let error = anyhow::Error::from(error);
                let kind = kind_of(&error);
                if !matches!(
                    kind,
                    Some(
                        ErrorKind::FileTooLarge | ErrorKind::StorageFull | ErrorKind::InvalidInput
                    )
                ) {
                    return Ok(Outcome::broken(
                        expected,
                        format!("{size} bytes: {error:#}"),
                    ));
                }
                refused = Some(size);
            }
        }
    }
    Ok(Outcome::holds(
        expected,
        format!(
            "{} and more refused, because the disk has no space for them",
            BinaryBytes(SIZES[SIZES.len() - 1])
        ),
    ))
}

fn name(fixture: &Fixture, name: &OsStr) -> anyhow::Result<Outcome> {
    let expected = "a snapshot of that name, and no other file";
    let dest = fixture.dir.join(name);
    let written = fixture.target.full(&dest, &Stamped::new(1, RAM), RAM, PAGE);
    let left = names(&fixture.dir, &[&*name.to_string_lossy()])?;
    Ok(match written {
        Ok(_) => {
            let found = content(&dest, RAM)?;
            match left.as_slice() {
                // The name leads there, and is listed as another.
                [other] if found == Content::Whole(1) && !other.starts_with('.') => {
                    Outcome::differs(expected, format!("{found}, but listed as {other:?}"))
                }
                _ => Outcome::promise(
                    found == Content::Whole(1) && left.is_empty(),
                    expected,
                    format!("{found}; other files: {left:?}"),
                ),
            }
        }
        Err(error) if left.is_empty() => {
            let cause = error.root_cause();
            Outcome::differs(expected, format!("refused, no file is left: {cause}"))
        }
        Err(error) => Outcome::broken(expected, format!("{error:#}; other files: {left:?}")),
    })
}

/// Unmounts the path while the staged file is open. All files are used by descriptor.
#[cfg(target_os = "linux")]
fn lazy_unmount(fixture: &Fixture) -> anyhow::Result<Outcome> {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};

    let point = tempfile::tempdir_in(&fixture.elsewhere)?;
    let none = None::<&str>;
    mount(
        Some(&fixture.dir),
        point.path(),
        none,
        MsFlags::MS_BIND,
        none,
    )?;
    let attempt = || -> anyhow::Result<()> {
        let options = MemoryWriter::options().allow_ambiguous_diff(true);
        let mut writer = options.open(point.path().join(DEST), RAM, PAGE)?;
        let dirty = dirty_bitmap::DirtyBitmap::new(0, RAM, PAGE)?;
        dirty.mark_range(0, RAM / 2)?;
        writer.write_diff(&Stamped::new(1, RAM), &dirty)?;
        umount2(point.path(), MntFlags::MNT_DETACH)?;
        writer.write_full(&Stamped::new(1, RAM))?;
        Ok(writer.commit()?)
    };
    let committed = attempt();
    let _ = umount2(point.path(), MntFlags::MNT_DETACH);
    let (found, left) = (
        content(&fixture.path(DEST), RAM)?,
        fixture.leftovers(&[DEST])?,
    );
    Ok(Outcome::promise(
        committed.is_ok() && found == Content::Whole(1) && left.is_empty(),
        "the commit succeeds, because the writer holds descriptors",
        match committed {
            Ok(()) => format!("{found}; other files: {left:?}"),
            Err(error) => format!("{error:#}; {found}; other files: {left:?}"),
        },
    ))
}

#[cfg(not(target_os = "linux"))]
fn lazy_unmount(_: &Fixture) -> anyhow::Result<Outcome> {
    Ok(Outcome::not_run(
        "no second view of a directory can be mounted here",
    ))
}
