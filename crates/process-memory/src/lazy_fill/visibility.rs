//! Whether `/proc` lists all processes of the machine.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use crate::lazy_fill::unexamined::HiddenProcesses;

/// The inode numbers of the initial namespaces (`PROC_PID_INIT_INO`, `PROC_USER_INIT_INO`).
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;
const CAP_SYS_PTRACE: u32 = 19;
/// `PF_KTHREAD` of the kernel.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Returns the reasons why `/proc` may not list all processes to this thread. Without any, each
/// process of the machine has its directory there.
///
/// # Errors
/// Returns an error if `/proc` is not mounted or cannot be read.
pub fn hidden_processes() -> io::Result<Vec<HiddenProcesses>> {
    let mut hidden = Vec::new();
    if !shows_initial_namespace() {
        hidden.push(HiddenProcesses::OutsidePidNamespace);
    }
    let status = Status::of_this_thread()?;
    // The privilege has no effect on processes of a parent of the user namespace.
    let sees_all =
        status.may_trace() && inode_of("/proc/self/ns/user") == Some(INITIAL_USER_NAMESPACE);
    match HidePid::of_proc()? {
        HidePid::No => {}
        HidePid::Unless { group } if group.is_some_and(|group| status.is_in(group)) => {}
        HidePid::Unless { .. } if sees_all => {}
        HidePid::Unless { .. } => hidden.push(HiddenProcesses::HidePid),
    }
    Ok(hidden)
}

/// Returns whether `/proc` is that of the initial PID namespace.
///
/// `/proc/self` exists only if the namespace of `/proc` is that of this process or a parent of it.
/// If this process is in a namespace of its own, `/proc` may still be that of the host: then it
/// lists the kernel's threads, all of which are in the initial namespace.
fn shows_initial_namespace() -> bool {
    inode_of("/proc/self/ns/pid") == Some(INITIAL_PID_NAMESPACE)
        || fs::read_to_string("/proc/2/stat").is_ok_and(|stat| is_kernel_thread(&stat))
}

fn inode_of(path: &str) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.ino())
}

fn is_kernel_thread(stat: &str) -> bool {
    // The name of the program may contain spaces and parentheses.
    let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest);
    let flags = after_name.and_then(|rest| rest.split(' ').nth(6));
    flags
        .and_then(|flags| flags.parse::<u64>().ok())
        .is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

/// The processes that the mount option `hidepid` hides.
#[derive(Debug, PartialEq, Eq)]
enum HidePid {
    /// No process is hidden: it is not given, or processes are listed and only their files denied.
    No,
    /// All but those that the reader may trace, unless it is in the group.
    Unless { group: Option<u32> },
}

impl HidePid {
    fn of_proc() -> io::Result<Self> {
        let proc = File::open("/proc")?;
        let info = fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", proc.as_raw_fd()))?;
        let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo")?;
        Ok(Self::in_mounts(&mounts, id.unwrap_or_default().trim()))
    }

    fn in_mounts(mounts: &str, id: &str) -> Self {
        let of_mount = |line: &&str| line.split(' ').next() == Some(id);
        let options = mounts
            .lines()
            .find(of_mount)
            .and_then(|line| line.rsplit(' ').next());
        let value = |name: &str| {
            let mut options = options.unwrap_or_default().split(',');
            options.find_map(|option| option.strip_prefix(name))
        };
        match value("hidepid=") {
            Some("2" | "invisible") => Self::Unless {
                // The default is that of root.
                group: value("gid=").map_or(Some(0), |group| group.parse().ok()),
            },
            Some("4" | "ptraceable") => Self::Unless { group: None },
            _ => Self::No,
        }
    }
}

/// The privileges of this thread.
struct Status(String);

impl Status {
    fn of_this_thread() -> io::Result<Self> {
        fs::read_to_string("/proc/thread-self/status").map(Self)
    }

    fn line(&self, name: &str) -> &str {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_default().trim()
    }

    fn may_trace(&self) -> bool {
        u64::from_str_radix(self.line("CapEff:"), 16)
            .is_ok_and(|capabilities| capabilities & 1 << CAP_SYS_PTRACE != 0)
    }

    fn is_in(&self, group: u32) -> bool {
        let own = self.line("Gid:").split_ascii_whitespace().last();
        let mut groups = self.line("Groups:").split_ascii_whitespace().chain(own);
        groups.any(|it| it.parse() == Ok(group))
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::none("rw", HidePid::No)]
    #[case::denied("rw,hidepid=noaccess", HidePid::No)]
    #[case::denied_by_number("rw,gid=5,hidepid=1", HidePid::No)]
    #[case::hidden("rw,hidepid=invisible", HidePid::Unless { group: Some(0) })]
    #[case::hidden_by_number("rw,gid=27,hidepid=2", HidePid::Unless { group: Some(27) })]
    #[case::not_traceable("rw,gid=27,hidepid=ptraceable", HidePid::Unless { group: None })]
    #[case::not_traceable_by_number("rw,hidepid=4", HidePid::Unless { group: None })]
    fn options_of_the_mount_say_what_is_hidden(#[case] options: &str, #[case] hidden: HidePid) {
        let mounts = format!(
            "21 27 0:20 / /sys rw,relatime - sysfs sysfs rw,hidepid=2\n\
             22 27 0:21 / /proc rw,nosuid shared:3 - proc proc {options}\n"
        );
        assert_eq!(HidePid::in_mounts(&mounts, "22"), hidden);
    }

    #[rstest]
    #[case::kernel_thread("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0", true)]
    #[case::program_of_that_name("2 (kthreadd) S 1 2 2 0 -1 4194560 0 0", false)]
    #[case::name_with_a_parenthesis("2 (a) S 0 0 (b) S 0 0 0 0 -1 2129984 0 0", true)]
    #[case::cut("2 (kthreadd) S", false)]
    fn kernel_threads_are_recognized_by_their_flags(#[case] stat: &str, #[case] is: bool) {
        assert_eq!(is_kernel_thread(stat), is);
    }

    #[test]
    fn privileges_are_those_of_the_status() {
        let status = |text: &str| Status(text.to_owned());
        let privileged = status("Gid:\t7\t7\t7\t8\nGroups:\t4 27 \nCapEff:\t000001ffffffffff\n");
        assert!(privileged.may_trace());
        for (group, is) in [(4, true), (27, true), (8, true), (7, false), (2, false)] {
            assert_eq!(privileged.is_in(group), is, "{group}");
        }
        let other = status("Gid:\t0\t0\t0\t0\nGroups:\t\nCapEff:\tfffffffffff7ffff\n");
        assert!(!other.may_trace() && other.is_in(0));
        assert!(!status("").may_trace() && !status("").is_in(0));
    }
}
