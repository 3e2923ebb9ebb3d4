//! RAM that another process is still filling as it is accessed is not captured.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::memfd::{MFdFlags, memfd_create};
use support::{Ended, RAM, RAMSNAP, Work, missing};
use test_machine::Need;

/// The task of the other process: `fill PATH`, `fill` (a memfd of its own) or `map PATH`.
const ROLE: &str = "RAMSNAP_TEST_ROLE";

/// Not a test: runs as the other process. Prints its descriptor and the address, and waits to be
/// killed.
#[test]
fn another_process() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let (role, path) = role.split_once(' ').unwrap_or((&role, ""));
    let file = match path {
        "" => {
            let file = File::from(memfd_create(c"guest-ram", MFdFlags::empty()).unwrap());
            file.set_len(RAM).unwrap();
            file
        }
        path => File::options().read(true).write(true).open(path).unwrap(),
    };
    let _fault = match role {
        "fill" => Some(missing::register(&file, RAM)),
        _ => {
            // Never unmapped, and filled by no process.
            drop(missing::register(&file, RAM));
            None
        }
    };
    println!("\nREADY {}", file.as_raw_fd());
    loop {
        std::thread::park();
    }
}

/// The other process, which is killed on drop.
struct Other {
    child: Child,
    descriptor: String,
}

impl Other {
    fn that(role: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "another_process", "--nocapture"])
            .env(ROLE, role)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = |line: String| Some(line.strip_prefix("READY ")?.to_owned());
        let descriptor = lines.map_while(Result::ok).find_map(ready).unwrap();
        Self { child, descriptor }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn met(test: &str) -> bool {
    Need::Userfaultfd.met(test) && Need::Root.met(test)
}

fn assert_nothing_at(path: &Path) {
    assert!(!path.exists(), "{path:?} was written");
}

#[test]
fn a_memfd_that_is_still_filled_is_not_captured() {
    if !met("a_memfd_that_is_still_filled_is_not_captured") {
        return;
    }
    let work = Work::empty();
    let filling = Other::that("fill");
    let (pid, descriptor) = (filling.pid(), &filling.descriptor);
    let named = format!("in process {pid} (");
    work.run(&format!("dump /proc/{pid}/fd/{descriptor} -o full.mem"))
        .fails(3, &[&named, "still being filled", "wait until"]);
    assert_nothing_at(&work.path("full.mem"));
}

#[test]
fn a_file_that_is_still_filled_is_not_captured() {
    if !met("a_file_that_is_still_filled_is_not_captured") {
        return;
    }
    let work = Work::with_chain();
    let ram = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    std::fs::copy(work.path("ram"), ram.path()).unwrap();
    let path = ram.path().to_str().unwrap();
    let filling = Other::that(&format!("fill {path}"));
    let named = format!("in process {} (", filling.pid());
    for verb in [
        format!("dump {path} -o new.mem"),
        format!("diff full.mem d1.mem d2.mem --ram {path} -o new.mem"),
        format!("diff full.mem d1.mem d2.mem --ram {path}"),
    ] {
        work.run(&verb).fails(3, &[&named]);
        assert_nothing_at(&work.path("new.mem"));
    }
    drop(filling);
    work.good(&format!("dump {path} -o new.mem"));
    work.good(&format!("diff new.mem --ram {path}"));
}

/// The named process reads missing pages as zeros: the userfaultfd of another process fills them.
#[test]
fn ram_that_another_process_fills_is_not_captured() {
    let test = "ram_that_another_process_fills_is_not_captured";
    if !met(test) || !Need::Ptrace.met(test) {
        return;
    }
    let work = Work::empty();
    let ram = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    ram.as_file().set_len(RAM).unwrap();
    let path = ram.path().to_str().unwrap();
    let mapped = Other::that(&format!("map {path}"));
    let filling = Other::that(&format!("fill {path}"));
    let capture = format!("dump --pid {} --region {path} -o full.mem", mapped.pid());
    let named = format!("in process {} (", filling.pid());
    work.run(&capture).fails(3, &[&named]);
    assert_nothing_at(&work.path("full.mem"));
    drop(filling);
    work.good(&capture);
}

/// A process that fills the RAM outside of the PID namespace cannot be found there.
#[test]
fn processes_outside_the_pid_namespace_cause_a_warning() {
    let test = "processes_outside_the_pid_namespace_cause_a_warning";
    if !met(test) || !Need::Ptrace.met(test) {
        return;
    }
    let work = Work::empty();
    let ram = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    ram.as_file().set_len(RAM).unwrap();
    let path = ram.path().to_str().unwrap();
    let warned = "the processes outside of this PID namespace";
    let dump = |output: &str| {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", RAMSNAP]);
        command.args(["dump", path, "-o", output]);
        Ended::of(command.current_dir(work.path("")))
    };
    let ended = dump("inside.mem").good();
    assert_eq!(ended.err.matches(warned).count(), 1, "{ended:?}");
    assert!(ended.err.contains("outside of containers"), "{ended:?}");
    // Here, all processes are listed.
    let ended = work.good(&format!("dump {path} -o outside.mem"));
    assert!(!ended.err.contains(warned), "{ended:?}");
    // A file on a disk cannot be filled.
    let disk = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    disk.as_file().set_len(RAM).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", RAMSNAP]);
    command.arg("dump").arg(disk.path());
    command.args(["-o", "disk.mem"]).current_dir(work.path(""));
    let ended = Ended::of(&mut command).good();
    assert_eq!(ended.err, "", "{ended:?}");
}
