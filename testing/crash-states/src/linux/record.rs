//! Runs a scenario on a mounted disk, and logs every write and flush of the disk.
//!
//! The disk is an image behind `qemu-storage-daemon`'s `blklogwrites`, exported through FUSE as a
//! file, and a loop device over that file. The device is buffered: with direct I/O, this exporter
//! corrupted its log. After the end of the file system, the disk has space for marks, which are
//! written through the same export. All entries of the log before a mark were made before it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use file_systems::{FileSystem, Journal, LoopDevice};
use harness::interrupt::Interrupt;
use harness::process::Process;
use linux_guest::escaped;
use nix::mount::{MntFlags, umount2};
use scenarios::start;
use scenarios::write_log;
use scenarios::{CommitObserver, Scenario};
use sparse_file::{ExtentKind, extents};

use super::disk::{Mounted, disk};
use super::states::{Log, MARKS, PHASES, STEP};

/// The journal interval for changes that a scenario leaves without a sync. It is short because the
/// check waits for the commit of the journal.
const SOON: Journal = Journal::CommittedAfter(1);
/// The journal interval for mutants. It is long, so that a missing sync is found before the kernel
/// commits the journal.
const NOT_YET: Journal = Journal::CommittedAfter(300);
/// The pause between two syncs of the neighbor.
const NEIGHBOR: Duration = Duration::from_millis(7);
/// The name of the log, which stays in the room.
pub(super) const LOG: &str = "log";
/// In which the daemon exports the disk, and the kernel commits its journal.
const PATIENCE: Duration = Duration::from_secs(120);

/// Of a base that is kept or left out as zeros.
const PIECE: usize = 64 << 10;

/// What a scenario did to a disk.
pub(super) struct Recording {
    pub base: Base,
    pub log: Log,
}

/// The disk as it was before: its size, and what is not zero.
pub(super) struct Base {
    pub size: u64,
    runs: Vec<(u64, Vec<u8>)>,
}

impl Base {
    pub(super) fn of(image: &Path) -> anyhow::Result<Self> {
        let file = File::open(image)?;
        let size = file.metadata()?.len();
        let mut runs = Vec::new();
        for extent in extents(&file)? {
            let extent = extent?;
            if extent.kind == ExtentKind::Hole {
                continue;
            }
            for offset in extent.range.clone().step_by(PIECE) {
                let end = extent.range.end.min(offset + PIECE as u64);
                let mut bytes = vec![0; usize::try_from(end - offset)?];
                file.read_exact_at(&mut bytes, offset)?;
                // Logs and tables of inodes are written as zeros.
                if bytes.iter().any(|byte| *byte != 0) {
                    runs.push((offset, bytes));
                }
            }
        }
        Ok(Self { size, runs })
    }

    /// Into a file of this size that is all zeros.
    pub(super) fn write_to(&self, image: &File) -> io::Result<()> {
        for (offset, bytes) in &self.runs {
            image.write_all_at(bytes, *offset)?;
        }
        Ok(())
    }
}

/// Carries `scenario` out on a new file system, with files of its own in `room`. That of a `mutant`
/// is unmounted at once.
pub(super) fn record(
    fs: &'static FileSystem,
    scenario: &Scenario,
    mutant: bool,
    room: &Path,
    interrupt: &Interrupt,
) -> anyhow::Result<Recording> {
    let on = disk(fs)?;
    let (image, point) = (room.join("disk.img"), room.join("recorded"));
    fs::create_dir(&point)?;
    File::create(&image)?.set_len(on.min_size + MARKS)?;
    prepare(fs, scenario, &image, &point)?;
    let base = Base::of(&image)?;

    let log = LoggedDisk::start(&image, room, interrupt)?;
    let device = LoopDevice::over(&log.export, Some(on.min_size))?;
    let journal = if mutant { NOT_YET } else { SOON };
    let mounted = Mounted::with(fs, journal, &device, &point)?;
    let export = File::options().write(true).open(&log.export)?;
    let marks = Marks {
        export: &export,
        at: on.min_size,
    };
    let [alone, in_company] = PHASES.map(|dir| point.join(dir));
    (scenario.act)(&alone, &Alone(marks))?;
    if !mutant && on.commits_by_itself {
        settle(&device, &point, interrupt)?;
    }
    with_neighbor(&point, |syncs| {
        let observer = InCompany {
            marks,
            syncs,
            interrupt,
        };
        (scenario.act)(&in_company, &observer)
    })?;
    mounted.unmount()?;
    drop((device, export));
    let log = log.end()?;
    let entries = write_log::read(&File::open(&log)?)?;
    fs::remove_file(&image)?;
    Ok(Recording {
        base,
        log: Log::new(entries, on.min_size),
    })
}

/// Writes marks to the log.
#[derive(Clone, Copy)]
struct Marks<'a> {
    export: &'a File,
    at: u64,
}

impl Marks<'_> {
    fn write(&self, mark: u8) -> anyhow::Result<()> {
        Ok(self.export.write_all_at(&[mark; 4096], self.at)?)
    }
}

struct Alone<'a>(Marks<'a>);

impl CommitObserver for Alone<'_> {
    fn returned(&self) -> anyhow::Result<()> {
        self.0.write(0)
    }

    fn between(&self) -> anyhow::Result<()> {
        self.0.write(STEP)
    }
}

struct InCompany<'a> {
    marks: Marks<'a>,
    /// How often the neighbor has synced.
    syncs: &'a AtomicU64,
    interrupt: &'a Interrupt,
}

impl CommitObserver for InCompany<'_> {
    fn returned(&self) -> anyhow::Result<()> {
        self.marks.write(1)
    }

    /// The neighbor syncs in between: the second sync from now on began after the step.
    fn between(&self) -> anyhow::Result<()> {
        let syncs = || self.syncs.load(Ordering::Relaxed);
        let end = syncs().saturating_add(2);
        while syncs() < end {
            self.interrupt.check()?;
            thread::sleep(Duration::from_millis(1));
        }
        self.marks.write(STEP)
    }
}

fn prepare(
    fs: &'static FileSystem,
    scenario: &Scenario,
    image: &Path,
    point: &Path,
) -> anyhow::Result<()> {
    let on = disk(fs)?;
    let device = LoopDevice::over(image, Some(on.min_size))?;
    // Nothing that the driver would do later, of itself.
    on.make(&device, true)?;
    let mounted = Mounted::new(fs, &device, point)?;
    for dir in PHASES {
        let dir = mounted.dir().join(dir);
        fs::create_dir(&dir)?;
        (scenario.prepare)(&dir)?;
    }
    mounted.unmount()
}

/// Waits until the kernel has committed the journal of ext4 by itself, so that it happens in the
/// log.
fn settle(device: &LoopDevice, point: &Path, interrupt: &Interrupt) -> anyhow::Result<()> {
    let info = format!("/proc/fs/jbd2/{}-8/info", device.name());
    let commits = || -> anyhow::Result<u64> {
        let text = fs::read_to_string(&info).with_context(|| info.clone())?;
        let count = text.split(' ').next().and_then(|count| count.parse().ok());
        count.with_context(|| format!("{info}: {text:?}"))
    };
    let (before, start) = (commits()?, Instant::now());
    // Also where the scenario did nothing, there is something to commit.
    File::create(point.join("settled"))?;
    while commits()? == before {
        interrupt.check()?;
        if start.elapsed() > PATIENCE {
            bail!("the kernel does not commit the journal");
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Does `act` while another thread writes and syncs a file of its own, until once after the end.
/// `act` is given how often it has synced.
fn with_neighbor(
    point: &Path,
    act: impl FnOnce(&AtomicU64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let file = File::create(point.join("neighbor"))?;
    let (over, syncs) = (AtomicBool::new(false), AtomicU64::new(0));
    let sync = || -> io::Result<()> {
        for n in 0_u64.. {
            let last = over.load(Ordering::Relaxed);
            file.write_all_at(&n.to_le_bytes(), 0)?;
            file.sync_all()?;
            syncs.fetch_add(1, Ordering::Relaxed);
            if last {
                break;
            }
            thread::sleep(NEIGHBOR);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let neighbor = scope.spawn(|| {
            let synced = sync();
            // No thread waits for another sync.
            syncs.store(u64::MAX, Ordering::Relaxed);
            synced
        });
        let done = act(&syncs);
        over.store(true, Ordering::Relaxed);
        let neighbor = neighbor.join();
        done?;
        Ok(neighbor.expect("no panic")?)
    })
}

/// The daemon that logs, and the file that is the disk.
struct LoggedDisk {
    daemon: Process,
    export: PathBuf,
    log: PathBuf,
}

impl LoggedDisk {
    fn start(image: &Path, room: &Path, interrupt: &Interrupt) -> anyhow::Result<Self> {
        let (export, log) = (room.join("export"), room.join(LOG));
        File::create(&export)?;
        // As large as it may get; a hole until written.
        File::create(&log)?.set_len(1 << 30)?;
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "qemu-storage-daemon"])
            .args(["--blockdev", &file("image", image)])
            .args(["--blockdev", &file("log", &log)])
            // Counts each entry when it is written: the log's writer will be killed.
            .args([
                "--blockdev",
                "driver=blklogwrites,node-name=disk,file=image,log=log,log-super-update-interval=1",
            ])
            .arg("--export")
            .arg(format!(
                "type=fuse,id=disk,node-name=disk,writable=on,mountpoint={}",
                escaped(&export)
            ))
            .stdin(Stdio::null());
        let starting = start::one();
        let daemon = Process::start(command, interrupt)?;
        drop(starting);
        let disk = Self {
            daemon,
            export,
            log,
        };
        let (size, start) = (image.metadata()?.len(), Instant::now());
        while disk.export.metadata()?.len() != size {
            interrupt.check()?;
            if start.elapsed() > PATIENCE {
                bail!("qemu-storage-daemon exports nothing through FUSE");
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(disk)
    }

    /// The log, complete.
    fn end(self) -> anyhow::Result<PathBuf> {
        Ok(self.log.clone())
    }
}

impl Drop for LoggedDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.export, MntFlags::MNT_DETACH);
        self.daemon.kill();
    }
}

fn file(node: &str, path: &Path) -> String {
    format!(
        "driver=file,node-name={node},filename={},cache.no-flush=on",
        escaped(path)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_has_all_that_is_not_zero_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, copy) = (dir.path().join("disk"), dir.path().join("copy"));
        let file = File::create(&path).expect("a file");
        file.set_len(1 << 20).expect("grown");
        file.write_all_at(&[0; 256 << 10], 0).expect("written");
        file.write_all_at(b"superblock", 1024).expect("written");
        // The last piece is a short one.
        file.write_all_at(b"end", (1 << 20) - 3).expect("written");
        let base = Base::of(&path).expect("read");
        let kept: usize = base.runs.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!((13..256 << 10).contains(&kept), "{kept}");
        let made = File::create(&copy).expect("a file");
        made.set_len(base.size).expect("grown");
        base.write_to(&made).expect("written");
        assert_eq!(fs::read(copy).expect("read"), fs::read(path).expect("read"));
    }
}
