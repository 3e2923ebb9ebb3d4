//! In the guest: makes the file system, mounts it, and checks it.

use std::fs::{self, File};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use file_systems::{Disk, FileSystem, InGuest, Storage};
use harness::file_systems::parser;
use scenarios::target::{Mutant, Target};

use super::PORT;
use crate::checks;
use crate::finding::Line;
use crate::fixture::Fixture;
use crate::kind::Kind;
use crate::nfs::{self, Server, run};
use crate::proxy::Proxy;

/// The modules of the client and the server of NFS.
pub(super) const NFS_MODULES: [&str; 4] = ["nfsd", "nfs", "nfsv3", "nfsv4"];

/// A module that libcrc32c needs, although no module lists it as a dependency.
pub(super) const CRC32C: &str = "crc32c_generic";

/// Mounts the kind on the guest's disks and checks it.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Guest {
    #[arg(long, value_parser = parser(FileSystem::in_matrix()))]
    kind: Kind,
    #[arg(long, value_enum)]
    mutant: Option<Mutant>,
    #[arg(long)]
    check: Vec<String>,
    #[arg(long)]
    skip: Vec<String>,
}

impl Guest {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        let mut out = findings()?;
        let end = match self.check_all(&mut out) {
            Ok(()) => Line::Done,
            Err(error) => Line::Failed(format!("{error:#}")),
        };
        Ok(end.send(&mut out)?)
    }

    fn check_all(&self, out: &mut impl Write) -> anyhow::Result<()> {
        let elsewhere = PathBuf::from("/run/elsewhere");
        fs::create_dir(&elsewhere)?;
        let (main, small) = (PathBuf::from("/mnt/main"), PathBuf::from("/mnt/small"));
        let disks = [("/dev/vda", &main), ("/dev/vdb", &small)];
        let server = match self.kind.storage {
            Storage::Nfs { exports, version } => Some(serve(exports, disks, version)?),
            Storage::Disk(_) | Storage::Memory | Storage::Overlay(_) => {
                for (disk, point) in disks {
                    make(self.kind, disk)?;
                    mount(self.kind, disk, point, true)?;
                }
                None
            }
        };
        let mut fixture = Fixture {
            dir: main.join("checks"),
            small: Some(small),
            elsewhere,
            target: Target(self.mutant),
            server,
        };
        fs::create_dir(&fixture.dir)?;
        checks::run_all(&mut fixture, &self.check, &self.skip, out)
    }
}

/// The port to the host.
pub(crate) fn findings() -> anyhow::Result<File> {
    const PORTS: &str = "/sys/class/virtio-ports";
    for port in fs::read_dir(PORTS).with_context(|| format!("can't list {PORTS}"))? {
        let port = port?;
        if fs::read_to_string(port.path().join("name"))?.trim() == PORT {
            let device = Path::new("/dev").join(port.file_name());
            return Ok(File::options().write(true).open(device)?);
        }
    }
    bail!("this machine has no virtio port called {PORT}")
}

/// Makes an empty file system of `kind` on `disk`.
pub(crate) fn make(kind: Kind, disk: &str) -> anyhow::Result<()> {
    let (of_kind, _) = on_disk(kind)?;
    let (program, arguments) = of_kind.mkfs.split_first().context("a program makes it")?;
    run(program, &[arguments, &[disk]].concat())
}

/// Mounts `disk` at `point`, which is made.
pub(crate) fn mount(kind: Kind, disk: &str, point: &Path, writable: bool) -> anyhow::Result<()> {
    let (of_kind, guest) = on_disk(kind)?;
    for module in [CRC32C].iter().chain(guest.modules) {
        modprobe(module)?;
    }
    let options = match writable {
        true => format!("rw,{}", guest.options),
        false => format!("ro,{}", guest.read_only),
    };
    attach(of_kind.driver, &options, disk, point)
}

fn on_disk(kind: Kind) -> anyhow::Result<(&'static Disk, InGuest)> {
    let disk = kind.disk();
    let found = disk.and_then(|disk| Some((disk, disk.guest?)));
    found.with_context(|| format!("{kind} is not on a disk of a guest"))
}

fn modprobe(module: &str) -> anyhow::Result<()> {
    run("/bin/busybox", &["modprobe", module])
}

fn attach(name: &str, options: &str, source: &str, point: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(point)?;
    let point = point.to_string_lossy();
    run("mount", &["-t", name, "-o", options, source, &point])
}

/// Exports a file system on each disk and mounts the exports through one proxy.
fn serve(exported: Kind, disks: [(&str, &PathBuf); 2], version: &str) -> anyhow::Result<Server> {
    for module in NFS_MODULES {
        modprobe(module)?;
    }
    attach("nfsd", "rw", "nfsd", Path::new("/proc/fs/nfsd"))?;
    attach(
        "rpc_pipefs",
        "rw",
        "rpc_pipefs",
        Path::new("/run/rpc_pipefs"),
    )?;
    // After a restart the server waits this long for clients to reclaim their state; the default is
    // 90 s.
    for setting in ["nfsv4leasetime", "nfsv4gracetime"] {
        fs::write(Path::new("/proc/fs/nfsd").join(setting), "10\n")?;
    }
    let _ = fs::write("/proc/sys/fs/nfs/nlm_grace_period", "5\n");
    for (n, (disk, point)) in disks.iter().enumerate() {
        let name = point.file_name().context("a mount point has a name")?;
        let export = Path::new("/srv").join(name);
        make(exported, disk)?;
        mount(exported, disk, &export, true)?;
        export_to_self(&export, &format!("rw,fsid={}", n + 1))?;
    }
    // The root of version 4's name space. An overlay, as this machine's root is, can't be exported.
    export_to_self(Path::new("/srv"), "ro,fsid=0")?;
    // The users that the packages would have made; the overlay keeps them in the guest.
    let mut users = File::options().append(true).open("/etc/passwd")?;
    users.write_all(
        b"_rpc:x:990:65534::/run/rpcbind:/bin/false\nstatd:x:991:65534::/var/lib/nfs:/bin/false\n",
    )?;
    fs::create_dir_all("/run/rpcbind")?;
    for dir in ["/var/lib/nfs/sm", "/var/lib/nfs/sm.bak"] {
        fs::create_dir_all(dir)?;
    }
    for (daemon, arguments) in [
        ("rpcbind", &[][..]),
        ("rpc.statd", &["--no-notify"]),
        ("rpc.mountd", &[]),
    ] {
        run(daemon, arguments)?;
    }
    nfs::start()?;
    // No client had state before this first start.
    fs::write("/proc/fs/nfsd/v4_end_grace", "Y")?;
    let proxy = Proxy::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 2049)))?;
    let options = format!(
        "{version},proto=tcp,hard,timeo=50,retrans=2,port={}",
        proxy.port
    );
    for (_, point) in disks {
        let name = point.file_name().context("a mount point has a name")?;
        let root = if version == "vers=3" { "/srv" } else { "" };
        let source = format!("127.0.0.1:{root}/{}", name.display());
        attach("nfs", &options, &source, point)?;
    }
    Ok(Server { proxy })
}

/// The proxy's port is not one of the system's: "insecure" lets it in.
fn export_to_self(dir: &Path, options: &str) -> anyhow::Result<()> {
    let options = format!("{options},sync,insecure,no_root_squash,no_subtree_check");
    let what = format!("127.0.0.1:{}", dir.display());
    run("exportfs", &["-i", "-o", &options, &what])
}

/// Unmounts, waiting for what is written.
pub(crate) fn unmount(point: &Path) -> anyhow::Result<()> {
    let status = Command::new("umount").arg(point).status()?;
    if !status.success() {
        bail!("can't unmount {}", point.display());
    }
    Ok(())
}
