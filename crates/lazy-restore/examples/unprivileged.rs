//! Restores a guest lazily in a process that may not use userfaultfd: a privileged process passes
//! it an open `/dev/userfaultfd` over a Unix socket.
//!
//! `cargo run -p ramsnap-lazy-restore --example unprivileged` as root, or as a user who may open
//! `/dev/userfaultfd`.

#[cfg(target_os = "linux")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    linux::run()
}

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("LazyRam needs Linux: on this system a chain is mapped (MappedChain) or restored");
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::io::{IoSlice, IoSliceMut};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use lazy_restore::{LazyRam, SizedReader};
    use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
    use nix::unistd::{Gid, Uid, setresgid, setresuid};
    use page_reader::PageReader;

    type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

    pub(super) fn run() -> Result<()> {
        match std::env::args().nth(1).as_deref() {
            Some("vmm") => vmm(),
            _ => launcher(),
        }
    }

    /// The privileged process: opens the device, and starts the VMM.
    fn launcher() -> Result<()> {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd");
        let device = match device {
            Ok(device) => device,
            Err(error) => {
                println!("not run: /dev/userfaultfd cannot be opened: {error}");
                return Ok(());
            }
        };
        let (ours, theirs) = UnixStream::pair()?;
        let rights = [device.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&rights)];
        let bytes = [IoSlice::new(b"u")];
        sendmsg::<()>(ours.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None)?;
        let mut vmm = Command::new(std::env::current_exe()?);
        let status = vmm.arg("vmm").stdin(OwnedFd::from(theirs)).status()?;
        match status.success() {
            true => Ok(()),
            false => Err("the VMM failed".into()),
        }
    }

    /// The VMM: an unprivileged process, whose standard input is the socket.
    fn vmm() -> Result<()> {
        if Uid::effective().is_root() {
            let (user, group) = (Uid::from_raw(65534), Gid::from_raw(65534));
            setresgid(group, group, group)?;
            setresuid(user, user, user)?;
        }
        match lazy_restore::available() {
            Ok(()) => println!("this process may open a userfaultfd itself"),
            Err(error) => println!("as user {}: {error}", Uid::effective()),
        }
        let ram_size = 64 << 20;
        let options = LazyRam::options().userfaultfd(receive()?);
        let ram = options.start(SizedReader::new(vec![7; ram_size], ram_size as u64))?;
        let mut byte = [0];
        ram.read_at(12 << 20, &mut byte)?; // the guest runs
        ram.wait()?;
        println!(
            "{} MiB were filled, after {} faults",
            ram_size >> 20,
            ram.faults()
        );
        Ok(())
    }

    /// Receives a descriptor.
    fn receive() -> Result<OwnedFd> {
        let mut space = nix::cmsg_space!(i32);
        let mut byte = [0];
        let mut bytes = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(0, &mut bytes, Some(&mut space), flags)?;
        match message.cmsgs()?.next() {
            Some(ControlMessageOwned::ScmRights(passed)) if passed.len() == 1 => {
                // SAFETY: the kernel has opened the descriptor for the receiver of the message.
                #[allow(unsafe_code)]
                Ok(unsafe { OwnedFd::from_raw_fd(passed[0]) })
            }
            other => Err(format!("no descriptor, but {other:?}").into()),
        }
    }
}
