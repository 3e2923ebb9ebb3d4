//! A Linux guest in QEMU whose RAM is a file: booted, paused, its devices saved, brought back.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use harness::interrupt::Interrupt;
use harness::packages::Package;
use harness::process::Process;
use linux_guest::archive::Archive;
use linux_guest::debian::{download, only_entry_with, unpack_package};
use linux_guest::qemu;
use serde_json::json;
use xshell::Shell;

use super::console::{Console, Fault, Place};
use super::qmp::Qmp;

/// What this machine needs to run guests.
pub(super) const PACKAGES: &[Package] = &[
    Package::new("qemu-system-x86", "qemu-system-x86_64"),
    Package::new("gdb", "gdb"),
    Package::new("python3-drgn", "drgn"),
];

/// What is unpacked and not installed. This kernel has all that the guest needs built in.
const UNPACKED: [&str; 2] = ["linux-image-cloud-amd64", "busybox-static"];

/// Changes whenever what is unpacked does.
const EDITION: &str = "1";

/// The guest's RAM in bytes, and as an option of QEMU's.
pub(super) const RAM: u64 = 256 << 20;
const RAM_OPTION: &str = "256M";

/// The longest that a guest may take for a round, booting before included, or to save its devices.
/// A boot takes 4 s on an idle machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(240);

/// What guests are made of.
pub(super) struct Kit {
    kernel: PathBuf,
    busybox: PathBuf,
    /// Linux's release.
    pub release: String,
}

impl Kit {
    /// Takes what an earlier run unpacked under `dir`, or downloads and unpacks it. `may_download`
    /// or fail.
    pub(super) fn prepare(sh: &Shell, dir: &Path, may_download: bool) -> anyhow::Result<Self> {
        if !cfg!(target_arch = "x86_64") {
            bail!(
                "the guest is made of this machine's Debian, for x86-64: this machine is another"
            );
        }
        fs::create_dir_all(dir).with_context(|| format!("can't make {}", dir.display()))?;
        // Until this function ends, or this process does.
        let lock = File::create(dir.join("lock"))?;
        lock.lock()?;
        let (ready, tree) = (dir.join("ready"), dir.join("tree"));
        if fs::read_to_string(&ready).ok().as_deref() != Some(EDITION) {
            if !may_download {
                bail!(
                    "the guest's kernel is not under {} yet, and --no-install forbids downloading it",
                    dir.display()
                );
            }
            println!("downloading Debian's kernel and busybox for the guest");
            for stale in ["tree", "packages", "lists", "sources"] {
                let _ = fs::remove_dir_all(dir.join(stale));
            }
            fs::create_dir_all(&tree)?;
            download(sh, dir, &UNPACKED)?;
            let packages = dir.join("packages");
            for prefix in ["linux-image-6", "busybox-static_"] {
                let name = only_entry_with(&packages, prefix)?;
                unpack_package(sh, &packages.join(name), &tree)?;
            }
            fs::write(&ready, EDITION)?;
        }
        let boot = tree.join("boot");
        let image = only_entry_with(&boot, "vmlinuz-")?;
        Ok(Self {
            release: image.trim_start_matches("vmlinuz-").to_owned(),
            kernel: boot.join(image),
            busybox: tree.join("bin/busybox"),
        })
    }

    /// Writes what the kernel unpacks into its root, and runs.
    fn write_initramfs(&self, path: &Path) -> anyhow::Result<()> {
        let mut archive = Archive::new(File::create(path)?);
        for dir in ["bin", "dev", "work"] {
            archive.directory(dir)?;
        }
        archive.program("bin/busybox", &fs::read(&self.busybox)?)?;
        archive.program("init", include_bytes!("init.sh"))?;
        archive.finish()?;
        Ok(())
    }
}

/// The room that guests run in.
pub(super) struct Room<'a> {
    pub kit: &'a Kit,
    /// Where all their files are, and the working directory of QEMU: names in its options are those
    /// of files here.
    pub dir: &'a Path,
    pub interrupt: &'a Interrupt,
}

impl Room<'_> {
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Boots a guest with an empty RAM file called `ram`.
    pub(super) fn boot(&self, ram: &str) -> anyhow::Result<Guest> {
        self.kit.write_initramfs(&self.file("initramfs"))?;
        self.start(ram, &[], Place::default())
    }

    /// Starts another QEMU that goes on with what is in the files `ram` and `devices`, on the
    /// console at `place`.
    pub(super) fn bring_back(
        &self,
        ram: &str,
        devices: &str,
        place: Place,
    ) -> anyhow::Result<Guest> {
        let mut guest = self.start(ram, &["-incoming", "defer"], place)?;
        let uri = format!("exec:cat {devices}");
        guest.qmp.execute("migrate-incoming", json!({"uri": uri}))?;
        guest.migrated()?;
        guest.go_on()?;
        Ok(guest)
    }

    fn start(&self, ram: &str, more: &[&str], place: Place) -> anyhow::Result<Guest> {
        let (ours, theirs) = UnixStream::pair()?;
        let memory = format!("memory-backend-file,id=m,size={RAM_OPTION},mem-path={ram},share=on");
        let mut qemu = qemu(2);
        qemu.current_dir(self.dir)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .args(["-machine", "pc,memory-backend=m", "-m", RAM_OPTION])
            .args(["-object", &memory])
            .args(["-chardev", "socket,id=qmp,fd=0"])
            .args(["-mon", "chardev=qmp,mode=control"])
            .args(["-serial", "file:/dev/stdout"])
            .arg("-kernel")
            .arg(&self.kit.kernel)
            .args(["-initrd", "initramfs", "-append"])
            .arg("console=ttyS0 quiet panic=-1 oops=panic mitigations=off no_timer_check")
            .args(more);
        let process = Process::start(qemu, self.interrupt)?;
        let mut guest = Guest {
            process,
            qmp: Qmp::greet(ours, self.interrupt)?,
            console: Console::new(&self.file(&format!("{ram}.console")), place)?,
            interrupt: self.interrupt.clone(),
        };
        // The RAM stays where it is, in its file.
        guest.set_capability("x-ignore-shared", true)?;
        Ok(guest)
    }
}

/// A QEMU with a guest in it. Dropped, it is killed.
pub(super) struct Guest {
    process: Process,
    pub qmp: Qmp,
    console: Console,
    interrupt: Interrupt,
}

impl Guest {
    /// Stops the CPUs: until [`go_on`](Self::go_on), nothing writes to the RAM.
    pub(super) fn pause(&mut self) -> anyhow::Result<()> {
        self.qmp.execute("stop", json!({})).map(drop)
    }

    pub(super) fn go_on(&mut self) -> anyhow::Result<()> {
        self.qmp.execute("cont", json!({})).map(drop)
    }

    /// Writes the state of CPUs and devices of a paused guest to a file of this name.
    pub(super) fn save_devices(&mut self, name: &str) -> anyhow::Result<()> {
        let uri = format!("exec:cat >{name}");
        self.qmp.execute("migrate", json!({"uri": uri}))?;
        self.migrated()
    }

    fn set_capability(&mut self, name: &str, state: bool) -> anyhow::Result<()> {
        let capabilities = json!([{"capability": name, "state": state}]);
        let arguments = json!({"capabilities": capabilities});
        self.qmp
            .execute("migrate-set-capabilities", arguments)
            .map(drop)
    }

    /// Writes RAM and devices of a paused guest to a file of this name, with `mapped-ram`.
    pub(super) fn save_mapped(&mut self, name: &str) -> anyhow::Result<()> {
        self.set_capability("mapped-ram", true)?;
        self.set_capability("x-ignore-shared", false)?;
        // A guest that was migrated before must have run since.
        self.go_on()?;
        self.pause()?;
        self.qmp
            .execute("migrate", json!({"uri": format!("file:{name}")}))?;
        self.migrated()?;
        self.set_capability("mapped-ram", false)?;
        self.set_capability("x-ignore-shared", true)
    }

    /// Waits until the devices are saved, or brought back.
    fn migrated(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.qmp.execute("query-migrate", json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU's migration failed: {answer}"),
                _ if Instant::now() >= deadline => {
                    bail!(
                        "QEMU's migration takes more than {} s: {answer}",
                        PATIENCE.as_secs()
                    )
                }
                _ => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Watches it for `rounds` rounds, each of which may take as long as `within`: the last one's
    /// number, or what is wrong with it.
    pub(super) fn watch(
        &mut self,
        rounds: u64,
        within: Duration,
    ) -> anyhow::Result<Result<u64, Fault>> {
        let mut left = rounds;
        let mut deadline = Instant::now() + within;
        while left > 0 {
            let wait = deadline.saturating_duration_since(Instant::now());
            let piece = match self.process.next(wait) {
                Ok(Some(piece)) => piece,
                Ok(None) => return Ok(Err(Fault::Ended)),
                Err(error) => {
                    self.interrupt.check()?;
                    if Instant::now() < deadline {
                        return Err(error);
                    }
                    return Ok(Err(Fault::Silent(within)));
                }
            };
            match self.console.take(&piece)? {
                Ok(None) => {}
                Ok(Some(_)) => {
                    left -= 1;
                    deadline = Instant::now() + within;
                }
                Err(fault) => return Ok(Err(fault)),
            }
        }
        Ok(Ok(self.round()))
    }

    /// As [`watch`](Self::watch) of a guest that nothing may be wrong with.
    pub(super) fn work(&mut self, rounds: u64) -> anyhow::Result<u64> {
        let fault = match self.watch(rounds, PATIENCE)? {
            Ok(round) => return Ok(round),
            Err(fault) => fault,
        };
        bail!(
            "the guest does not work: {fault}; the console's last lines: {}",
            self.console.tail()
        )
    }

    /// The last round that it was heard to end.
    pub(super) fn round(&self) -> u64 {
        self.console.place().round
    }

    /// Kills the guest, and returns the last round on its console.
    pub(super) fn kill(mut self) -> anyhow::Result<Place> {
        self.process.kill();
        while let Some(piece) = self.process.next(PATIENCE)? {
            if let Err(fault) = self.console.take(&piece)? {
                bail!("the guest does not work: {fault}");
            }
        }
        Ok(self.console.place())
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_not_downloaded_where_that_is_forbidden() {
        let dir = tempfile::tempdir().expect("a directory");
        let sh = Shell::new().expect("a shell");
        let error = Kit::prepare(&sh, dir.path(), false).err();
        let error = error.expect("no kernel").to_string();
        assert!(error.contains("--no-install forbids"), "{error}");
    }
}
