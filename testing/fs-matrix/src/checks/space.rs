//! What the file takes, and whether the library's probe says the same as a measurement that shares
//! no code with it.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::Context;
use dirty_bitmap::DirtyBitmap;
use indicatif::BinaryBytes;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use scenarios::ram::{Stamped, Zeros, first_difference};
use sparse_file::{Capabilities, HoleSupport, Punch, SeekHole, SpaceError, punch_hole};

use super::Check;
use crate::finding::Family::Space;
use crate::finding::Outcome;
use crate::fixture::Fixture;

pub(super) const CHECKS: &[Check] = &[
    Check::new(Space, "length with trailing clean pages", logical_extent),
    Check::new(Space, "allocated bytes", allocated),
    Check::new(Space, "SEEK_DATA and SEEK_HOLE", seek),
    Check::new(Space, "punching", punching),
    Check::new(Space, "direct I/O", direct_io),
    Check::new(Space, "probe reports what was measured", probe_agrees),
];

const PAGE: u64 = 16 << 10;
const RAM: u64 = 32 << 20;
/// One page every 4 MiB, none of them the last.
const DIRTY: [u64; 8] = [0, 4, 8, 12, 16, 20, 24, 28];

fn sparse_diff(fixture: &Fixture) -> anyhow::Result<File> {
    let dirty = DirtyBitmap::new(0, RAM, PAGE)?;
    for mebibyte in DIRTY {
        dirty.mark(mebibyte << 20)?;
    }
    let dest = fixture.path("sparse.mem");
    fixture
        .target
        .diff(&dest, &Stamped::new(1, RAM), &dirty, PAGE)?;
    let file = File::options().read(true).write(true).open(dest)?;
    // Delayed allocation counts only then, and the commit's own sync may have been of another open
    // file.
    file.sync_all()?;
    Ok(file)
}

fn logical_extent(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let size = sparse_diff(fixture)?.metadata()?.len();
    Ok(Outcome::promise(
        size == RAM,
        format!("{RAM} bytes, trailing clean pages included"),
        format!("{size} bytes"),
    ))
}

fn allocated(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let written = DIRTY.len() as u64 * PAGE;
    let allocated = sparse_diff(fixture)?.metadata()?.blocks() * 512;
    let seen = match allocated {
        0 => "0: the driver does not report it".into(),
        dense if dense >= RAM => format!(
            "{}: dense, all of the {} file",
            BinaryBytes(dense),
            BinaryBytes(RAM)
        ),
        some => BinaryBytes(some).to_string(),
    };
    Ok(Outcome::property(
        (written..=2 * written).contains(&allocated),
        format!("about the {} that were written", BinaryBytes(written)),
        seen,
    ))
}

/// How the file's data and holes are listed by bare `lseek`.
#[derive(Debug, PartialEq, Eq)]
enum Seek {
    Exact,
    AllData,
    Unsupported,
    /// Written bytes are in what it calls a hole.
    Lies(u64),
    Coarse,
}

fn seek_says(file: &File) -> anyhow::Result<Seek> {
    let mut data = Vec::new();
    let mut at = 0;
    loop {
        let start = match lseek(file, at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => break,
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Seek::Unsupported),
            Err(error) => return Err(error).context("SEEK_DATA"),
        };
        at = lseek(file, start, Whence::SeekHole).context("SEEK_HOLE")?;
        data.push(start as u64..at as u64);
    }
    let pages = DIRTY.map(|mebibyte| (mebibyte << 20)..(mebibyte << 20) + PAGE);
    if let Some(lost) = pages.iter().find(|page| {
        !data
            .iter()
            .any(|data| data.start <= page.start && page.end <= data.end)
    }) {
        return Ok(Seek::Lies(lost.start));
    }
    if data == pages {
        return Ok(Seek::Exact);
    }
    Ok(if data == [0..RAM] {
        Seek::AllData
    } else {
        Seek::Coarse
    })
}

fn seek(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let says = seek_says(&sparse_diff(fixture)?)?;
    let seen = match says {
        Seek::Exact => "exactly those".into(),
        Seek::AllData => "everything is data".into(),
        Seek::Unsupported => "no such call".into(),
        Seek::Lies(at) => format!("the page at {at} was written and is reported as a hole"),
        Seek::Coarse => "those pages and others".into(),
    };
    Ok(Outcome::property(
        says == Seek::Exact,
        format!("the {} pages that were written are data", DIRTY.len()),
        seen,
    ))
}

fn punching(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let expected = "the page reads as zeros and its space is free";
    let file = sparse_diff(fixture)?;
    let before = file.metadata()?.blocks();
    let page = 4 << 20..(4 << 20) + PAGE;
    let neighbors = |file: &File| -> anyhow::Result<bool> {
        let ram = Stamped::new(1, RAM);
        let others = [0..PAGE, 8 << 20..(8 << 20) + PAGE];
        Ok(others
            .into_iter()
            .map(|range| first_difference(file, range, &ram))
            .collect::<Result<Vec<_>, _>>()?
            .iter()
            .all(Option::is_none))
    };
    match punch_hole(&file, page.clone()) {
        Err(SpaceError::Unsupported { .. }) => {
            let kept = first_difference(&file, page, &Stamped::new(1, RAM))?.is_none();
            Ok(if kept && neighbors(&file)? {
                Outcome::differs(expected, "not supported; the bytes are unchanged")
            } else {
                Outcome::broken(expected, "refused, and the bytes changed")
            })
        }
        Err(error) => Err(error.into()),
        Ok(()) if first_difference(&file, page, &Zeros)?.is_some() || !neighbors(&file)? => {
            Ok(Outcome::broken(expected, "wrong bytes after punching"))
        }
        Ok(()) => {
            file.sync_all()?;
            let freed = before.saturating_sub(file.metadata()?.blocks()) * 512;
            Ok(Outcome::property(
                freed >= PAGE,
                expected,
                format!("zeros, {freed} bytes freed"),
            ))
        }
    }
}

/// Whether 64 KiB at `offset_align` from a buffer at `memory_align` go out and come back, by bare
/// calls on a file opened for it.
fn direct_works(dir: &Path, memory_align: usize, offset_align: usize) -> anyhow::Result<bool> {
    const LEN: usize = 64 << 10;
    let path = dir.join("direct");
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(target_os = "linux")]
    options.custom_flags(nix::libc::O_DIRECT);
    #[cfg(not(target_os = "linux"))]
    options.custom_flags(0);
    let file = match options.open(&path) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let mut memory = vec![0_u8; LEN * 3];
    let base = memory.as_ptr().align_offset(LEN) + memory_align % LEN;
    let buffer = &mut memory[base..base + LEN];
    buffer.copy_from_slice(&Stamped::new(9, 1 << 20).bytes(0..LEN as u64));
    let refused = |error: &std::io::Error| {
        matches!(
            error.raw_os_error().map(Errno::from_raw),
            Some(Errno::EINVAL | Errno::EOPNOTSUPP)
        )
    };
    match file.write_at(buffer, offset_align as u64) {
        Ok(LEN) => {}
        Ok(_) => return Ok(false),
        Err(error) if refused(&error) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    buffer.fill(0);
    match file.read_at(buffer, offset_align as u64) {
        Ok(LEN) => Ok(buffer == Stamped::new(9, 1 << 20).bytes(0..LEN as u64)),
        Ok(_) => Ok(false),
        Err(error) if refused(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn direct_io(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let expected = "direct I/O, at the alignment that the probe reports";
    let Some(direct) = Capabilities::probe(&fixture.dir)?.direct_io else {
        let works = direct_works(&fixture.dir, 64 << 10, 64 << 10)?;
        return Ok(if works && cfg!(target_os = "linux") {
            Outcome::broken(expected, "works at 64 KiB, but the probe reports none")
        } else {
            Outcome::differs(expected, "none, as the probe reports")
        });
    };
    let (memory, offset) = (direct.memory_align, direct.offset_align);
    let works = direct_works(&fixture.dir, memory, offset)?;
    Ok(Outcome::promise(
        works,
        expected,
        format!(
            "{} at {memory}/{offset} bytes (memory/offset, {:?})",
            if works { "works" } else { "fails" },
            direct.basis
        ),
    ))
}

fn probe_agrees(fixture: &Fixture) -> anyhow::Result<Outcome> {
    let expected = "holes, SEEK_HOLE and punching as measured";
    let probe = Capabilities::probe(&fixture.dir)?;
    let file = sparse_diff(fixture)?;
    let seek = seek_says(&file)?;
    let allocated = file.metadata()?.blocks() * 512;
    let punched = punch_hole(&file, 0..PAGE);
    let holes_agree = match probe.holes {
        HoleSupport::Sparse => allocated < RAM / 2,
        HoleSupport::Dense => allocated >= RAM,
        _ => allocated < DIRTY.len() as u64 * PAGE,
    };
    let seek_agrees = match probe.seek_hole {
        SeekHole::Exact { granularity } => {
            seek == Seek::Exact || (seek == Seek::Coarse && granularity > PAGE)
        }
        SeekHole::AllData => seek == Seek::AllData,
        SeekHole::Unsupported => seek == Seek::Unsupported,
        SeekHole::Unreliable => matches!(seek, Seek::Lies(_)),
        _ => false,
    };
    let punch_agrees = match probe.punch {
        Punch::Unsupported => matches!(punched, Err(SpaceError::Unsupported { .. })),
        _ => punched.is_ok(),
    };
    let disagree: Vec<_> = [
        (holes_agree, format!("{allocated} bytes allocated")),
        (seek_agrees, format!("SEEK_HOLE: {seek:?}")),
        (punch_agrees, format!("punching: {punched:?}")),
    ]
    .into_iter()
    .filter_map(|(agrees, measured)| (!agrees).then_some(measured))
    .collect();
    Ok(if disagree.is_empty() {
        Outcome::holds(expected, probe.to_string())
    } else {
        Outcome::broken(expected, format!("{probe}; but {}", disagree.join(", ")))
    })
}
