//! In the guest: makes the file system, mounts it, and checks it.

use std::fs::{self, File};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use scenarios::target::{Mutant, Target};

use super::PORT;
use crate::checks;
use crate::finding::Line;
use crate::fixture::Fixture;
use crate::kind::Kind;
use crate::nfs::{self, Server, run};
use crate::proxy::Proxy;

/// Mounts the kind on the guest's disks and checks it.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Guest {
    #[arg(long, value_enum)]
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
        let server = match self.kind {
            Kind::Nfs3 => Some(serve(disks, "vers=3")?),
            Kind::Nfs4 => Some(serve(disks, "vers=4.2")?),
            kind => {
                for (disk, point) in disks {
                    make(kind, disk)?;
                    mount(kind, disk, point, true)?;
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
    match kind {
        Kind::Ext4 => run("mkfs.ext4", &["-q", "-F", "-b", "4096", disk]),
        Kind::Xfs => run("mkfs.xfs", &["-q", "-f", disk]),
        Kind::Btrfs => run("mkfs.btrfs", &["-q", "-f", disk]),
        Kind::Apfs => run("mkapfs", &[disk]),
        Kind::Hfsplus => run("mkfs.hfsplus", &[disk]),
        Kind::Exfat => run("mkfs.exfat", &[disk]),
        _ => bail!("{kind} is on no disk"),
    }
}

/// Mounts `disk` at `point`, which is made.
pub(crate) fn mount(kind: Kind, disk: &str, point: &Path, writable: bool) -> anyhow::Result<()> {
    let (modules, name, options): (&[&str], _, _) = match kind {
        Kind::Ext4 => (&["ext4"], "ext4", "noatime"),
        Kind::Xfs => (&["xfs"], "xfs", "noatime"),
        Kind::Btrfs => (&["btrfs"], "btrfs", "noatime"),
        // Without the option this driver mounts for reading only.
        Kind::Apfs if writable => (&["apfs"], "apfs", "readwrite"),
        Kind::Apfs => (&["apfs"], "apfs", "noatime"),
        Kind::Hfsplus => (&["nls_utf8", "hfsplus"], "hfsplus", "nls=utf8"),
        Kind::Exfat => (&["exfat"], "exfat", "iocharset=utf8"),
        _ => bail!("{kind} is on no disk"),
    };
    for module in ["crc32c_generic"].iter().chain(modules) {
        modprobe(module)?;
    }
    let access = if writable { "rw" } else { "ro" };
    let options = format!("{access},{options}");
    attach(name, &options, disk, point)
}

fn modprobe(module: &str) -> anyhow::Result<()> {
    run("/bin/busybox", &["modprobe", module])
}

fn attach(name: &str, options: &str, source: &str, point: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(point)?;
    let point = point.to_string_lossy();
    run("mount", &["-t", name, "-o", options, source, &point])
}

/// Exports an ext4 on each disk and mounts the exports through one proxy.
fn serve(disks: [(&str, &PathBuf); 2], version: &str) -> anyhow::Result<Server> {
    for module in ["nfsd", "nfs", "nfsv3", "nfsv4"] {
        modprobe(module)?;
    }
    attach("nfsd", "rw", "nfsd", Path::new("/proc/fs/nfsd"))?;
    attach(
        "rpc_pipefs",
        "rw",
        "rpc_pipefs",
        Path::new("/run/rpc_pipefs"),
    )?;
    // After a restart the server waits this long for clients to reclaim what they had; the default
    // is 90 s.
    for setting in ["nfsv4leasetime", "nfsv4gracetime"] {
        fs::write(Path::new("/proc/fs/nfsd").join(setting), "10\n")?;
    }
    let _ = fs::write("/proc/sys/fs/nfs/nlm_grace_period", "5\n");
    for (n, (disk, point)) in disks.iter().enumerate() {
        let name = point.file_name().context("a mount point has a name")?;
        let export = Path::new("/srv").join(name);
        make(Kind::Ext4, disk)?;
        mount(Kind::Ext4, disk, &export, true)?;
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
