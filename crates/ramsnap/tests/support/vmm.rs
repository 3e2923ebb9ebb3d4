//! Another process that has the RAM of a guest in its memory.

use std::fs;
use std::io::Read;
use std::num::NonZeroUsize;
use std::process::{Child, Command, Stdio};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, mprotect};
use nix::sys::signal::Signal;

use crate::support::{PAGE, RAM, Work};

/// The file whose bytes are the RAM of the guest in the other process.
const ROLE: &str = "RAMSNAP_TEST_RAM";

/// Set if the process must not stop: one of its threads waits for a child made by vfork.
pub(crate) const HANGS: &str = "RAMSNAP_TEST_HANGS";

/// The file that the other process maps as the RAM; a memfd if unset.
pub(crate) const FILE: &str = "RAMSNAP_TEST_FILE";

/// Set if the mapping is split into several, and no descriptor of its file stays open.
pub(crate) const SPLIT: &str = "RAMSNAP_TEST_SPLIT";

/// Set if all pages but one are protected against writes, as by a VMM that tracks writes.
pub(crate) const PROTECTED: &str = "RAMSNAP_TEST_PROTECTED";

/// Set if the memory right after the RAM is mapped from another file.
pub(crate) const BESIDE: &str = "RAMSNAP_TEST_BESIDE";

/// Runs as the other process, if this is one: maps a memfd with the bytes, prints its address, and
/// waits to be killed. Called by a test named `a_vmm` in each program of tests that starts one.
pub(crate) fn run_as_vmm() {
    let Some(path) = std::env::var_os(ROLE) else {
        return;
    };
    let ram = fs::read(path).unwrap();
    let fd = match std::env::var_os(FILE) {
        Some(file) => {
            let mut options = fs::File::options();
            let options = options.read(true).write(true).create_new(true);
            options.open(file).unwrap().into()
        }
        None => memfd_create("guest-ram", MFdFlags::empty()).unwrap(),
    };
    nix::unistd::ftruncate(&fd, RAM as i64).unwrap();
    let (len, flags) = (NonZeroUsize::new(ram.len()).unwrap(), MapFlags::MAP_SHARED);
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let start = match std::env::var_os(BESIDE) {
        // SAFETY: a new mapping, where the kernel chooses.
        None => unsafe { mmap(None, len, protection, flags, &fd, 0) }.unwrap(),
        Some(_) => {
            let other = memfd_create("another-file", MFdFlags::empty()).unwrap();
            nix::unistd::ftruncate(&other, RAM as i64).unwrap();
            let both = NonZeroUsize::new(2 * ram.len()).unwrap();
            let private = MapFlags::MAP_PRIVATE;
            // SAFETY: a new mapping, where the kernel chooses.
            let start = unsafe { mmap_anonymous(None, both, ProtFlags::PROT_NONE, private) };
            let start = start.unwrap();
            let fixed = flags | MapFlags::MAP_FIXED;
            for (number, fd) in [&fd, &other].into_iter().enumerate() {
                let at = start.as_ptr().addr() + number * ram.len();
                // SAFETY: replaces a half of the mapping, which nothing uses yet.
                unsafe { mmap(NonZeroUsize::new(at), len, protection, fixed, fd, 0) }.unwrap();
            }
            start
        }
    };
    for (number, page) in ram.chunks(PAGE as usize).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            let to = start.as_ptr().wrapping_byte_add(number * PAGE as usize);
            // SAFETY: the range is inside the mapping, whose address no other code has yet.
            unsafe { std::ptr::copy_nonoverlapping(page.as_ptr(), to.cast(), page.len()) };
        }
    }
    if std::env::var_os(SPLIT).is_some() {
        super::mapped::split(start);
        drop(fd);
    }
    if std::env::var_os(PROTECTED).is_some() {
        let page = start.as_ptr().wrapping_byte_add(4 << 20);
        let page = std::ptr::NonNull::new(page).unwrap();
        // SAFETY: the mapping is this program's own, and no reference covers it.
        unsafe {
            mprotect(start, ram.len(), ProtFlags::PROT_READ).unwrap();
            mprotect(page, PAGE as usize, protection).unwrap();
        }
    }
    println!("\nRAM AT {:#x}", start.as_ptr().addr());
    if std::env::var_os(HANGS).is_some() {
        let flags = nix::libc::CLONE_VFORK | nix::libc::SIGCHLD;
        // SAFETY: as a fork, except that the parent waits; the child only waits to be killed.
        let child = unsafe { nix::libc::syscall(nix::libc::SYS_clone, flags, 0, 0, 0, 0) };
        if child == 0 {
            let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
        }
    }
    loop {
        std::thread::park();
    }
}

/// Runs a program of root without the privilege to open files through mappings.
pub(crate) fn without_links(command: &mut Command) -> &mut Command {
    use std::os::unix::process::CommandExt;

    const CAP_SYS_ADMIN: nix::libc::c_ulong = 21;
    const CAP_CHECKPOINT_RESTORE: nix::libc::c_ulong = 40;
    let drop_privileges = || {
        for capability in [CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE] {
            // SAFETY: changes an attribute of this process.
            let dropped = unsafe { nix::libc::prctl(nix::libc::PR_CAPBSET_DROP, capability) };
            nix::errno::Errno::result(dropped)?;
        }
        Ok(())
    };
    // SAFETY: after fork, only system calls are made.
    unsafe { command.pre_exec(drop_privileges) }
}

/// The other process, which is killed on drop.
pub(crate) struct Vmm {
    pub(crate) child: Child,
    pub(crate) address: String,
}

impl Vmm {
    pub(crate) fn with(work: &Work, name: &str) -> Self {
        Self::set_up(work, name, |_| ())
    }

    pub(crate) fn set_up(work: &Work, name: &str, set_up: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "a_vmm", "--nocapture"])
            .env(ROLE, work.path(name))
            .stdout(Stdio::piped());
        set_up(&mut command);
        let mut child = command.spawn().unwrap();
        let mut said = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        while !said.ends_with('\n') || !said.contains("RAM AT") {
            let mut byte = [0];
            stdout.read_exact(&mut byte).unwrap();
            said.push(byte[0].into());
        }
        let address = said.trim_end().rsplit(' ').next().unwrap().to_owned();
        Self { child, address }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.state().to_lowercase().starts_with('t')
    }

    pub(crate) fn state(&self) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let state = status.lines().find_map(|line| line.strip_prefix("State:"));
        state.unwrap().trim().to_owned()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
