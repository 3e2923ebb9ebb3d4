//! Programs that take the lock by which ramsnap finds that RAM is read.

#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio, id};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rstest::rstest;
use support::held::Held;
use support::{Ended, RAM, Work};
use test_machine::needs;

/// The lock of readers, as the README documents it.
const AT: libc::off_t = 0x006d_656d_736e_6170;
/// The first byte that a restore locks if it ignores readers.
const BESIDE: libc::off_t = AT + 0x1000;

fn lock_of(kind: libc::c_int, at: libc::off_t, len: libc::off_t) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at,
        l_len: len,
        l_pid: 0,
    }
}

/// Opens a file only for reading, and locks some bytes of it.
fn reader(work: &Work, bytes: &[(libc::off_t, libc::off_t)]) -> File {
    let file = File::open(work.path("guest")).unwrap();
    for (at, len) in bytes {
        let lock = lock_of(libc::F_RDLCK, *at, *len);
        fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    }
    file
}

/// The file that [`a_holder`] locks.
const LOCKED: &str = "RAMSNAP_TEST_LOCKED";

/// Not a test: runs as another process. Takes the lock as a process does, not as an open file does,
/// and ends when its stdin does.
#[test]
fn a_holder() {
    let Some(path) = std::env::var_os(LOCKED) else {
        return;
    };
    let file = File::open(path).unwrap();
    fcntl(&file, FcntlArg::F_SETLK(&lock_of(libc::F_RDLCK, AT, 1))).unwrap();
    println!("\nlocked");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// A process that [`a_holder`] runs as. It is killed on drop.
struct Other(Child);

impl Other {
    fn with(work: &Work) -> Self {
        Self::by(Command::new(std::env::current_exe().unwrap()), work)
    }

    fn by(mut command: Command, work: &Work) -> Self {
        command
            .args(["--exact", "a_holder", "--nocapture"])
            .env(LOCKED, work.path("guest"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "locked"));
        Self(child)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const RESTORE: &str = "restore full.mem -o guest --force";

#[rstest]
#[case::one_byte(&[(AT, 1)])]
#[case::both_bytes(&[(AT, 1), (BESIDE, 1), (BESIDE + 2, 9)])]
fn a_reader_that_takes_the_lock_is_named_and_ignored(#[case] bytes: &[(libc::off_t, libc::off_t)]) {
    let work = Work::with_chain();
    work.copy("ram", "guest");
    let reader = reader(&work, bytes);
    let (process, option) = (
        format!("process {} (", id()),
        format!("--ignore-lock {}", id()),
    );
    let words = ["or a program has taken its lock", &process, &option];
    work.fails(RESTORE, 3, &words);
    work.fails(&format!("{RESTORE} --ignore-lock 1"), 3, &words);
    let warned = work.good(&format!("{RESTORE} {option}"));
    assert!(warned.err.contains(&process), "{}", warned.err);
    work.assert_same("guest", "first");
    drop(reader);
    assert_eq!(work.good(RESTORE).err, "");
}

#[test]
fn a_process_with_the_lock_is_named_and_ignored() {
    let work = Work::with_chain();
    work.copy("ram", "guest");
    let other = Other::with(&work);
    let option = format!("--ignore-lock {}", other.0.id());
    work.fails(RESTORE, 3, &[&option, "end it"]);
    work.good(&format!("{RESTORE} {option}"));
    work.assert_same("guest", "first");
}

/// Its lock is one of two, and only the other one is ignored.
#[test]
fn a_reading_ramsnap_is_not_ignored_with_another_process() {
    needs!(Strace);
    let work = Work::with_chain();
    work.copy("ram", "guest");
    let dump = work.command("dump guest -o out");
    let held = Held::before(&dump, &("pwrite64".to_owned(), 1)).expect("held");
    let _reader = reader(&work, &[(AT, 1)]);
    let reading = format!("process {} (ramsnap)", held.id());
    let option = format!("--ignore-lock {}", held.id());
    let ignoring = format!("{RESTORE} --ignore-lock {}", id());
    work.fails(&ignoring, 3, &[&reading, &option]);
    work.assert_same("guest", "ram");
    assert_eq!(held.release().0.code(), Some(0));
    work.good("diff out --ram guest");
    work.good(&ignoring);
    work.assert_same("guest", "first");
}

#[test]
fn a_restore_that_ignores_a_lock_excludes_other_ramsnaps() {
    needs!(Strace);
    let work = Work::with_chain();
    work.create("guest", RAM);
    let mut taken = reader(&work, &[(AT, 1), (BESIDE, 1)]);
    let restore = format!("restore full.mem -o guest --ignore-lock {}", id());
    let restore = work.command(&restore);
    let held = Held::before(&restore, &("pwrite64".to_owned(), 2)).expect("held");
    let writing = format!("process {} (ramsnap)", held.id());
    let ignoring = format!("{RESTORE} --ignore-lock {}", id());
    for locked in [true, false] {
        if !locked {
            // Its locks end with the file.
            taken = File::open(work.path("guest")).unwrap();
        }
        for command in ["dump guest -o out", "diff full.mem --ram guest"] {
            work.fails(command, 3, &["`ramsnap restore` is writing", &writing]);
        }
        let other = ["another `ramsnap restore`", &writing];
        work.fails(&ignoring, 3, &other);
        work.run(RESTORE).fails(3, &[&writing]);
    }
    assert_eq!(held.release().0.code(), Some(0));
    drop(taken);
    work.assert_same("guest", "first");
    work.good("dump guest -o out");
}

/// A running ramsnap has a descriptor of the file that it reads.
#[test]
fn a_lock_without_a_descriptor_is_ignored_if_all_is_known() {
    let work = Work::with_chain();
    work.copy("ram", "guest");
    let mut options = File::options();
    let file = options.read(true).write(true).open(work.path("guest"));
    let file = file.unwrap();
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock_of(libc::F_RDLCK, AT, 1))).unwrap();
    support::mapped::map(&file, RAM);
    drop(file);
    if every_process_can_be_examined() {
        let warned = work.good(RESTORE);
        assert!(
            warned.err.contains("no process has a descriptor"),
            "{}",
            warned.err
        );
    } else {
        let ignoring = format!("{RESTORE} --ignore-lock {}", id());
        work.fails(&ignoring, 3, &["as root outside of containers"]);
    }
}

fn every_process_can_be_examined() -> bool {
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap());
    let mut processes = processes.filter(|entry| {
        let name = entry.file_name();
        name.to_str()
            .is_some_and(|name| name.parse::<u32>().is_ok())
    });
    process_memory::hidden_processes().unwrap().is_empty()
        && processes.all(|entry| match fs::read_dir(entry.path().join("fdinfo")) {
            Ok(_) => true,
            Err(error) => error.kind() != std::io::ErrorKind::PermissionDenied,
        })
}

#[test]
fn a_lock_of_a_process_that_is_not_examined_prevents_a_restore() {
    needs!(Root);
    const USER: u32 = 65534;
    let work = Work::with_chain();
    work.copy("ram", "guest");
    fs::copy(support::RAMSNAP, work.path("ramsnap")).unwrap();
    for (name, mode) in [
        ("", 0o755),
        ("ramsnap", 0o755),
        ("full.mem", 0o644),
        ("guest", 0o600),
    ] {
        fs::set_permissions(work.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    std::os::unix::fs::chown(work.path("guest"), Some(USER), Some(USER)).unwrap();
    let _reader = reader(&work, &[(AT, 1)]);
    let ignoring = format!("{RESTORE} --ignore-lock {}", id());
    for command in [RESTORE, &ignoring] {
        let mut restore = Command::new(work.path("ramsnap"));
        restore.args(command.split(' ')).current_dir(work.path(""));
        Ended::of(restore.uid(USER).gid(USER)).fails(
            3,
            &[
                "may not examine",
                "run ramsnap as root outside of containers",
            ],
        );
        work.assert_same("guest", "ram");
    }
}

/// The user may not examine the processes of root, and two of the user's own have all locks.
#[test]
fn two_named_holders_with_all_locks_are_ignored() {
    needs!(Root);
    const USER: u32 = 65534;
    let work = Work::with_chain();
    work.copy("ram", "guest");
    fs::copy(support::RAMSNAP, work.path("ramsnap")).unwrap();
    fs::copy(std::env::current_exe().unwrap(), work.path("holder")).unwrap();
    for (name, mode) in [
        ("", 0o755),
        ("ramsnap", 0o755),
        ("holder", 0o755),
        ("full.mem", 0o644),
        ("guest", 0o600),
    ] {
        fs::set_permissions(work.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    std::os::unix::fs::chown(work.path("guest"), Some(USER), Some(USER)).unwrap();
    let holder = || {
        let mut command = Command::new(work.path("holder"));
        command.uid(USER).gid(USER).current_dir(work.path(""));
        Other::by(command, &work)
    };
    let holders = [holder(), holder()];
    let option = |holder: &Other| format!("--ignore-lock {}", holder.0.id());
    let run = |command: &str| {
        let mut restore = Command::new(work.path("ramsnap"));
        restore.args(command.split(' ')).current_dir(work.path(""));
        Ended::of(restore.uid(USER).gid(USER))
    };
    let ignoring = format!("{RESTORE} {}", option(&holders[0]));
    run(&ignoring).fails(3, &[&option(&holders[1])]);
    work.assert_same("guest", "ram");
    run(&format!("{ignoring} {}", option(&holders[1]))).good();
    work.assert_same("guest", "first");
}
