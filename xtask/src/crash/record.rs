//! A scenario carried out on a mounted disk whose every write and flush is logged.
//!
//! The disk is an image behind `qemu-storage-daemon`'s `blklogwrites`, exported through FUSE as a file, and a loop device over that file. The
//! device is buffered: with direct I/O this exporter garbled what it logged. Behind the end of the file system the
//! disk has room for marks, written through the same export: what the log has before a mark was given to the disk before.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use nix::mount::{MntFlags, umount2};
use sparse_file::{Kind, extents};

use super::disk::{FileSystem, Loop, Mounted};
use super::scenarios::Scenario;
use super::states::{Log, MARKS};
use crate::interrupt::Interrupt;
use crate::linux_guest::escaped;
use crate::process::Process;
use crate::write_log;

/// The directories that a scenario is carried out in, one after the other: nobody else syncs anything; and a neighbour syncs all the time,
/// so that names may get to the disk at any moment.
pub const PHASES: [&str; 2] = ["alone", "in-company"];

/// The kernel writes out by itself what is not synced: ext4's journal after 5 s. Waited for, so that it happens in the log.
const SETTLED: Duration = Duration::from_millis(6500);
/// Between two syncs of the neighbour's.
const NEIGHBOUR: Duration = Duration::from_millis(7);
/// The name of the log, which stays in the room.
pub const LOG: &str = "log";
/// In which the daemon exports the disk.
const PATIENCE: Duration = Duration::from_secs(120);

/// Of a base that is kept or left out as zeros.
const PIECE: usize = 64 << 10;

/// What a scenario did to a disk.
pub struct Recording {
    pub base: Base,
    pub log: Log,
}

/// The disk as it was before: its size, and what is not zero.
pub struct Base {
    pub size: u64,
    runs: Vec<(u64, Vec<u8>)>,
}

impl Base {
    pub fn of(image: &Path) -> anyhow::Result<Self> {
        let file = File::open(image)?;
        let size = file.metadata()?.len();
        let mut runs = Vec::new();
        for extent in extents(&file)? {
            let extent = extent?;
            if extent.kind == Kind::Hole {
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
    pub fn write_to(&self, image: &File) -> io::Result<()> {
        for (offset, bytes) in &self.runs {
            image.write_all_at(bytes, *offset)?;
        }
        Ok(())
    }
}

/// Carries `scenario` out on a new file system, with files of its own in `room`.
pub fn record(
    fs: FileSystem,
    scenario: &Scenario,
    room: &Path,
    interrupt: &Interrupt,
) -> anyhow::Result<Recording> {
    let (image, point) = (room.join("disk.img"), room.join("recorded"));
    fs::create_dir(&point)?;
    File::create(&image)?.set_len(fs.size() + MARKS)?;
    prepare(fs, scenario, &image, &point)?;
    let base = Base::of(&image)?;

    let disk = LoggedDisk::start(&image, room, interrupt)?;
    let device = Loop::over(&disk.export, fs.size())?;
    let mounted = Mounted::new(fs, &device, &point)?;
    let export = File::options().write(true).open(&disk.export)?;
    for (phase, dir) in (0..).zip(PHASES) {
        let dir = point.join(dir);
        let returned = || Ok(export.write_all_at(&[phase; 4096], fs.size())?);
        if phase == 0 {
            (scenario.act)(&dir, &returned)?;
            wait(SETTLED, interrupt)?;
        } else {
            with_neighbour(&point, || (scenario.act)(&dir, &returned))?;
        }
    }
    mounted.unmount()?;
    drop((device, export));
    let log = disk.end()?;
    let entries = write_log::read(&File::open(&log)?)?;
    fs::remove_file(&image)?;
    Ok(Recording {
        base,
        log: Log::new(entries, fs.size()),
    })
}

fn prepare(fs: FileSystem, scenario: &Scenario, image: &Path, point: &Path) -> anyhow::Result<()> {
    let device = Loop::over(image, fs.size())?;
    fs.make(&device)?;
    let mounted = Mounted::new(fs, &device, point)?;
    for dir in PHASES {
        let dir = mounted.dir().join(dir);
        fs::create_dir(&dir)?;
        (scenario.prepare)(&dir)?;
    }
    mounted.unmount()
}

fn wait(time: Duration, interrupt: &Interrupt) -> anyhow::Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        interrupt.check()?;
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Does `act` while another thread writes and syncs a file of its own, until once after the end.
fn with_neighbour(point: &Path, act: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let file = File::create(point.join("neighbour"))?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let neighbour = scope.spawn(|| -> io::Result<()> {
            for n in 0_u64.. {
                let last = over.load(Ordering::Relaxed);
                file.write_all_at(&n.to_le_bytes(), 0)?;
                file.sync_all()?;
                if last {
                    break;
                }
                thread::sleep(NEIGHBOUR);
            }
            Ok(())
        });
        let done = act();
        over.store(true, Ordering::Relaxed);
        let neighbour = neighbour.join();
        done?;
        Ok(neighbour.expect("no panic")?)
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
        let disk = Self {
            daemon: Process::start(command, interrupt)?,
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
