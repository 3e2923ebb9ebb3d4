//! RAM in the memory of another process.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::pty::openpty;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::sys::termios::{FlowArg, tcflow};
use nix::unistd::{Pid, mkfifo};
use process_memory::StoppedProcess;
use rstest::rstest;
use support::held::Held;
use support::{Ended, PAGE, RAM, Work};
use test_machine::{LoopFs, LoopMount, Need, Overlay, TinyTmpfs};

/// The file whose bytes are the RAM of the guest in the other process.
const ROLE: &str = "RAMSNAP_TEST_RAM";

/// Set if the process must not stop: one of its threads waits for a child made by vfork.
const HANGS: &str = "RAMSNAP_TEST_HANGS";

/// The file that the other process maps as the RAM; a memfd if unset.
const FILE: &str = "RAMSNAP_TEST_FILE";

/// Not a test: runs as the other process. Maps a memfd with the bytes, prints its address, and
/// waits to be killed.
#[test]
fn a_vmm() {
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
    // SAFETY: a new mapping, where the kernel chooses.
    let start = unsafe { mmap(None, len, protection, flags, &fd, 0) }.unwrap();
    for (number, page) in ram.chunks(PAGE as usize).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            let to = start.as_ptr().wrapping_byte_add(number * PAGE as usize);
            // SAFETY: the range is inside the mapping, whose address no other code has yet.
            unsafe { std::ptr::copy_nonoverlapping(page.as_ptr(), to.cast(), page.len()) };
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

/// The other process, which is killed on drop.
struct Vmm {
    child: Child,
    address: String,
}

impl Vmm {
    fn with(work: &Work, name: &str) -> Self {
        Self::set_up(work, name, |_| ())
    }

    fn set_up(work: &Work, name: &str, set_up: impl FnOnce(&mut Command)) -> Self {
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

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn is_stopped(&self) -> bool {
        self.state().to_lowercase().starts_with('t')
    }

    fn state(&self) -> String {
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

#[test]
fn ram_is_captured_from_a_process_by_name_address_or_range() {
    if !Need::Ptrace.met("ram_is_captured_from_a_process_by_name_address_or_range") {
        return;
    }
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let (pid, address) = (vmm.pid(), &vmm.address);
    for (number, region) in [
        "/memfd:guest-ram".to_owned(),
        "guest-ram".to_owned(),
        address.clone(),
        format!("{address}:8MiB"),
    ]
    .iter()
    .enumerate()
    {
        work.good(&format!(
            "dump --pid {pid} --region {region} -o {number}.mem"
        ));
        work.good(&format!("diff {number}.mem --ram ram"));
    }
    // Untouched RAM is neither touched nor saved.
    let info = work.good("info 0.mem full.mem --json").json();
    assert!(info[0]["present"]["bytes"].as_u64() <= Some(120 * PAGE));
    // The process runs again.
    assert!(!vmm.is_stopped());

    work.good(&format!(
        "dump --pid {pid} --region guest-ram --live -o live.mem"
    ));
    work.good("diff live.mem --ram ram");
}

/// Runs the tool with its output on the terminal `to`, up to a system call.
fn held_on_terminal(work: &Work, arguments: &str, to: &impl AsFd, call: &str) -> Held {
    let to = nix::unistd::ttyname(to).unwrap();
    let script = format!(
        "exec {} {arguments} >{to} 2>{to}",
        support::RAMSNAP,
        to = to.display()
    );
    let mut command = Command::new("sh");
    command
        .args(["-c", &script])
        .env("TERM", "xterm")
        .current_dir(work.path(""));
    Held::before(&command, &(call.to_owned(), 1)).expect("held")
}

/// As with Ctrl-S, or a stalled ssh connection.
#[rstest]
#[case::dump("dump")]
#[case::diff("diff full.mem d1.mem")]
fn a_terminal_that_takes_no_output_keeps_no_process_stopped(#[case] verb: &str) {
    let test = "a_terminal_that_takes_no_output_keeps_no_process_stopped";
    if !Need::Ptrace.met(test) || !Need::Strace.met(test) {
        return;
    }
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let terminal = openpty(None, None).unwrap();
    let command = format!("{verb} --pid {} --region guest-ram -o out", vmm.pid());
    // The staged file: warnings came before, and the process is stopped after it.
    let held = held_on_terminal(&work, &command, &terminal.slave, "renameat2");
    assert!(!vmm.is_stopped());
    tcflow(&terminal.slave, FlowArg::TCOOFF).unwrap();
    let mut held = held.let_go_on();
    held.wait_until_it_writes();
    assert!(!vmm.is_stopped());
    assert!(work.files().contains(&"out".to_owned()));
    // The first one cancels, as long as anything may be left to remove; the second one ends it.
    while !held.has_ended() {
        held.send(Signal::SIGTERM);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(held.release().0.code(), Some(143));
}

#[test]
fn a_second_signal_ends_a_capture_whose_terminal_is_stopped() {
    let test = "a_second_signal_ends_a_capture_whose_terminal_is_stopped";
    if !Need::Ptrace.met(test) || !Need::Strace.met(test) {
        return;
    }
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let terminal = openpty(None, None).unwrap();
    let command = format!("dump --pid {} --region guest-ram -o out", vmm.pid());
    let mut held = held_on_terminal(&work, &command, &terminal.slave, "pwrite64");
    assert!(vmm.is_stopped());
    tcflow(&terminal.slave, FlowArg::TCOOFF).unwrap();
    assert!(!held.signal(Signal::SIGTERM), "it cancels");
    assert!(held.signal(Signal::SIGTERM), "the second one ends it");
    assert_eq!(held.release().0.code(), Some(143));
    assert!(!vmm.is_stopped());
}

#[test]
fn a_diff_is_captured_from_a_process() {
    if !Need::Ptrace.met("a_diff_is_captured_from_a_process") {
        return;
    }
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let pid = vmm.pid();
    work.good(&format!(
        "diff full.mem d1.mem --pid {pid} --region guest-ram -o mine.mem"
    ));
    work.good("verify full.mem d1.mem mine.mem");
    let info = work.good("info mine.mem d2.mem --json").json();
    assert_eq!(info[0]["present"], info[1]["present"]);
    work.good("restore full.mem d1.mem mine.mem -o out");
    work.assert_same("out", "ram");
}

#[test]
fn missing_regions_are_named_and_the_process_resumes() {
    if !Need::Ptrace.met("missing_regions_are_named_and_the_process_resumes") {
        return;
    }
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let pid = vmm.pid();
    let full = format!("dump --pid {pid} -o out");
    work.fails(&full, 2, &["--region", "guest-ram"]);
    work.fails(
        &format!("{full} --region other-ram"),
        3,
        &["other-ram", "guest-ram"],
    );
    work.fails(
        &format!("{full} --region 0x1000"),
        3,
        &["0x1000", "nothing mapped"],
    );
    work.fails(
        &format!("{full} --region 0x1000:1MiB"),
        3,
        &["0x1000", "nothing mapped"],
    );
    work.fails(&format!("{full} ram"), 2, &["once"]);
    work.fails("dump -o out", 2, &["name the guest's RAM"]);
    work.fails("dump ram --region guest-ram -o out", 2, &["--pid"]);
    let diff = format!("diff full.mem --ram ram --pid {pid} --region guest-ram -o out");
    work.fails(&diff, 2, &["once"]);
    assert!(!vmm.is_stopped());
    // The id of a process that has ended, which no other process has.
    drop(vmm);
    work.fails(&full, 3, &["does not exist"]);
}

#[test]
fn without_permission_to_trace_the_error_says_how_to_get_it() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;

    let test = "without_permission_to_trace_the_error_says_how_to_get_it";
    if !Need::Root.met(test) || !Need::Ptrace.met(test) {
        return;
    }
    let work = Work::with_ram();
    let vmm = Vmm::with(&work, "ram");
    let copied = Command::new("cp")
        .args([support::RAMSNAP, "ramsnap"])
        .current_dir(work.path(""))
        .status();
    assert!(copied.unwrap().success());
    fs::set_permissions(work.path(""), fs::Permissions::from_mode(0o777)).unwrap();
    let mut command = Command::new(work.path("ramsnap"));
    let full = format!("dump --pid {} --region guest-ram -o out", vmm.pid());
    command.args(full.split(' ')).current_dir(work.path(""));
    Ended::of(command.uid(65534).gid(65534)).fails(3, &["may trace", "CAP_SYS_PTRACE"]);
    assert_eq!(work.files(), ["ram", "ramsnap"]);
}

/// The process to stop may be the writer of the metadata.
#[rstest]
#[case::dump("dump")]
#[case::diff("diff full.mem d1.mem")]
fn the_process_runs_while_metadata_is_waited_for(#[case] verb: &str) {
    if !Need::Ptrace.met("the_process_runs_while_metadata_is_waited_for") {
        return;
    }
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    mkfifo(&work.path("fifo"), Mode::S_IRWXU).unwrap();
    let pid = vmm.pid();
    let mut child = work
        .command(&format!(
            "{verb} --pid {pid} --region guest-ram --metadata fifo -o out"
        ))
        .spawn()
        .unwrap();
    // Opens once the other end is open, and then waits for the bytes.
    let mut fifo = fs::File::options()
        .write(true)
        .open(work.path("fifo"))
        .unwrap();
    assert!(!vmm.is_stopped());
    fifo.write_all(b"vcpus").unwrap();
    drop(fifo);
    assert!(child.wait().unwrap().success());
    let info = work.good("info out --json").json();
    assert_eq!(info[0]["metadata_bytes"], 5, "{info}");
}

/// The test traces the process, so stopping it fails, which is the last possible error.
#[test]
fn all_that_can_fail_is_found_before_the_process_is_stopped() {
    if !Need::Ptrace.met("all_that_can_fail_is_found_before_the_process_is_stopped") {
        return;
    }
    let work = Work::with_chain();
    work.create("small", RAM / 2);
    work.good("dump small -o small.mem");
    let vmm = Vmm::with(&work, "ram");
    let stopped = StoppedProcess::stop(vmm.pid(), Duration::from_secs(120)).unwrap();
    let ram = format!("--pid {} --region guest-ram", vmm.pid());
    work.fails(&format!("dump {ram} -o none/out"), 3, &["none"]);
    work.fails(&format!("dump {ram} -o out --metadata none"), 3, &["none"]);
    let regions = format!("dump {ram} -o out --region-at 0:4MiB");
    work.fails(&regions, 2, &["4194304"]);
    work.fails(
        &format!("dump {ram} -o out --page-size 3GiB"),
        2,
        &["power"],
    );
    work.fails(
        &format!("dump {ram} -o out --page-size 16MiB"),
        3,
        &["16777216"],
    );
    work.fails(&format!("diff full.mem {ram} -o none/out"), 3, &["none"]);
    work.fails(
        &format!("diff full.mem {ram} -o out --metadata none"),
        3,
        &["none"],
    );
    work.fails(
        &format!("diff small.mem {ram} -o out"),
        1,
        &["different guests"],
    );
    work.fails(&format!("dump {ram} -o out"), 3, &["already traced"]);
    drop(stopped);
    work.good(&format!("dump {ram} -o out"));
}

#[test]
fn a_file_that_the_process_has_as_ram_is_not_the_output() {
    if !Need::Ptrace.met("a_file_that_the_process_has_as_ram_is_not_the_output") {
        return;
    }
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let pid = vmm.pid();
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let path = fds.map(|fd| fd.unwrap().path()).find(|fd| {
        let target = fs::read_link(fd).unwrap();
        target.to_string_lossy().contains("guest-ram")
    });
    let path = path.unwrap();
    for verb in ["dump", "diff full.mem"] {
        let command = format!(
            "{verb} --pid {pid} --region guest-ram --force -o {}",
            path.display()
        );
        work.fails(&command, 2, &["one of the inputs"]);
    }
}

/// An overlay lists the mapping with another device than that of the file. The file has a second
/// device in the layer.
#[test]
fn a_file_on_an_overlay_that_the_process_has_as_ram_is_not_the_output() {
    const TEST: &str = "a_file_on_an_overlay_that_the_process_has_as_ram_is_not_the_output";
    if !Need::Ptrace.met(TEST) || !Need::Root.met(TEST) {
        return;
    }
    let work = Work::with_chain();
    let [below, above] = [64 << 20; 2].map(|size| TinyTmpfs::new(size).unwrap());
    let [upper, inside] = ["upper", "work"].map(|name| above.path().join(name));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&inside).unwrap();
    let overlay = Overlay::of(below.path(), &upper, &inside).unwrap();
    let ram = overlay.path().join("guest-ram");
    let vmm = Vmm::set_up(&work, "ram", |command| {
        command.env(FILE, &ram);
    });
    let pid = vmm.pid();
    for path in [&ram, &upper.join("guest-ram")] {
        let command = format!(
            "dump --pid {pid} --region guest-ram --force -o {}",
            path.display()
        );
        work.fails(&command, 2, &["one of the inputs"]);
        assert!(fs::read(path).unwrap() == work.read("ram"));
    }
}

/// On btrfs, mappings are listed with another device than files.
#[test]
fn a_file_on_btrfs_that_the_process_has_as_ram_is_not_the_output() {
    const TEST: &str = "a_file_on_btrfs_that_the_process_has_as_ram_is_not_the_output";
    if !Need::Ptrace.met(TEST) || !Need::Root.met(TEST) || !Need::Btrfs.met(TEST) {
        return;
    }
    let work = Work::with_chain();
    let disk = LoopMount::new(LoopFs::Btrfs).unwrap();
    let ram = disk.path().join("guest-ram");
    let vmm = Vmm::set_up(&work, "ram", |command| {
        command.env(FILE, &ram);
    });
    let (pid, address) = (vmm.pid(), vmm.address.clone());
    for region in ["guest-ram", &address] {
        let full = format!(
            "dump --pid {pid} --region {region} --force -o {}",
            ram.display()
        );
        work.fails(&full, 2, &["one of the inputs"]);
        assert!(fs::read(&ram).unwrap() == work.read("ram"));
    }
}

/// Otherwise the image would contain the RAM twice.
#[test]
fn ram_that_is_named_twice_is_refused() {
    if !Need::Ptrace.met("ram_that_is_named_twice_is_refused") {
        return;
    }
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let (pid, address) = (vmm.pid(), &vmm.address);
    for (one, other) in [
        ("guest-ram", "guest-ram"),
        ("guest-ram", &**address),
        (&*format!("{address}:1MiB"), &*format!("{address}:4KiB")),
    ] {
        let full = format!("dump --pid {pid} --region {one} --region {other} -o out");
        work.fails(&full, 2, &["the same memory", "once"]);
    }
}

/// A suspended ramsnap would keep the guest stopped.
#[test]
fn ctrl_z_waits_until_the_process_runs_again() {
    let test = "ctrl_z_waits_until_the_process_runs_again";
    if !Need::Ptrace.met(test) || !Need::Strace.met(test) {
        return;
    }
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let command = work.command(&format!(
        "dump --pid {} --region guest-ram -o out",
        vmm.pid()
    ));
    let held = Held::before(&command, &("pwrite64".to_owned(), 1)).expect("held");
    assert!(vmm.is_stopped());
    let blocked = held.blocked_by_all_threads();
    for signal in [Signal::SIGTSTP, Signal::SIGTTOU] {
        assert!(blocked >> (signal as u32 - 1) & 1 == 1, "{signal}");
    }
    held.send(Signal::SIGTSTP);
    let held = held.let_go_on();
    held.wait_until_suspended();
    assert!(!vmm.is_stopped());
    held.send(Signal::SIGCONT);
    assert_eq!(held.release().0.code(), Some(0));
    work.good("diff out --ram ram");
}

#[test]
fn a_signal_ends_the_wait_for_a_process_that_does_not_stop() {
    if !Need::Ptrace.met("a_signal_ends_the_wait_for_a_process_that_does_not_stop") {
        return;
    }
    let work = Work::with_chain();
    let vmm = Vmm::set_up(&work, "ram", |command| {
        command.env(HANGS, "1");
    });
    let before = work.files();
    let full = format!("dump --pid {} --region guest-ram -o out", vmm.pid());
    let mut child = work.command(&full).spawn().unwrap();
    // ramsnap tries to stop the process, which does not stop before the timeout.
    let status = format!("/proc/{}/status", vmm.pid());
    while fs::read_to_string(&status)
        .unwrap()
        .contains("TracerPid:\t0\n")
    {
        if let Some(status) = child.try_wait().unwrap() {
            assert_eq!(status.code(), Some(3));
            panic!("it gave up before it was seen to try");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    nix::sys::signal::kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGHUP).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(129));
    assert_eq!(work.files(), before);
}

/// Reading a page of a memfd that was never touched would allocate it.
#[test]
fn capturing_a_process_gives_it_no_memory() {
    if !Need::Ptrace.met("capturing_a_process_gives_it_no_memory") {
        return;
    }
    let work = Work::with_chain();
    let vmm = Vmm::with(&work, "ram");
    let resident = || {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", vmm.pid())).unwrap();
        let mut lines = smaps.lines().skip_while(|line| !line.contains("guest-ram"));
        let rss = lines.find_map(|line| line.strip_prefix("Rss:"));
        rss.unwrap().trim().to_owned()
    };
    let before = resident();
    let ram = format!("--pid {} --region guest-ram", vmm.pid());
    for layout in ["raw", "sealed", "packed"] {
        for zeros in ["", " --keep-zeros"] {
            work.good(&format!(
                "dump {ram} --layout {layout}{zeros} --force -o out"
            ));
            assert_eq!(resident(), before, "{layout}{zeros}");
        }
        work.good(&format!(
            "diff full.mem {ram} --layout {layout} --force -o out"
        ));
        assert_eq!(resident(), before, "{layout}");
    }
    work.good(&format!(
        "diff raw:first {ram} --page-size 64KiB --force -o out"
    ));
    assert_eq!(resident(), before);
}
