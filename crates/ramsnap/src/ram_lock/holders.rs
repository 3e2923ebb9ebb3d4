//! The processes that hold a lock, as far as `/proc` shows them.
//!
//! The kernel names no process for a lock by `F_OFD_SETLK`, which belongs to an open file. The
//! locks of an open file are listed for the descriptors of each process that has it
//! (`/proc/PID/fdinfo/FD`). A running ramsnap has a descriptor of each file that it has locked.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc;
use page_reader::printable;

use super::byte_lock::{AT, request, set};
use crate::sys::are_different_open_files;

/// A byte that is locked for a moment, to see how the kernel lists the file.
const PROBE: libc::off_t = AT + 0x100_0000;

/// A process that holds a lock.
#[derive(Debug)]
struct Process {
    pid: u32,
    command: String,
}

/// The other processes that hold a lock of some bytes of a file.
#[derive(Debug, Default)]
pub(super) struct Holders {
    processes: Vec<Process>,
    /// The number of locks that other open files have, if known.
    locks: Option<usize>,
    /// The number of locks that the processes have. Those of open files that the processes may
    /// share count once.
    found: usize,
    /// Whether all processes of the machine were examined.
    examined_all: bool,
}

impl Holders {
    /// Finds the processes that have locked any of the bytes. What cannot be examined is left out.
    pub(super) fn of(file: &File, bytes: &[Range<libc::off_t>]) -> Self {
        let Some(name) = listed_name(file) else {
            return Self::default();
        };
        let is_one = |line: &str| Lock::parse(line).is_some_and(|it| it.meets(&name, bytes));
        let count = |text: &str| text.lines().filter(|line| is_one(line)).count();
        let own = fs::read_to_string(fdinfo(file)).unwrap_or_default();
        let own = count(&own);
        let locks = || {
            let all = fs::read_to_string("/proc/locks").ok()?;
            Some(count(&all).saturating_sub(own))
        };
        let mut holders = Self {
            processes: Vec::new(),
            locks: locks(),
            found: 0,
            examined_all: process_memory::hidden_processes().is_ok_and(|it| it.is_empty()),
        };
        let Ok(entries) = fs::read_dir("/proc") else {
            return Self::default();
        };
        let mut open_files = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.parse().ok());
            let Some(pid) = pid.filter(|pid| *pid != std::process::id()) else {
                continue;
            };
            match descriptors(pid, &count) {
                Ok(found) if found.is_empty() => {}
                Ok(found) => {
                    for (descriptor, locks) in found {
                        let this = (pid, descriptor);
                        let differs = |it: &(u32, u32)| are_different_open_files(*it, this);
                        if open_files.iter().all(differs) {
                            open_files.push(this);
                            holders.found += locks;
                        }
                    }
                    holders.processes.push(Process {
                        pid,
                        command: command(pid),
                    });
                }
                Err(error) if has_ended(&error) => {}
                Err(_) => holders.examined_all = false,
            }
        }
        // Another process may have taken a lock before its descriptors were examined.
        holders.locks = holders
            .locks
            .zip(locks())
            .map(|(one, other)| one.max(other));
        holders.processes.sort_by_key(|process| process.pid);
        holders
    }

    /// Returns whether any lock is held.
    pub(super) fn exist(&self) -> bool {
        self.locks != Some(0)
    }

    /// Returns whether no process but those of `ignored` can hold a lock as ramsnap does: by a
    /// descriptor.
    pub(super) fn are_all_in(&self, ignored: &[u32]) -> bool {
        let is_ignored = |process: &Process| ignored.contains(&process.pid);
        self.are_known() && self.processes.iter().all(is_ignored)
    }

    fn are_known(&self) -> bool {
        self.examined_all
            || match self.locks {
                Some(locks) => locks <= self.found,
                None => false,
            }
    }

    /// Returns the names of the processes.
    pub(super) fn named(&self) -> String {
        let name = |it: &Process| format!("process {} ({})", it.pid, it.command);
        let mut names: Vec<_> = self.processes.iter().map(name).collect();
        if !self.are_known() {
            names.push("a process that ramsnap may not examine".to_owned());
        } else if names.is_empty() {
            names.push("no process has a descriptor of the locked file".to_owned());
        }
        names.join(", ")
    }

    /// Returns how to go on if the holders are not ramsnap.
    pub(super) fn remedy(&self, ignored: &[u32]) -> String {
        let others = self.processes.iter().map(|it| it.pid);
        let mut others = others.filter(|pid| !ignored.contains(pid)).peekable();
        match (others.peek(), self.are_known()) {
            (Some(_), _) => {
                let options = others.map(|pid| format!(" --ignore-lock {pid}"));
                format!("end it, or add{}", options.collect::<String>())
            }
            (None, false) => {
                let end = if self.processes.is_empty() {
                    ""
                } else {
                    "end it, or "
                };
                format!("{end}run ramsnap as root outside of containers to find all holders")
            }
            (None, true) => "end it".to_owned(),
        }
    }
}

/// A lock as the kernel lists it, in `/proc/locks` or for a descriptor.
#[derive(Debug, PartialEq, Eq)]
struct Lock<'l> {
    /// The device and inode number of the file.
    file: &'l str,
    first: libc::off_t,
    last: libc::off_t,
}

impl<'l> Lock<'l> {
    /// Parses `lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 0 EOF`. Requests that wait (`->`) and
    /// locks by `flock` are not listed in this form.
    fn parse(line: &'l str) -> Option<Self> {
        let line = line.strip_prefix("lock:").unwrap_or(line);
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let [_, "OFDLCK" | "POSIX", _, _, _, file, first, last] = words[..] else {
            return None;
        };
        let last = match last {
            "EOF" => libc::off_t::MAX,
            last => last.parse().ok()?,
        };
        let first = first.parse().ok()?;
        Some(Self { file, first, last })
    }

    fn meets(&self, file: &str, bytes: &[Range<libc::off_t>]) -> bool {
        let meets = |it: &Range<libc::off_t>| it.start <= self.last && self.first < it.end;
        self.file == file && bytes.iter().any(meets)
    }
}

/// Returns the device and inode number by which the kernel lists locks of the file: `stat` returns
/// others on btrfs and overlayfs.
fn listed_name(file: &File) -> Option<String> {
    let probe = PROBE..PROBE + 1;
    if set(file, &request(libc::F_RDLCK, probe.clone())).ok()? != Some(true) {
        return None;
    }
    let info = fs::read_to_string(fdinfo(file));
    // Closing the file would unlock it, too.
    let _ = set(file, &request(libc::F_UNLCK, probe));
    let info = info.ok()?;
    let mut locks = info.lines().filter_map(Lock::parse);
    let probed = locks.find(|lock| lock.first == PROBE)?;
    Some(probed.file.to_owned())
}

fn fdinfo(file: &File) -> String {
    format!("/proc/self/fdinfo/{}", file.as_raw_fd())
}

/// Returns the descriptors of the process that have locks, as `count` counts them in a list, and
/// the number of the locks.
fn descriptors(pid: u32, count: &impl Fn(&str) -> usize) -> io::Result<Vec<(u32, usize)>> {
    let mut found = Vec::new();
    for descriptor in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let descriptor = descriptor?;
        let number = descriptor.file_name();
        let Some(number) = number.to_str().and_then(|number| number.parse().ok()) else {
            continue;
        };
        match fs::read_to_string(descriptor.path()).map(|info| count(&info)) {
            Ok(0) => {}
            Ok(locks) => found.push((number, locks)),
            Err(error) if has_ended(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn command(pid: u32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    printable(name.strip_suffix(b"\n").unwrap_or(&name))
}

/// Returns whether the error is that of a process that has ended, or of a closed descriptor.
fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::of_a_descriptor("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:12 7 7", Some((7, 7)))]
    #[case::of_all("3: POSIX  ADVISORY  WRITE 42 fe:00:12 0 EOF", Some((0, i64::MAX)))]
    #[case::waiting("3: -> POSIX  ADVISORY  WRITE 42 fe:00:12 0 EOF", None)]
    #[case::flock("2: FLOCK  ADVISORY  WRITE 42 fe:00:12 0 EOF", None)]
    #[case::another_line("pos:\t0", None)]
    fn locks_are_parsed(#[case] line: &str, #[case] bytes: Option<(i64, i64)>) {
        let lock = Lock::parse(line);
        assert_eq!(lock.as_ref().map(|it| (it.first, it.last)), bytes);
        assert!(lock.is_none_or(|it| it.file == "fe:00:12"));
    }

    #[rstest]
    #[case::no_lock(&[], Some(0), 0, false, &[], true)]
    #[case::one_process(&[5], Some(1), 1, false, &[5], true)]
    #[case::not_named(&[5], Some(1), 1, true, &[6], false)]
    #[case::sharing_one_lock(&[5, 6], Some(1), 1, false, &[5], false)]
    #[case::two_locks(&[5, 6], Some(2), 2, false, &[5, 6], true)]
    #[case::one_of_two_named(&[5, 6], Some(2), 2, false, &[6], false)]
    #[case::shared_and_hidden(&[5, 6], Some(2), 1, false, &[5, 6], false)]
    #[case::another_lock(&[5], Some(2), 1, false, &[5], false)]
    #[case::number_not_known(&[5], None, 1, false, &[5], false)]
    #[case::all_examined(&[5, 6], Some(3), 2, true, &[5, 6], true)]
    #[case::hidden_process(&[], Some(1), 0, false, &[], false)]
    #[case::no_descriptor(&[], Some(1), 0, true, &[], true)]
    fn locks_are_ignored_only_if_all_holders_are(
        #[case] found: &[u32],
        #[case] locks: Option<usize>,
        #[case] locks_found: usize,
        #[case] examined_all: bool,
        #[case] ignored: &[u32],
        #[case] all: bool,
    ) {
        let process = |pid: &u32| Process {
            pid: *pid,
            command: String::new(),
        };
        let processes = found.iter().map(process).collect();
        let holders = Holders {
            processes,
            locks,
            found: locks_found,
            examined_all,
        };
        assert_eq!(holders.are_all_in(ignored), all);
    }

    #[test]
    fn shared_open_files_are_not_different() {
        let file = tempfile::tempfile().unwrap();
        let shared = file.try_clone().unwrap();
        let another = tempfile::tempfile().unwrap();
        let this = |file: &File| (std::process::id(), file.as_raw_fd().cast_unsigned());
        assert!(!are_different_open_files(this(&file), this(&shared)));
        assert!(are_different_open_files(this(&file), this(&another)));
        let no_process = (u32::MAX >> 1, 0);
        assert!(!are_different_open_files(this(&file), no_process));
    }
}
